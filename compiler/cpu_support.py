"""What this CPU multiplies natively: which half precisions have matrix instructions."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")
_NATIVE = {  # any one of these flags means that products of this dtype have instructions
    torch.bfloat16: frozenset({"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16", "svebf16"}),
    torch.float16: frozenset({"avx512_fp16", "amx_fp16", "fphp", "asimdhp"}),
}
_TORCH = {  # torch's own probes, by the flag they stand for; not every version has every one
    "_is_avx512_bf16_supported": "avx512_bf16",
    "_is_amx_tile_supported": "amx_bf16",
    "_is_amx_fp16_supported": "amx_fp16",
}


@lru_cache(maxsize=1)
def cpu_flags() -> frozenset[str]:
    """The instruction-set flags of this CPU: those of the kernel's list and those that torch
    finds."""
    found: set[str] = set()
    if CPUINFO.exists():
        for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith(("flags", "features")):
                found.update(line.partition(":")[2].split())
                break
    for probe, flag in _TORCH.items():
        if getattr(torch.cpu, probe, bool)():
            found.add(flag)
    return frozenset(found)


def native_products(dtype: torch.dtype, flags: frozenset[str]) -> str:
    """The flag by which a CPU multiplies this dtype natively; empty when it has none.

    float32 and wider need no flag.
    """
    if dtype not in _NATIVE:
        return str(dtype).removeprefix("torch.")
    return next(iter(sorted(_NATIVE[dtype] & flags)), "")
