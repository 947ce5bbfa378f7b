"""The tests on a device beside the CPU, in processes of their own: torch counts its devices once,
and whatever else runs in a process with that device would find it."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys

import pytest
from torch.utils.cpp_extension import get_cxx_compiler

from tests.tree import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux" or shutil.which(shlex.split(get_cxx_compiler())[0]) is None,
        reason="the device is built with a C++ compiler, on Linux",
    ),
]


@pytest.mark.parametrize("file", ["programs.py", "runs.py"])
def test_on_a_device(file: str) -> None:
    command = [sys.executable, "-P", "-m", "pytest", "-q", "--tb=short", f"tests/device/{file}"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-8000:]
