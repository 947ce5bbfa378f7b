"""Running code in a process that can compile kernels: one that runs triton's interpreter, as other
tests do, cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from tests.tree import ROOT


def compiling(code: str, *arguments: object, **environment: str) -> Any:
    """What the code leaves in `told`, as JSON data. It is run from the repository's root."""
    left_out = ("TRITON_INTERPRET", "PYTHONPATH")
    kept = {key: value for key, value in os.environ.items() if key not in left_out}
    script = f"import json, sys\n{code}\njson.dump(told, sys.__stdout__)\n"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT,
        env={**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)
