"""PlannedStrategy: Flower's Strategy for every method. It asks, selects, plans, checks replies, averages, counts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from logging import INFO
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from graphplan.device import Device
from graphplan.federated.config import FederatedError, RunConfig
from graphplan.federated.fleet import DeviceClass, Member, draw, read_fleet
from graphplan.federated.method import Method
from graphplan.federated.plans import Planner
from graphplan.federated.replies import Sorted, sort_replies
from graphplan.federated.selection import Candidate
from graphplan.plan import Plan

ALONE = Member(DeviceClass("real", 1.0, (1.0, 1.0), 1.0, float("inf"), float("inf")), 0.0)
Emit = Callable[[dict[str, Any]], None]


@dataclass(slots=True)
class Client:
    """What the server knows of one client, and what it last did."""

    node: int
    client: int
    budget_bytes: int
    budget_source: str
    examples: int
    labels: tuple[int, ...]
    device_class: str
    planned_peak_bytes: int | None = None
    measured_peak_bytes: int | None = None
    rounds: int = 0
    last: dict[str, Any] = field(default_factory=dict)


class PlannedStrategy(Strategy):
    """One run of one method. `emit` receives one dict a round; `fleet_bytes` is the whole model's unplanned peak."""

    def __init__(self, config: RunConfig, method: Method, planner: Planner, width: float, fleet_bytes: int, emit: Emit):
        self.config, self.method, self.planner, self.emit = config, method, planner, emit
        self.width, self.fleet_bytes = width, fleet_bytes
        self.selector = method.selector(config.seed)
        self.aggregator = method.aggregator()
        self.members = draw(read_fleet(config.fleet), config.clients, config.seed) if config.fleet else ()
        self.clients: dict[int, Client] = {}  # by node
        self.asked: dict[int, Candidate] = {}
        self.arrays = ArrayRecord()
        self.row: dict[str, Any] = {}
        self.started = time.monotonic()
        parameters = sum(p.numel() * p.element_size() for p in planner.task.model.parameters())
        self.reserved_bytes = parameters if method.proximal_mu else 0  # the proximal term's copy

    # -- who is there -------------------------------------------------------------------------------------------

    def meet(self, grid: Grid) -> None:
        """Ask every node that is not known yet what it is; forget those that have left."""
        nodes = set(grid.get_node_ids())
        for gone in self.clients.keys() - nodes:
            del self.clients[gone]
        for client in ask_facts(grid, sorted(nodes - self.clients.keys()), self.fleet_bytes, self.config, self.planner):
            for old in [n for n, c in self.clients.items() if c.client == client.client]:
                del self.clients[old]  # the same client, back under another node id
            self.clients[client.node] = client

    def plans_of(self, client: Client) -> tuple[Plan, ...]:
        """Return the plan for a client's budget, then spares; empty: it cannot train."""
        return self.planner.for_budget(client.device_class, client.budget_bytes - self.reserved_bytes)

    def unfit(self) -> list[Client]:
        """Return the clients that have data and no memory for any plan of this method."""
        return [c for c in self.clients.values() if c.examples and not self.plans_of(c)]

    def tell_unfit(self, grid: Grid) -> None:
        """Tell each client that cannot take part, and what it would need."""
        messages = []
        for client in self.unfit():
            needed = self.planner.frontier(client.device_class).plans[0]
            least = needed.peak_bytes if self.method.execution.planned else needed.baseline_peak_bytes
            note = ConfigRecord({"needed-bytes": least + self.reserved_bytes, "budget-bytes": client.budget_bytes})
            messages.append(Message(RecordDict({"config": note}), client.node, f"{MessageType.QUERY}.refusal"))
        if messages and not self.method.asks_unfit:
            list(grid.send_and_receive(messages, timeout=self.config.timeout))

    # -- a round ------------------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Select clients, and send each its plan with the weights."""
        self.aggregator.configure_train(server_round, arrays, config, grid)  # it keeps what it needs of the weights
        self.started = time.monotonic()
        if server_round > 1:
            self.meet(grid)
        self.arrays = arrays
        able = [c for c in self.clients.values() if c.examples and (self.method.asks_unfit or self.plans_of(c))]
        by_client = {c.client: c for c in able}
        candidates = [self._candidate(c) for c in able]
        chosen = self.selector.choose(server_round, candidates, self.config.per_round)
        known = {c.client: c for c in candidates}
        self.asked = {by_client[i].node: known[i] for i in chosen}
        packed = {i: self._packed(by_client[i]) for i in chosen}
        sent = self._array_bytes() * len(chosen) + sum(len(p) for p in packed.values())
        barred = 0 if self.method.asks_unfit else len(self.unfit())
        self.row = {"round": server_round, "asked": len(chosen), "bytes_down": sent, "barred": barred}
        return [self._message(server_round, by_client[i], packed[i]) for i in chosen]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average what may be averaged, in the order of clients: the sum is then the same on every engine."""
        found = sort_replies(replies, server_round, self.asked, self.arrays)
        for node in self.asked.keys() - found.accepted.keys() - found.refused.keys() - found.failed.keys():
            found.failed[node] = "no reply"
        self._note(server_round, found)
        accepted = sorted(found.accepted.items(), key=lambda item: self.clients[item[0]].client)
        if not accepted:
            return None, None
        arrays, metrics = self.aggregator.aggregate_train(server_round, [reply for _, reply in accepted])
        return (None if arrays is None else _typed_like(arrays, self.arrays)), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nobody: the server evaluates."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing to average."""
        return None

    def summary(self) -> None:
        """Log what runs."""
        log(INFO, "\t├──> method %s, %d clients known", self.method.name, len(self.clients))

    def finish_round(self, server_round: int, accuracy: float, loss: float) -> None:
        """Emit the round's row, its accuracy and loss on the test images among it."""
        if server_round == 0:
            self.row = {"round": 0, "asked": 0}
        self.row.update(accuracy=accuracy, loss=loss, wall_seconds=round(time.monotonic() - self.started, 3))
        self.emit({"event": "round", **self.row})

    # -- its parts ----------------------------------------------------------------------------------------------

    def _array_bytes(self) -> int:
        return sum(len(a.data) for a in self.arrays.values())

    def _packed(self, client: Client) -> bytes:
        if not self.method.execution.planned:
            return b""
        return self.planner.packed(client.device_class, client.budget_bytes - self.reserved_bytes)

    def _candidate(self, client: Client) -> Candidate:
        unplanned = self.planner.unplanned(client.device_class)
        plans = self.plans_of(client)
        planned = self.method.execution.planned and plans
        step_ns = plans[0].cost_ns if planned else unplanned.baseline_cost_ns
        member = self.members[client.client] if self.members else ALONE
        steps = self.config.local_epochs * -(-client.examples // self.config.batch)
        one_way = self._array_bytes()
        return Candidate(
            client.client,
            client.examples,
            client.labels,
            client.budget_bytes / unplanned.baseline_peak_bytes,
            member.seconds(steps, step_ns, one_way, one_way),
            step_ns / 1e9 / member.of.speed,
        )

    def _message(self, server_round: int, client: Client, plans: bytes) -> Message:
        told = ConfigRecord(
            {
                "server-round": server_round,
                "plans": plans,
                "unplanned-bytes": self.planner.unplanned(client.device_class).baseline_peak_bytes,
                "fleet-bytes": self.fleet_bytes,
                "reserved-bytes": self.reserved_bytes,
                "threads": self.planner.threads(client.device_class),
                "proximal-mu": self.method.proximal_mu,
                "width": self.width,
            }
        )
        content = RecordDict({"arrays": self.arrays, "config": told})
        return Message(content, client.node, MessageType.TRAIN, group_id=str(server_round))

    def _note(self, server_round: int, found: Sorted) -> None:
        """Count the round, and remember what each client did."""
        up, seconds, here = 0, 0.0, 0
        for node, reply in found.accepted.items():
            client, metrics = self.clients[node], reply.content.metric_records["metrics"]
            report = reply.content.config_records["report"]
            values = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
            client.planned_peak_bytes = int(values["planned-peak-bytes"])
            client.measured_peak_bytes = int(values["measured-peak-bytes"])
            client.rounds += 1
            client.last = {k.replace("-", "_"): v for k, v in values.items()}
            client.budget_bytes = _budget_of(report.get("budget"), client.budget_bytes)
            here += bool(report.get("reason"))
            self.selector.observe(server_round, client.client, float(values["squared-loss"]))
            up += self._array_bytes()
            seconds = max(seconds, self.asked[node].seconds)
        self.row.update(
            simulated_seconds=seconds,
            bytes_up=up,
            taking_part=len(found.accepted),
            refused_for_memory=len(found.refused) + self.row.pop("barred"),
            failed=len(found.failed),
            planned_on_client=here,
            clients=sorted(self.clients[n].client for n in found.accepted),
            messages=[
                *(f"client {self.clients[n].client} refused: {why}" for n, why in sorted(found.refused.items())),
                *(f"client {self.clients[n].client} failed: {why}" for n, why in sorted(found.failed.items())),
                *found.ignored,
            ],
        )


def ask_facts(grid: Grid, nodes: Sequence[int], fleet_bytes: int, config: RunConfig, planner: Planner) -> list[Client]:
    """Ask nodes what they are; one that does not answer properly is left out until it is asked again."""
    content = RecordDict({"config": ConfigRecord({"unplanned-bytes": fleet_bytes})})
    messages = [Message(content, node, MessageType.QUERY) for node in nodes]
    found = []
    for reply in grid.send_and_receive(messages, timeout=config.timeout) if messages else ():
        if reply.has_error():
            log(INFO, "node %d cannot say what it is: %s", reply.metadata.src_node_id, reply.error.reason)
            continue
        try:
            facts = json.loads(str(reply.content.config_records["facts"]["facts"]))
            device = facts.pop("device")
            if device:
                planner.devices.setdefault(str(facts["device_class"]), Device.from_json(device))
            facts["labels"] = tuple(int(n) for n in facts["labels"])
            found.append(Client(node=reply.metadata.src_node_id, **facts))
        except (KeyError, TypeError, ValueError) as e:
            log(INFO, "node %d gave no usable facts: %s", reply.metadata.src_node_id, e)
    return found


def _typed_like(arrays: ArrayRecord, like: ArrayRecord) -> ArrayRecord:
    """Return the averages in the model's own types: a mean of whole numbers is no whole number."""
    return ArrayRecord({k: Array(np.asarray(a.numpy().astype(like[k].dtype))) for k, a in arrays.items()})


def _budget_of(value: object, before: int) -> int:
    return value if isinstance(value, int) and value > 0 else before


def wait_for_nodes(grid: Grid, count: int, timeout: float) -> None:
    """Wait until `count` nodes are connected.

    Raises:
        FederatedError: they are not after `timeout` seconds.
    """
    end = time.monotonic() + timeout
    while (here := len(list(grid.get_node_ids()))) < count:
        if time.monotonic() > end:
            missing = f"{here} of {count} clients have connected after {timeout:.0f} s"
            raise FederatedError(f"{missing} (flwr run takes --federation-config num-supernodes={count})")
        time.sleep(0.5)
