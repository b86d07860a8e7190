"""The ops that a program may call: an allow-list by overload name. One line adds one.

A base op admits its own in-place and `out` forms where plans write over operands, and graphplan's forms that read an
encoding. Kernels that trust their caller (they read out of bounds on hostile shapes) have a rule in `rules.py`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from graphplan import functions
from graphplan.codecs.readers import READERS
from graphplan.functions.register import NAMESPACE, name_of
from graphplan.in_place import batch_norm_, forms_of
from graphplan.step import slices
from graphplan.step.chunked import linear_cross_entropy
from graphplan.step.clip import clip_factor
from graphplan.step.updates import RULES

Target = Callable[..., Any]

ATEN = """
abs.default add.Scalar add.Tensor addcdiv.default addcmul.default add_.Tensor bitwise_and.Tensor bitwise_not.default
clamp.default clamp_max.default clamp_min.default cos.default div.Scalar div.Tensor eq.Scalar eq.Tensor erf.default
exp.default ge.Scalar ge.Tensor gt.Scalar gt.Tensor le.Scalar le.Tensor log.default log1p.default logical_and.default
logical_not.default logical_or.default lt.Scalar lt.Tensor masked_fill.Scalar maximum.default minimum.default
mul.Scalar mul.Tensor ne.Scalar ne.Tensor neg.default pow.Tensor_Scalar pow.Tensor_Tensor reciprocal.default
rsqrt.default rsub.Scalar sign.default sin.default sqrt.default sub.Scalar sub.Tensor where.self
elu.default elu_backward.default gelu.default gelu_backward.default hardsigmoid.default hardsigmoid_backward.default
hardswish.default hardswish_backward.default hardtanh.default hardtanh_backward.default leaky_relu.default
leaky_relu_backward.default relu.default sigmoid.default sigmoid_backward.default silu.default silu_backward.default
softplus.default softplus_backward.default tanh.default tanh_backward.default threshold_backward.default
_log_softmax.default _log_softmax_backward_data.default _softmax.default _softmax_backward_data.default
amax.default amin.default argmax.default cumsum.default linalg_vector_norm.default mean.default mean.dim sum.default
sum.dim_IntList var_mean.correction
addmm.default baddbmm.default bmm.default convolution.default convolution_backward.default mm.default
embedding.default embedding_dense_backward.default
_native_batch_norm_legit.no_stats _native_batch_norm_legit_functional.default native_batch_norm_backward.default
native_layer_norm.default native_layer_norm_backward.default
native_dropout.default native_dropout_backward.default
nll_loss2d_backward.default nll_loss2d_forward.default nll_loss_backward.default nll_loss_forward.default
_adaptive_avg_pool2d.default avg_pool2d.default avg_pool2d_backward.default
max_pool2d_with_indices.default max_pool2d_with_indices_backward.default
_scaled_dot_product_flash_attention_for_cpu.default _scaled_dot_product_flash_attention_for_cpu_backward.default
alias.default cat.default clone.default constant_pad_nd.default copy_.default detach.default expand.default flip.default
permute.default select.int select_backward.default slice.Tensor slice_backward.default split.Tensor
split_with_sizes.default squeeze.dim squeeze.dims stack.default t.default transpose.int unbind.int unsqueeze.default
_unsafe_view.default view.default _to_copy.default
arange.default arange.start arange.start_step full.default full_like.default new_full.default new_ones.default
new_zeros.default ones.default ones_like.default scalar_tensor.default zeros.default zeros_like.default
""".split()

OWN = (
    functions.dropout_backward,
    functions.dropout_from_mask,
    functions.max_pool2d_backward_from_codes,
    functions.max_pool2d_to_codes,
    functions.narrow_integers,
    functions.pack_pool_indices,
    functions.pack_sides,
    functions.unpack_bits,
    functions.unpack_pool_indices,
    functions.widen_integers,
)
PLAIN: dict[str, Target] = {
    "getitem": operator.getitem,
    "batch_norm_": batch_norm_,
    "clip_factor": clip_factor,
    "linear_cross_entropy": linear_cross_entropy,
    **{f.__name__: f for f in slices.SLICED},
    **{f.__name__: f for rule in RULES.values() for f in (rule.update, rule.of_product)},
}
_NAMES = {id(f): name for name, f in PLAIN.items()}


@cache
def base_ops() -> dict[str, torch._ops.OpOverload]:
    """Return the ATen overloads of the list by name."""
    found = {}
    for name in ATEN:
        packet, overload = name.split(".")
        found[f"aten.{name}"] = getattr(getattr(torch.ops.aten, packet), overload)
    return found


@cache
def targets() -> dict[str, Target]:
    """Return everything that a program may name, but for the forms that read encodings."""
    found: dict[str, Target] = {**PLAIN, **{str(op): op for op in OWN}}
    for name, op in base_ops().items():
        found[name] = op
        found.update((str(form), form) for form in forms_of(op, "CPU") if form is not None)
    return found


@cache
def _derived() -> dict[str, tuple[torch._ops.OpOverload, int]]:
    """Return (base op, argument) of every form that could read an encoding, by the packet's name."""
    found = {}
    for op in (*base_ops().values(), *(op for op in OWN if torch.Tag.pointwise in op.tags)):
        for i, argument in enumerate(op._schema.arguments):
            if str(argument.type) == "Tensor":
                for suffix in ("from_sides", "from_shape"):
                    found[name_of(op, argument.name, suffix)] = (op, i)
    return found


def base_of(target: Target) -> torch._ops.OpOverload | None:
    """Return the ATen op that a target is, or is a form of."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    packet = target._schema.name.split("::")[1]
    if target.namespace == NAMESPACE:
        return _derived()[packet][0] if packet in _derived() else None
    return target


def target_named(name: str) -> Target | None:
    """Return what `name` calls, None if it is not allowed."""
    if name in targets():
        return targets()[name]
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    if namespace != NAMESPACE or packet not in _derived():
        return None
    op, at = _derived()[packet]
    if packet.endswith("from_shape"):
        return functions.from_shape(op, at) if overload == "default" else None
    sided = any(r.argument == at and r.side for r in READERS.get(op, ()))
    if not (sided or torch.Tag.pointwise in op.tags):
        return None
    names = [a.name for a in op._schema.arguments]
    if overload == "default":
        return functions.from_sides(op, at)
    over = overload.removeprefix("over_")
    return functions.from_sides(op, at, names.index(over)) if over in names and over != names[at] else None


def name_of_target(target: Target) -> str | None:
    """Return the name under which a program calls `target`, None if that is not allowed."""
    name = str(target) if isinstance(target, torch._ops.OpOverload) else _NAMES.get(id(target), "")
    return name if name and target_named(name) is target else None
