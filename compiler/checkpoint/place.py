"""The folder of a checkpoint: whether it may be written, and what is taken over from the
original."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from attnopt.compiler.errors import Problem
from attnopt.compiler.folder import building, check_writable, write
from attnopt.compiler.plan import Plan

# Weights in any format, code, and what tells of the original alone.
_LEFT = (
    ".safetensors", ".bin", ".pt", ".pth", ".pt2", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf",
    ".ot", ".data", ".py", ".md",
)  # fmt: skip
_LICENCE = ("LICENSE", "LICENCE", "NOTICE", "COPYING")
PLAN, _FILES = "plan.json", "files"
_OWN = ("config.json", PLAN, "report.json", "report.html")


def check_place(out: Path, source: Path) -> None:
    """Make sure, before any work, that a checkpoint may be written to `out`.

    Raises `Problem` A502 or A508 as other outputs do, and A523 for a folder that holds a run or is
    the original's.
    """
    target = out.resolve()
    why = ""
    if target == source.resolve() or target in source.resolve().parents:
        why = "it holds the original model"
    elif (target / "model.pt2").exists():
        why = "it holds a run, whose model would be lost"
    if why:
        raise Problem(
            "A523", f"the checkpoint cannot go to {out}", why=why,
            help="give --hf a new or empty folder",
        )  # fmt: skip
    check_writable(out)


@contextmanager
def beside(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, on the same disk, removed at the end; what a killed export left
    there goes with the next one.

    Raises `Problem` A502.
    """
    target = out.resolve()
    with ExitStack() as stack:
        with writing(out):
            target.parent.mkdir(parents=True, exist_ok=True)
            fresh = stack.enter_context(building(target))
        yield fresh


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Raise `Problem` A502 where the disk refuses what is written beside `out`."""
    try:
        yield
    except OSError as error:
        raise Problem(
            "A502", f"cannot write beside {out}", why=error.strerror or str(error),
            help="give another path to --hf, or make room",
        ) from error  # fmt: skip


def copy_files(source: Path, fresh: Path) -> None:
    """Copy the tokenizer, the settings for generating and the licence from the original's
    folder."""
    for path in source.iterdir():
        index = path.name.endswith(".index.json")
        left = path.suffix in _LEFT and not path.name.startswith(_LICENCE)
        if path.is_file() and not left and not index and path.name not in _OWN:
            shutil.copyfile(path, fresh / path.name)


def write_plan(plan: Plan, fresh: Path) -> None:
    """Write the plan, and beside its steps the names of all files of the checkpoint, so that the
    next export to the same place takes them away."""
    files = sorted({PLAN, *(path.name for path in fresh.iterdir())})
    told = {**plan.as_json(), _FILES: files}
    (fresh / PLAN).write_text(json.dumps(told, indent=1) + "\n")


def put(fresh: Path, out: Path) -> list[str]:
    """Move all files of a finished folder to `out` in one step; their names.

    The files of an earlier export go, and any weights: with another count of files they would be
    read too.
    """
    found = sorted(path for path in fresh.iterdir())
    stale = [path.name for path in out.glob("*.safetensors*")] if out.is_dir() else []
    write(out, {path.name: _moved(path) for path in found}, [*stale, *_earlier(out)])
    return [path.name for path in found]


def _earlier(out: Path) -> list[str]:
    """The files of the export that lies in `out`; none where there is none."""
    try:
        told = json.loads((out / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    files = told.get(_FILES) if isinstance(told, dict) else None
    return [name for name in files if isinstance(name, str)] if isinstance(files, list) else []


def _moved(path: Path) -> Callable[[Path], None]:
    def move(to: Path) -> None:
        path.rename(to)

    return move
