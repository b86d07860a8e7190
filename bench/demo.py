"""Run the demo and put what it prints into the README. `python -m bench.demo --write README.md`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from bench.page import write_between


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="Markdown file whose block is replaced")
    args = parser.parse_args()
    command = [sys.executable, "-c", "from graphplan.cli import main; main()", "demo", "--table"]
    start = time.perf_counter()
    done = subprocess.run(command, env={**os.environ, "COLUMNS": "100"}, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    text = f"$ make demo   # {seconds:.0f} s after the install\n{done.stdout.rstrip()}"
    print(text, done.stderr)
    if done.returncode != 0:
        raise SystemExit(done.returncode)
    if args.write:
        write_between(args.write, "demo output", f"```text\n{text}\n```")


if __name__ == "__main__":
    main()
