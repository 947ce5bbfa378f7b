"""Tuned tile sizes, kept from run to run: one JSON file for each kernel, spec and bucket of sizes.
What was measured is read at dispatch too (`attnopt.codegen.own_tiles`).

A file's name is a digest of all that the result depends on: the kernel's linked source, the spec,
the bucket, the target, the device with its driver, and the versions of triton and torch. Several
processes may write at once, each file whole. What is read is checked again; a file that is damaged,
or no longer right, is told once and written anew by the next tuning.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from attnopt.autotune import record
from attnopt.autotune.kernel_device import Device
from attnopt.autotune.kernel_tuner import Tuned, spec_text, tiles_of, tune
from attnopt.codegen.kernel import Kernel, Load
from attnopt.codegen.own_tiles import (
    FOLDER,
    FORMAT,
    cache_folder,
    forget,
    ignored,
    misfit,
    source_digest,
    versions,
)
from attnopt.codegen.shipped import bucket, kind
from attnopt.codegen.target import Target
from attnopt.compiler.errors import Problem
from attnopt.compiler.whole_file import write_whole

_BESIDE = ("kind", "source")


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
            if facts.pop("format") != FORMAT:
                raise ValueError("it is of another format")
            facts = {key: value for key, value in facts.items() if key not in _BESIDE}
            kept = record.read(Tuned, facts)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, AttributeError, TypeError, Problem) as error:
            why = error.what if isinstance(error, Problem) else f"{type(error).__name__}: {error}"
            ignored(path, why)
            return None
        stale = _stale(kept, cls, spec, target)
        if stale:
            ignored(path, stale)
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
        beside = {"kind": kind(spec), "source": source_digest(cls)}  # what dispatch asks for
        content = {"format": FORMAT, **beside, **record.dump(tuned)}
        write_whole(path, json.dumps(content, indent=1) + "\n")
        forget()
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


def _stale(kept: Tuned, cls: type[Kernel[Any]], spec: Any, target: Target) -> str:
    """Why what is kept is not right any more, empty where it is."""
    if (kept.kernel, kept.spec, kept.target) != (cls.name, spec_text(spec), target.name):
        return "it is about something else"
    impossible = misfit(cls, kept.tiles, kept.took, target.shared_per_block)
    if impossible:
        return impossible
    missed = cls.supports(spec, target)
    return "" if missed is None else missed.reason
