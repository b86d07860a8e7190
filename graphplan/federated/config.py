"""RunConfig: every option of a federated run, as Flower's run config carries them (numbers, text, booleans)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from graphplan.errors import GraphplanError


class FederatedError(GraphplanError, ValueError):
    """A federated run that cannot be started as asked; the message says what would work."""


@dataclass(frozen=True, slots=True)
class RunConfig:
    """One run. The defaults are also those of `[tool.flwr.app.config]` in pyproject.toml.

    `fleet` is the text of a fleet file ("": every node says its own budget); `device` the path of a saved
    graphplan.Device that all clients are like ("": each measures itself); `out` where the server writes its
    events; `cap` puts local training under RLIMIT_DATA; `codecs` is what hybrid plans may use ("": what
    the method says; "lossy" rounds); `step` plans whole steps, the update included; `forms` (hybrid methods) those in
    every form and on parts of the batch, for the least memory; `program` sends whole steps as programs, for clients
    that have not the model's source.
    """

    method: str = "fedhybrid"
    model: str = "models_zoo:resnet18"
    size: str = "small"
    data: str = "digits"
    partition: str = "dirichlet:0.1"
    clients: int = 8
    per_round: int = 4
    rounds: int = 3
    seed: int = 0
    fleet: str = ""
    batch: int = 16
    local_epochs: int = 1
    learning_rate: float = 0.05
    points: int = 16
    time_limit: float = 20.0
    cap: bool = False
    codecs: str = ""
    step: bool = False
    forms: bool = False
    program: bool = False
    device: str = ""
    timeout: float = 600.0
    out: str = ""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be meant."""
        for name in ("clients", "per_round", "rounds", "batch", "local_epochs", "points"):
            if getattr(self, name) < 1:
                raise FederatedError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.per_round > self.clients:
            raise FederatedError(f"per_round is {self.per_round}, but there are {self.clients} clients")
        if self.forms and self.program:
            raise FederatedError("programs are of a step's first form: leave forms away")
        if not self.learning_rate > 0:
            raise FederatedError(f"learning_rate is {self.learning_rate}; it must be positive")

    @staticmethod
    def of(values: Mapping[str, object]) -> RunConfig:
        """Read Flower's run config; keys it does not know are an error.

        Raises:
            FederatedError: an unknown key, or a value of another type.
        """
        types = {f.name: type(f.default) for f in fields(RunConfig)}
        read: dict[str, object] = {}
        for key, value in values.items():
            name = key.replace("-", "_")
            if name not in types:
                raise FederatedError(f"no run option {key!r}; there are {', '.join(types)}")
            wanted = types[name]
            if wanted is float and type(value) is int:
                value = float(value)
            if type(value) is not wanted:
                raise FederatedError(f"run option {key!r} is {value!r}, expected {wanted.__name__}")
            read[name] = value
        return RunConfig(**read)  # type: ignore[arg-type]

    @property
    def whole(self) -> bool:
        """Whether planned clients run whole steps."""
        return self.step or self.program

    def flower(self) -> dict[str, int | float | str | bool]:
        """Return the options under Flower's names (with hyphens)."""
        return {name.replace("_", "-"): value for name, value in asdict(self).items()}
