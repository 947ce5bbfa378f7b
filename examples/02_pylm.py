"""A search under an accuracy bound: the project's own small language model at 1,024 tokens.

`examples/models/pylm` holds its weights, its tokenizer, a text to fit rewrites on and another one
to measure on. It is stored in float16 and converted to float32 here, baselines included, because
many CPUs compute float16 slowly and that alone would meet any budget. Approximate rewrites may cost
at most 1% of perplexity, and are tried until the budget is met or the time is over. Exit code 2
says that the budget was not met: the best plan is saved all the same, with the smallest relaxation
of the demands that would be met.

    python examples/02_pylm.py [options of `optimize`, e.g. --timeout 20m]
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from attnopt.cli.main import optimizer, run

MODEL = Path(__file__).resolve().parent / "models" / "pylm"
OUT = Path("attnopt-out/pylm")


def arguments(extra: Sequence[str] = ()) -> list[str]:
    """The command line of the example; `extra` goes last, where it wins."""
    sizes = ["--dtype", "float32", "--batch", "1", "--length", "1024"]
    demands = ["--budget", "1.5x", "--max-drop", "1%", "--timeout", "5m"]
    return [str(MODEL), *sizes, *demands, "--out", str(OUT), *extra]


def main(extra: Sequence[str] = ()) -> int:
    """Run the search; returns the exit code of `optimize`."""
    line = arguments(extra)
    print(f"$ optimize {shlex.join(line)}", file=sys.stderr)
    return run(optimizer, "optimize", line)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
