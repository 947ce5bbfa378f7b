"""Running emitted modules where attnopt cannot be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_SECONDS = 600  # for all modules
_CODE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "attnopt":
            raise ModuleNotFoundError(f"no module named {name}", name=name)

sys.meta_path.insert(0, Absent())
import importlib, pathlib, torch, traceback

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty then holds NaN
folder = pathlib.Path(sys.argv[1])
sys.path.insert(0, str(folder))
outputs = {}
for name, (public, inputs) in torch.load(folder / "inputs.pt").items():
    try:
        outputs[name] = getattr(importlib.import_module(name), public)(**inputs)
    except Exception:  # whatever it is, it is told, and the other modules run
        outputs[name] = traceback.format_exc()
assert not any(name.partition(".")[0] == "attnopt" for name in sys.modules)
torch.save(outputs, folder / "outputs.pt")
"""


def run_bare(
    folder: Path, calls: Mapping[str, tuple[str, Mapping[str, Any]]], interpret: bool = True
) -> dict[str, Any]:
    """What the modules of the folder give, in triton's interpreter or on the device of the inputs:
    for each its public function and the inputs. A function that fails gives its traceback; where
    the process does, or takes too long, RuntimeError is raised."""
    torch.save(dict(calls), folder / "inputs.pt")
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    try:
        run = subprocess.run(
            [sys.executable, "-I", "-W", "ignore", "-c", _CODE, str(folder)],
            capture_output=True, text=True, cwd=folder, timeout=_SECONDS,
            env={**kept, "TRITON_INTERPRET": str(int(interpret)), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(str(error)) from error
    if run.returncode:
        raise RuntimeError(run.stderr[-3000:])
    found: dict[str, Any] = torch.load(folder / "outputs.pt")
    return found
