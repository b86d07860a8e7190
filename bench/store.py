"""Store training steps as Problems, so that solver work needs no torch. `python -m bench.store [NAMES]`.

Each is captured with its example inputs, profiled on this machine and lowered with the exact codecs; a step that
returns its own loss has 64 bytes outside. Random layered graphs come from `bench.layered`.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads

PROBLEMS = Path(__file__).parent / "problems"
NO_BUDGET = 1 << 50  # whoever reads the problem sets one


def store(name: str) -> str:
    """Write one problem and return a line about it."""
    import torch

    from bench.models import SOURCES
    from graphplan.capture import capture
    from graphplan.codecs import choose_codecs
    from graphplan.device import Device
    from graphplan.instructions import instructions_of
    from graphplan.lower import lower, outputs_bytes
    from graphplan.profile import profile

    torch.manual_seed(0)
    model, args, kwargs = SOURCES[name]()
    start = time.perf_counter()
    graph = capture(model, args, kwargs).graph
    instructions = instructions_of(graph, choose_codecs("exact"))
    captured = time.perf_counter()
    costs = profile(graph, instructions, Device.this())
    outside = max(64, 3 * outputs_bytes(graph))
    problem = lower(graph, instructions, costs, outside, 64, NO_BUDGET)
    (PROBLEMS / f"{name}.json").write_text(problem.to_json())
    profiled = time.perf_counter()
    nodes = len(graph.module.graph.nodes)
    return f"{name}: {nodes} nodes, capture {captured - start:.1f} s, profile {profiled - captured:.1f} s"


def main() -> None:
    from bench.layered import SIZES, layered
    from bench.models import SOURCES

    random = {f"layered{n}": n for n in SIZES}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    args = parser.parse_args()
    for name in args.names or [*SOURCES, *random]:
        if name in random:
            (PROBLEMS / f"{name}.json").write_text(layered(random[name], seed=0).with_budget(NO_BUDGET).to_json())
            print(name)
        else:
            print(store(name), flush=True)


if __name__ == "__main__":
    main()
