"""Promise 5: a step at a budget of 100 % against plain PyTorch's. `python -m bench.full resnet18 gpt --seconds 90`.

Each round runs planned, plain and plain again: the second ratio, of the same thing twice, says what the machine's
noise alone does. `middle` is the ratio of the two sums of medians, which a few disturbed steps move least.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads
LEAST, MOST = 9, 201  # rounds


def main() -> None:
    import statistics

    import torch

    import graphplan
    from bench.page import write_between
    from bench.pairs import Ratio, rounds
    from models_zoo import MODELS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--seconds", type=float, default=90.0, help="for each model")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--write", type=Path, help="Markdown file whose block is replaced")
    args = parser.parse_args()
    lines = []
    for name in args.names or MODELS:
        torch.manual_seed(0)
        entry = MODELS[name]
        model = entry.build_small() if args.small else entry.build()
        example = entry.example_small() if args.small else entry.example()
        planned = graphplan.optimize(model, "100%", example.inputs, time_limit=5)

        def step(module: torch.nn.Module) -> None:
            entry.loss(module(*example.inputs), example.targets).backward()  # noqa: B023
            for p in module.parameters():
                p.grad = None

        calls = (lambda: step(planned), lambda: step(model), lambda: step(model))  # noqa: B023
        once = sum(rounds(calls, 1)[0]) / 1e9
        times = rounds(calls, min(MOST, max(LEAST, int(args.seconds / once))))
        ours, plain, again = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = Ratio.of([2 * a / (b + c) for a, b, c in times])
        noise = Ratio.of([c / b for _, b, c in times])
        middle = f"middle {2 * ours / (plain + again):.3f}"
        lines.append(f"{name}: planned / plain {ratio}, {middle}; plain / plain {noise}; {len(times)} rounds")
        print(lines[-1], flush=True)
    if args.write:
        write_between(args.write, "full budget", "```text\n" + "\n".join(lines) + "\n```")


if __name__ == "__main__":
    main()
