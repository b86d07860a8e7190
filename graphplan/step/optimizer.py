"""What a step needs of the user's optimizer: which parameter belongs to which group, and that it can be planned."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graphplan.errors import UnsupportedOptimizer
from graphplan.step.updates import RULES, Rule

_BARE = {"lr": 1e-3, "initial_lr": 1e-3}  # what a schedule changes costs nothing: profiled at one value


@dataclass(frozen=True, slots=True)
class Slots:
    """The optimizer's groups by parameter: `group_of[id(p)]`; `rule` updates one parameter."""

    optimizer: Optimizer
    rule: Rule
    group_of: dict[int, int]

    @staticmethod
    def of(optimizer: Any, model: nn.Module) -> Slots:
        """Return the slots of an optimizer that a step of `model` can be planned with.

        Raises:
            UnsupportedOptimizer: what about it cannot be planned, and what would help.
        """
        _check_class(optimizer)
        names = {id(p): n for n, p in model.named_parameters()}
        group_of: dict[int, int] = {}
        for k, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                if id(p) not in names:
                    raise UnsupportedOptimizer(
                        f"group {k} of the optimizer has a parameter {tuple(p.shape)} that the model does not have: "
                        "build the optimizer from this model's parameters()"
                    )
                group_of[id(p)] = k
            _check_group(k, group, optimizer)
        if not any(p.requires_grad for p in model.parameters() if id(p) in group_of):
            raise UnsupportedOptimizer("no parameter of the optimizer requires grad: there is nothing to update")
        return Slots(optimizer, RULES[type(optimizer)], group_of)

    def shape(self) -> tuple[Any, ...]:
        """Return what of the optimizer a program depends on: who is in which group, and what each group switches on.

        Not the numbers: a schedule may change them at every step.
        """
        keys = [k for k in self.optimizer.defaults if k != "lr"]
        groups = (tuple(_switch(g.get(k)) for k in keys) for g in self.optimizer.param_groups)
        members = tuple(tuple(id(p) for p in g["params"]) for g in self.optimizer.param_groups)
        return (*groups, members)

    @property
    def count(self) -> int:
        """How many parameter groups there are."""
        return len(self.optimizer.param_groups)

    def made_settings(self, group: int) -> dict[str, Any]:
        """Return a group's settings as profiling uses them: no parameters, one learning rate."""
        settings = {k: v for k, v in self.optimizer.param_groups[group].items() if k != "params"}
        return {**settings, **{k: v for k, v in _BARE.items() if k in settings}}

    def state_like(self, param: Tensor, group: int) -> dict[str, Tensor]:
        """Return tensors like those that the optimizer keeps for a parameter (fake for a fake one)."""
        like = {name: torch.empty_like(param) for name in self.rule.state_names(self.optimizer.param_groups[group])}
        return {**({"step": param.new_empty((), dtype=torch.float32)} if self.rule.counts else {}), **like}

    def states_of(self, names: Sequence[str], params: Mapping[str, Tensor]) -> list[tuple[Tensor, dict[str, Any]]]:
        """Return the named parameters, each with its state, empty where there is none yet.

        Raises:
            UnsupportedOptimizer: it is not of the parameter's shape and dtype.
        """
        groups = [self.rule.state_names(group) for group in self.optimizer.param_groups]
        found: list[tuple[Tensor, dict[str, Any]]] = []
        for name in names:
            param = params[name]
            keys = groups[self.group_of[id(param)]]
            state = self.optimizer.state.get(param) if keys else None
            if state:
                _check_state(state, keys, param, name)
            found.append((param, state or {}))
        return found


def _check_state(state: dict[str, Any], keys: Sequence[str], param: Tensor, name: str) -> None:
    for key in keys:
        value = state.get(key)
        if value is None and key == "momentum_buffer":
            continue  # SGD begins it at any step
        if not isinstance(value, Tensor) or value.shape != param.shape or value.dtype is not param.dtype:
            found = f"{value.dtype}{tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise UnsupportedOptimizer(
                f"the optimizer's state {key!r} of parameter {name!r} is {found}; the parameter is "
                f"{param.dtype}{tuple(param.shape)}. Load a state_dict that was saved for this model"
            )


def kept_parameters(model: nn.Module, keep_grads: bool | Collection[str]) -> frozenset[int]:
    """Return the ids of the parameters whose gradients the user wants to see after a step.

    Raises:
        UnsupportedOptimizer: a name that the model does not have.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    if isinstance(keep_grads, bool):
        return frozenset(id(p) for p in named.values()) if keep_grads else frozenset()
    unknown = [n for n in keep_grads if n not in named]
    if unknown:
        raise UnsupportedOptimizer(f"keep_grads names {unknown[0]!r}, which is no parameter of the model")
    return frozenset(id(named[n]) for n in keep_grads)


def check_hooks(model: nn.Module) -> None:
    """Raise UnsupportedOptimizer for parameters with gradient hooks, which a step without autograd cannot call."""
    for name, p in model.named_parameters():
        if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
            raise UnsupportedOptimizer(
                f"parameter {name!r} has a gradient hook, which a planned step does not call: remove it, and ask for "
                f"keep_grads=[{name!r}] to read the gradient after each step"
            )
    for name, module in model.named_modules():
        if getattr(module, "sparse", False) and isinstance(module, nn.Embedding | nn.EmbeddingBag):
            raise UnsupportedOptimizer(f"{name!r} gives sparse gradients, which are not planned: build it sparse=False")


def _switch(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    return value != 0 if isinstance(value, int | float) else type(value).__name__


def _check_class(optimizer: Any) -> None:
    if not isinstance(optimizer, Optimizer):
        raise UnsupportedOptimizer(f"expected a torch.optim optimizer, got {type(optimizer).__name__}")
    known = ", ".join(cls.__name__ for cls in RULES)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UnsupportedOptimizer(
            f"LBFGS evaluates the loss several times a step through a closure, which is not one program; use {known}"
        )
    if type(optimizer) not in RULES:
        raise UnsupportedOptimizer(
            f"optimizer {type(optimizer).__name__} cannot be planned; {known} can (not their subclasses). Others work "
            "beside graphplan.optimize"
        )
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise UnsupportedOptimizer("the optimizer has step hooks, which a planned step does not call: remove them")


def _check_group(k: int, group: dict[str, Any], optimizer: Optimizer) -> None:
    if group["differentiable"]:
        raise UnsupportedOptimizer(f"group {k} is differentiable=True: a planned step has no autograd tape")
    if group.get("capturable") and any(p.device.type == "cpu" for p in group["params"]):
        raise UnsupportedOptimizer(f"group {k} is capturable=True, which {type(optimizer).__name__} refuses on CPU")
