"""Tile sizes that were tuned on this very device, by its user: files in a cache folder.

`attnopt.autotune` writes them, `python -m attnopt.autotune.kernels` among others; dispatch takes
them before what ships. They hold for the device that they were timed on, by its name, for its
driver, for the version of triton, and for as long as the kernel's source stays as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from attnopt.codegen.kernel import Kernel, Load
from attnopt.codegen.link import link
from attnopt.codegen.shipped import Entry
from attnopt.codegen.target import Target
from attnopt.compiler.errors import Notice

FOLDER = "ATTNOPT_CACHE"
"""The environment variable that names another folder for what is kept."""
FORMAT = 1


def cache_folder() -> Path:
    """Where attnopt keeps what it can make again: `ATTNOPT_CACHE`, else the platform's folder."""
    if os.environ.get(FOLDER):
        return Path(os.environ[FOLDER])
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "attnopt"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/attnopt"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnopt"


def own_entries(cls: type[Kernel[Any]], target: Target, device: str) -> tuple[Entry, ...]:
    """What was measured of a kernel on the device of this name and fits the target, the newest
    first; read once in a process, and again after `forget`."""
    return _read(cache_folder() / "kernels", cls, target.shared_per_block, device)


def forget() -> None:
    """Read the files again when they are next asked for."""
    _read.cache_clear()


def source_digest(cls: type[Kernel[Any]]) -> str:
    """The SHA-256 of the launcher and all it reaches; of its module where it cannot be linked."""
    try:
        linked = link([cls.launcher])
        text = f"{linked.imports}\n{linked.definitions}"
    except (ValueError, ImportError, OSError, TypeError):
        text = Path(str(sys.modules[cls.__module__].__file__)).read_text(encoding="utf-8")
    return hashlib.sha256(text.encode()).hexdigest()


def versions() -> dict[str, str]:
    """The versions that compiled code depends on."""
    import triton

    return {"triton": str(triton.__version__), "torch": str(torch.__version__)}


@lru_cache(maxsize=1)
def driver() -> str:
    """The version of the driver of the GPUs that torch uses, or of its runtime where that does not
    tell."""
    amd = torch.version.hip is not None
    path = Path("/sys/module/amdgpu/version" if amd else "/proc/driver/nvidia/version")
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found = re.search(r"\d+(\.\d+)+", text)
    return found.group() if found else str(torch.version.hip or torch.version.cuda or "")


def misfit(cls: type[Kernel[Any]], tiles: Mapping[str, Any], took: Any, shared: int) -> str:
    """Why tile sizes that took so much are not possible (any more), empty where they are."""
    space = cls.space()
    if set(tiles) != set(space):
        return f"its tile sizes are {', '.join(tiles)}, the kernel's {', '.join(space)}"
    for name, value in tiles.items():
        if value not in space[name]:
            return f"{name} cannot be {value!r} any more"
    for each in took:
        if each.get("shared", 0) > shared:
            return f"it takes {each['shared']} bytes of shared memory of {shared}"
        if each.get("spills", 0):
            return f"it spills {each['spills']} bytes"
    return ""


def ignored(path: Path, why: str) -> None:
    """Tell that a file is not believed."""
    notice = Notice(
        "A839", "kept tile sizes are ignored", str(path), why, "the next tuning writes them anew"
    )
    warnings.warn(str(notice), RuntimeWarning, stacklevel=4)


@lru_cache(maxsize=256)
def _read(folder: Path, cls: type[Kernel[Any]], shared: int, device: str) -> tuple[Entry, ...]:
    found: list[tuple[str, Entry]] = []
    for path in sorted(folder.glob(f"{cls.name}-*.json")):
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            if not _of_here(facts, cls, device):
                continue
            entry = Entry(
                cls.name, facts["tiles"], facts["spec"], facts["kind"], Load(**facts["load"]),
                facts["evidence"], facts["why"], {"device": device},
            )  # fmt: skip
            why, date = misfit(cls, entry.tiles, facts["took"], shared), str(facts["date"])
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"
        if why:
            ignored(path, why)
        else:
            found.append((date, entry))
    return tuple(entry for _, entry in sorted(found, key=lambda item: item[0], reverse=True))


def _of_here(facts: Any, cls: type[Kernel[Any]], device: str) -> bool:
    """Whether a file is about this kernel as it is, timed on the device of this name with the
    driver that is here."""
    return (
        facts["format"] == FORMAT and facts["evidence"] == "measured"
        and (facts["kernel"], facts["device"], facts["driver"]) == (cls.name, device, driver())
        and facts["versions"]["triton"] == versions()["triton"]
        and facts.get("source") == source_digest(cls)
    )  # fmt: skip
