"""A double of Flower's Grid in one process: the same ServerApp and ClientApp without Ray, for tests and statistics."""

from __future__ import annotations

import uuid
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from graphplan.federated.client import app as client_app
from graphplan.federated.config import RunConfig
from graphplan.federated.frontier import Frontier
from graphplan.federated.server import serve


class InProcessGrid(Grid):
    """Nodes 1000, 1001, ... answer in turn. Tests override `deliver` to make one misbehave.

    `TaskIdentity` is private to Flower (1.41, 1.42): messages cannot be made without it.
    """

    def __init__(self, config: RunConfig, app: ClientApp = client_app) -> None:
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
        self.app, self.config = app, config
        self.contexts = {1000 + i: self._context(i) for i in range(config.clients)}
        self.waiting: dict[str, list[Message]] = {}

    def _context(self, client: int) -> Context:
        node: dict[str, Any] = {"partition-id": client, "num-partitions": self.config.clients}
        return Context(1, 1000 + client, node, RecordDict(), dict(self.config.flower()))

    @property
    def run(self) -> Any:
        """No run behind this grid."""
        raise NotImplementedError

    def set_run(self, run: Any) -> None:
        """No run behind this grid."""

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Return all nodes."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Let each node answer at once."""
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
            self.waiting[message.metadata.message_id] = self.deliver(message)
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the answers to some messages."""
        return [reply for i in message_ids for reply in self.waiting.pop(i, [])]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push, and pull."""
        return self.pull_messages(self.push_messages(messages))

    def deliver(self, message: Message) -> list[Message]:
        """Return the node's replies; an exception of its app becomes an error reply, as in Flower's engines."""
        context = self.contexts[message.metadata.dst_node_id]
        try:
            return [self.app(message, context)]
        except Exception as e:  # noqa: BLE001 - what any app may raise
            return [Message(Error(code=0, reason=f"{type(e).__name__}: {e}"), reply_to=message)]


def run_in_process(
    config: RunConfig, grid: InProcessGrid | None = None, made: dict[Hashable, Frontier] | None = None
) -> dict[str, Any]:
    """Run `config` on the double and return the same report as `graphplan fl run --json`; `made` as in `serve`."""
    from graphplan.federated.report import Report

    report, threads = Report(config), torch.get_num_threads()
    torch.set_num_threads(1)  # as clients of Flower's engines have: sums over more differ in their last bits
    try:
        serve(grid or InProcessGrid(config), config, report.take, made)
    finally:
        torch.set_num_threads(threads)
    return report.json()
