"""`one_token` on what a small CPU has: in a process of its own whose libraries keep to AVX2 (torch,
oneDNN, MKL, and so the operators, which are compiled as torch was told). There torch has no product
of bfloat16 to attend with.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.run import Row

ROOT = Path(__file__).parents[1]
LIMITS = {
    "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}  # fmt: skip


def rows() -> list[Row]:
    """The rows of `one_token` there."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.run", "--only", "one_token", "--out", folder]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **LIMITS}, stdout=subprocess.DEVNULL
        )
        made = Path(folder) / "cpu-one_token.json"
        if not made.is_file():
            return [Row("one_token with AVX2", f"it ended with {done.returncode}", met=False)]
        document = json.loads(made.read_text(encoding="utf-8"))
    if document["environment"]["torch_isa"] != "AVX2":
        return [Row("one_token with AVX2", "torch does not keep to AVX2 here", met=False)]
    return [Row(**{**row, "case": f"AVX2, {row['case']}"}) for row in document["rows"]]
