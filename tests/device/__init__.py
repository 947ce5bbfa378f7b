"""A device beside the CPU, on any machine: what a GPU would refuse, tensors of two devices in one
kernel, it refuses too.

`tests/test_on_a_device.py` runs the files here: `pytest tests/device/programs.py` is one of them.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch.utils import cpp_extension

NAME = "twin"


class _Module(ModuleType):
    """What torch asks of a device's Python module."""

    @staticmethod
    def is_available() -> bool:
        return True

    is_initialized = is_available

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def synchronize(device: object = None) -> None:
        return None

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        return None

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16]


@cache
def twin() -> str:
    """The name of the device, built and registered in this process."""
    torch.ops.load_library(str(_built()))
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _Module(NAME))
    torch.utils.generate_methods_for_privateuse1_backend()
    return NAME


def _built() -> Path:
    source = Path(__file__).with_name("twin.cpp")
    command = [
        *shlex.split(cpp_extension.get_cxx_compiler()), "-O1", "-std=c++20", "-fPIC", "-shared",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-I{path}" for path in cpp_extension.include_paths()), str(source),
    ]  # fmt: skip
    links = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-lc10", "-ltorch_cpu"]
    about = "\n".join((torch.__version__, *command, source.read_text(encoding="utf-8")))
    root = Path(cpp_extension.get_default_build_root()) / "attnopt"
    made = root / f"twin-{hashlib.sha256(about.encode()).hexdigest()[:24]}.so"
    if not made.exists():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as work:
            out = Path(work) / made.name
            subprocess.run([*command, "-o", str(out), *links], check=True)
            os.replace(out, made)
    return made
