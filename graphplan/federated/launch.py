"""launch: `flwr run` with the switches that keep it offline and quiet, on a SuperLink of its own; real federations.

Everything lives in one scratch folder (Flower's home, the app, the events), and every process started here is taken
down by its id.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

import graphplan
from graphplan.errors import GraphplanError
from graphplan.federated.config import RunConfig
from graphplan.federated.report import Report

OFFLINE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # what is installed here runs, torch above all
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",  # seconds until a message's process is started: Flower's own is 1
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # clients share this machine's cores
START_SECONDS = 120.0
STOP_SECONDS = 15.0
POLL_SECONDS = 0.2
CONNECTION = "graphplan"
OnEvent = Callable[[dict[str, Any]], None]


class LaunchError(GraphplanError, RuntimeError):
    """Flower did not start or did not finish; the message ends with what it said last."""


def run_simulation(config: RunConfig, on_event: OnEvent) -> Report:
    """Run `config` with `flwr run` on Flower's simulation engine; `on_event` sees every event as it comes.

    Raises:
        LaunchError: Flower cannot be started or fails.
    """
    actors = max(1, min(os.cpu_count() or 1, config.per_round))
    federation = f"num-supernodes={config.clients} client-resources-num-cpus=1 init-args-num-cpus={actors}"
    with workplace(config) as place:
        place.start_superlink("--simulation")
        return place.run(("--federation-config", federation), on_event)


def run_deployment(config: RunConfig, budgets: Sequence[str], on_event: OnEvent) -> Report:
    """Run `config` on a SuperLink and one SuperNode for each of `budgets`, separate processes on loopback.

    Raises:
        LaunchError: Flower cannot be started or fails.
    """
    with workplace(replace(config, clients=len(budgets))) as place:
        place.start_superlink()
        for index, budget in enumerate(budgets):
            place.start_supernode(index, len(budgets), budget)
        return place.run((), on_event)


@dataclass(slots=True)
class _Workplace:
    """A scratch folder, the processes started for it, and where the SuperLink listens."""

    folder: Path
    config: RunConfig
    port: int
    stack: contextlib.ExitStack

    @property
    def events(self) -> Path:
        return self.folder / "events.jsonl"

    def start_superlink(self, *more: str) -> None:
        """Start it and wait until it answers."""
        process = self.start("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(self.port), *more)
        end = time.monotonic() + START_SECONDS
        while not _healthy(self.port):
            if process.poll() is not None or time.monotonic() > end:
                raise LaunchError(f"flower-superlink did not come up: {self.tail('flower-superlink')}")
            time.sleep(POLL_SECONDS)

    def start_supernode(self, index: int, count: int, budget: str) -> subprocess.Popen[bytes]:
        """Start one with its own budget."""
        node = f'partition-id={index} num-partitions={count} memory-budget="{budget}"'
        return self.start(
            "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{self.port}",
            "--port", str(free_port()), "--node-config", node, log=f"flower-supernode-{index}",
        )  # fmt: skip

    def start(self, command: str, *arguments: str, log: str = "") -> subprocess.Popen[bytes]:
        """Start one of Flower's programs in a session of its own; it is stopped with the workplace."""
        program = Path(sys.executable).parent / command
        if not program.exists():
            raise LaunchError(f"{program} is not there: pip install 'graphplan[federated]'")
        with (self.folder / f"{log or command}.log").open("wb") as out:
            process = subprocess.Popen(
                [program, *arguments], stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                cwd=self.folder, env=self.environment(), start_new_session=True,
            )  # fmt: skip
        self.stack.callback(stop, process)
        return process

    def environment(self) -> dict[str, str]:
        """Return the environment of Flower's processes: theirs finds our programs and this graphplan."""
        here = str(Path(graphplan.__file__).parent.parent)
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        python = os.pathsep.join(p for p in (here, os.environ.get("PYTHONPATH", "")) if p)
        ours = {**OFFLINE, "FLWR_HOME": str(self.folder), "PATH": path, "PYTHONPATH": python}
        return {**THREADS, **os.environ, **ours}

    def run(self, options: Sequence[str], on_event: OnEvent) -> Report:
        """Submit the app and follow it to its end."""
        report = Report(self.config)
        arguments = (str(self.folder / "app"), CONNECTION, "--run-config", str(self.folder / "run.toml"), "--stream")
        process = self.start("flwr", "run", *arguments, *options, log="flwr-run")
        read = 0
        while True:
            over = process.poll() is not None
            read = self._read_events(read, report, on_event)
            if report.ended or report.error is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_SECONDS)  # Flower and Ray end by themselves
                return report
            if over:
                raise LaunchError(f"flwr run ended ({process.returncode}) before the run did: {self.tail('flwr-run')}")
            time.sleep(POLL_SECONDS)

    def _read_events(self, position: int, report: Report, on_event: OnEvent) -> int:
        """Take the whole lines that were added; return how far was read."""
        if not self.events.exists():
            return position
        with self.events.open() as file:
            file.seek(position)
            while (line := file.readline()).endswith("\n"):
                event = json.loads(line)
                report.take(event)
                on_event(event)
                position = file.tell()
        return position

    def tail(self, log: str, lines: int = 12) -> str:
        """Return the last lines of a log."""
        path = self.folder / f"{log}.log"
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else "(no log)"


@contextlib.contextmanager
def workplace(config: RunConfig) -> Iterator[_Workplace]:
    """Yield a scratch folder that holds the app and the run's options; stop all that was started on leaving."""
    with tempfile.TemporaryDirectory(prefix="graphplan-fl-") as name, contextlib.ExitStack() as stack:
        folder, port = Path(name), free_port()
        place = _Workplace(folder, replace(config, out=str(folder / "events.jsonl")), port, stack)
        (folder / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
            f'address = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        write_app(folder / "app")
        (folder / "run.toml").write_text(_toml(place.config.flower()))
        yield place


def write_app(folder: Path) -> None:
    """Write the Flower app as a folder for `flwr run`: a pyproject.toml that names the installed graphplan's apps."""
    folder.mkdir()
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "graphplan-app"\n'
        f'version = "{graphplan.__version__}"\n'
        'description = "Federated clients execute memory plans"\nlicense = "Apache-2.0"\ndependencies = []\n\n'
        '[tool.flwr.app]\npublisher = "graphplan"\n\n[tool.flwr.app.components]\n'
        'serverapp = "graphplan.federated.server:app"\nclientapp = "graphplan.federated.client:app"\n\n'
        f"[tool.flwr.app.config]\n{_toml(RunConfig().flower())}"
    )


def _toml(values: dict[str, Any]) -> str:
    # JSON's strings, numbers and booleans are TOML's too.
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


def free_port() -> int:
    """Return a port of loopback that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to stop; then end its session, whose id is its own, and what it started in other sessions."""
    family: list[Any] = []
    if process.poll() is None:
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()
