"""Promise 5: a step at a budget of 100 % against plain PyTorch's. `python -m bench.full resnet18 gpt --pairs 31`."""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads


def main() -> None:
    import torch

    import graphplan
    from bench.pairs import paired
    from models_zoo import MODELS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", choices=list(MODELS))
    parser.add_argument("--pairs", type=int, default=31)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    for name in args.names:
        torch.manual_seed(0)
        entry = MODELS[name]
        model = entry.build_small() if args.small else entry.build()
        example = entry.example_small() if args.small else entry.example()
        planned = graphplan.optimize(model, "100%", example.inputs, time_limit=5)

        def step(module: torch.nn.Module) -> None:
            entry.loss(module(*example.inputs), example.targets).backward()  # noqa: B023
            for p in module.parameters():
                p.grad = None

        print(f"{name}: planned / plain {paired(lambda: step(planned), lambda: step(model), args.pairs)}", flush=True)  # noqa: B023


if __name__ == "__main__":
    main()
