"""Where and with what a number was measured: recorded beside every measurement."""

from __future__ import annotations

import datetime
import os
import platform
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import attnopt

_ISA = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "bf16", "sve")


def environment() -> dict[str, Any]:
    """Device, threads and versions as a JSON object; `load` is the load average before."""
    facts: dict[str, Any] = {
        "cpu": _cpu()[0],
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "isa": _cpu()[1],
        "torch": torch.__version__,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "attnopt": attnopt.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if hasattr(os, "getloadavg"):
        facts["load"] = round(os.getloadavg()[0], 2)
    if torch.cuda.is_available():
        facts["cuda"] = torch.version.cuda or torch.version.hip
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@lru_cache(maxsize=1)
def _cpu() -> tuple[str, list[str]]:
    """The processor's name and which of the instruction sets that matter here it has."""
    listed = Path("/proc/cpuinfo")
    if not listed.is_file():
        return platform.processor() or platform.machine(), []
    facts: dict[str, str] = {}
    for line in listed.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip().lower(), value.strip())
    flags = set((facts.get("flags") or facts.get("features") or "").split())
    name = facts.get("model name") or platform.processor() or platform.machine()
    return name, [flag for flag in _ISA if flag in flags]
