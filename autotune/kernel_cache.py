"""Tuned tile sizes, kept from run to run: one JSON file for each kernel, spec and bucket of sizes.

A file's name is a digest of all that the result depends on: the kernel's linked source, the spec,
the bucket, the target, the device with its driver, and the versions of triton and torch. Several
processes may write at once, each file whole. What is read is checked again; a file that is damaged,
or no longer right, is told once and written anew by the next tuning.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnopt.autotune import record
from attnopt.autotune.kernel_device import Device
from attnopt.autotune.kernel_tuner import Tuned, spec_text, tiles_of, tune, versions
from attnopt.codegen.kernel import Kernel, Load
from attnopt.codegen.link import link
from attnopt.codegen.shipped import bucket
from attnopt.codegen.static_score import SPILLS
from attnopt.codegen.target import Target
from attnopt.compiler.errors import Notice, Problem
from attnopt.compiler.whole_file import write_whole

FOLDER = "ATTNOPT_CACHE"
"""The environment variable that names another folder for what is kept."""
_FORMAT = 1


class KernelCache:
    """Tuned results in a folder, the platform's cache folder where none is given."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = (folder or cache_folder()) / "kernels"

    def path(
        self, cls: type[Kernel[Any]], spec: Any, load: Load, target: Target, device: Device | None
    ) -> Path:
        """The file for a kernel at these sizes, whether or not it is there."""
        facts = json.dumps(key(cls, spec, load, target, device), sort_keys=True)
        return self.folder / f"{cls.name}-{hashlib.sha256(facts.encode()).hexdigest()[:32]}.json"

    def get(
        self,
        cls: type[Kernel[Any]],
        spec: Any,
        load: Load,
        target: Target,
        device: Device | None = None,
    ) -> Tuned | None:
        """What is kept for a kernel at these sizes, None where nothing is or it is not in order."""
        path = self.path(cls, spec, load, target, device)
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            if facts.pop("format") != _FORMAT:
                raise ValueError("it is of another format")
            kept = record.read(Tuned, facts)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, AttributeError, TypeError, Problem) as error:
            why = error.what if isinstance(error, Problem) else f"{type(error).__name__}: {error}"
            _ignored(path, why)
            return None
        stale = _stale(kept, cls, spec, target)
        if stale:
            _ignored(path, stale)
            return None
        return kept

    def put(
        self,
        tuned: Tuned,
        cls: type[Kernel[Any]],
        spec: Any,
        target: Target,
        device: Device | None = None,
    ) -> Path:
        """Keep a result; gives its file. Raises `Problem` A502 where it cannot be written."""
        path = self.path(cls, spec, tuned.load, target, device)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Problem(
                "A502", f"cannot make the folder {path.parent}", why=error.strerror or str(error),
                help=f"name another folder in the environment variable {FOLDER}",
            ) from error  # fmt: skip
        content = {"format": _FORMAT, **record.dump(tuned)}
        write_whole(path, json.dumps(content, indent=1) + "\n")
        return path

    def tuned(
        self,
        cls: type[Kernel[Any]],
        spec: Any,
        load: Load,
        target: Target,
        device: Device | None = None,
        **options: Any,
    ) -> Tuned:
        """What is kept, or else what `tune` comes to with these options, which is then kept."""
        kept = self.get(cls, spec, load, target, device)
        if kept is not None:
            return kept
        made = tune(cls, spec, load, target, device, **options)
        self.put(made, cls, spec, target, device)
        return made


def kernel_of(tuned: Tuned, cls: type[Kernel[Any]], spec: Any, target: Target) -> Kernel[Any]:
    """The kernel with the tile sizes of a result."""
    return dataclasses.replace(cls.default(spec, target, tuned.load), **tuned.tiles)


def key(
    cls: type[Kernel[Any]], spec: Any, load: Load, target: Target, device: Device | None
) -> dict[str, Any]:
    """All that a result depends on."""
    return {
        "kernel": cls.name,
        "source": source_digest(cls),
        "spec": spec_text(spec),
        "bucket": dataclasses.asdict(bucket(load)),
        "default": tiles_of(cls.default(spec, target, load)),
        "target": target.name,
        "device": device.name if device is not None else "",
        "driver": device.driver if device is not None else "",
        **versions(),
    }


def source_digest(cls: type[Kernel[Any]]) -> str:
    """The SHA-256 of the launcher and all it reaches; of its module where it cannot be linked."""
    try:
        linked = link([cls.launcher])
        text = f"{linked.imports}\n{linked.definitions}"
    except (ValueError, ImportError, OSError, TypeError):
        text = Path(str(sys.modules[cls.__module__].__file__)).read_text(encoding="utf-8")
    return hashlib.sha256(text.encode()).hexdigest()


def cache_folder() -> Path:
    """Where attnopt keeps what it can make again: `ATTNOPT_CACHE`, else the platform's folder."""
    if os.environ.get(FOLDER):
        return Path(os.environ[FOLDER])
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "attnopt"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/attnopt"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnopt"


def _stale(kept: Tuned, cls: type[Kernel[Any]], spec: Any, target: Target) -> str:
    """Why what is kept is not right any more, empty where it is."""
    space = cls.space()
    if (kept.kernel, kept.spec, kept.target) != (cls.name, spec_text(spec), target.name):
        return "it is about something else"
    if set(kept.tiles) != set(space):
        return f"its tile sizes are {', '.join(kept.tiles)}, the kernel's {', '.join(space)}"
    for name, value in kept.tiles.items():
        if value not in space[name]:
            return f"{name} cannot be {value!r} any more"
    missed = cls.supports(spec, target)
    if missed is not None:
        return missed.reason
    return next(filter(None, (_too_much(took, target) for took in kept.took)), "")


def _too_much(took: Mapping[str, Any], target: Target) -> str:
    if took.get("shared", 0) > target.shared_per_block:
        return f"it takes {took['shared']} bytes of shared memory of {target.shared_per_block}"
    return f"it spills {took['spills']} bytes" if took.get("spills", 0) > SPILLS else ""


def _ignored(path: Path, why: str) -> None:
    notice = Notice(
        "A839", "kept tile sizes are ignored", str(path), why, "the next tuning writes them anew"
    )
    warnings.warn(str(notice), RuntimeWarning, stacklevel=3)
