"""replies: what came back from a round, sorted into what may be averaged, what was refused, and what failed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord

MOST_EXAMPLES = 1 << 40


@dataclass(slots=True)
class Sorted:
    """Replies by node. `failed` says why; a node that never answered is in none of the three."""

    accepted: dict[int, Message] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)  # late, repeated or unasked replies


def sort_replies(replies: Iterable[Message], server_round: int, asked: Iterable[int], like: ArrayRecord) -> Sorted:
    """Check every reply: asked for, of this round, the first of its node, finite weights of the model's shapes."""
    found, wanted = Sorted(), set(asked)
    shapes = {key: (tuple(a.shape), a.dtype) for key, a in like.items()}
    for reply in replies:
        node = reply.metadata.src_node_id
        if node not in wanted:
            found.ignored.append(f"node {node} replied unasked")
        elif reply.has_error():
            if node not in found.accepted:
                found.failed.setdefault(node, _last_line(reply.error.reason or ""))
        elif node in found.accepted or node in found.refused:
            found.ignored.append(f"node {node} replied twice")
        elif (outcome := _outcome(reply)) == "refused":
            found.refused[node] = str(reply.content.config_records["report"].get("reason", ""))
        elif outcome != "trained":
            found.failed[node] = "the reply has no outcome"
        elif (late := _round_of(reply)) != server_round:
            found.ignored.append(f"node {node} replied for round {late} in round {server_round}")
        elif fault := _fault(reply, shapes):
            found.failed[node] = fault
        else:
            found.failed.pop(node, None)
            found.accepted[node] = reply
    return found


def _outcome(reply: Message) -> object:
    record = reply.content.config_records.get("report")
    return None if record is None else record.get("outcome")


def _round_of(reply: Message) -> object:
    record = reply.content.metric_records.get("metrics")
    return None if record is None else record.get("server-round")


def _fault(reply: Message, shapes: Mapping[str, tuple[tuple[int, ...], str]]) -> str:
    """Return what is wrong with the arrays or metrics, "" where nothing is."""
    content = reply.content
    if list(content.array_records) != ["arrays"] or list(content.metric_records) != ["metrics"]:
        return "expected one record of arrays and one of metrics"
    arrays = content.array_records["arrays"]
    got = {key: (tuple(a.shape), a.dtype) for key, a in arrays.items()}
    if got != shapes:
        return "weights of other names, shapes or types than the model's"
    if any(a.stype != "numpy.ndarray" for a in arrays.values()):
        return "weights in a format that is not numpy's"
    if not all(np.isfinite(a.numpy()).all() for a in arrays.values()):
        return "weights that are not finite"
    return _metric_fault(content.metric_records["metrics"])


def _metric_fault(metrics: MetricRecord) -> str:
    count = metrics.get("num-examples")
    if not isinstance(count, int) or not 0 < count < MOST_EXAMPLES:
        return f"num-examples is {count!r}"
    for key, value in metrics.items():
        if isinstance(value, list) or not math.isfinite(value):
            return f"metric {key} is {value!r}"
    return ""


def _last_line(text: str) -> str:
    lines = [s for s in text.splitlines() if s.strip()]
    return lines[-1].strip() if lines else "no reason given"
