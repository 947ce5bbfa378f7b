"""The folder of a checkpoint: whether it may be written, and what is taken over from the
original."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from attnopt.compiler.errors import Problem
from attnopt.compiler.folder import check_writable, write

# Weights in any format, code, and what tells of the original alone.
_LEFT = (
    ".safetensors", ".bin", ".pt", ".pth", ".pt2", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf",
    ".ot", ".data", ".py", ".md",
)  # fmt: skip
_LICENCE = ("LICENSE", "LICENCE", "NOTICE", "COPYING")
_OWN = ("config.json", "plan.json", "report.json", "report.html")


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
    """A new folder beside `out`, on the same disk, removed at the end."""
    target = out.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.mkdtemp(prefix=f".{target.name}.checkpoint-", dir=target.parent)
    except OSError as error:
        raise Problem(
            "A502", f"cannot write beside {out}", why=error.strerror or str(error),
            help="give another path to --hf",
        ) from error  # fmt: skip
    try:
        yield Path(made)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def copy_files(source: Path, fresh: Path) -> None:
    """Copy the tokenizer, the settings for generating and the licence from the original's
    folder."""
    for path in source.iterdir():
        index = path.name.endswith(".index.json")
        left = path.suffix in _LEFT and not path.name.startswith(_LICENCE)
        if path.is_file() and not left and not index and path.name not in _OWN:
            shutil.copyfile(path, fresh / path.name)


def put(fresh: Path, out: Path) -> list[str]:
    """Move all files of a finished folder to `out` in one step; their names.

    Weights of an earlier export go: with another count of files they would be read too.
    """
    found = sorted(path for path in fresh.iterdir())
    stale = [path.name for path in out.glob("*.safetensors*")] if out.is_dir() else []
    write(out, {path.name: _moved(path) for path in found}, stale)
    return [path.name for path in found]


def _moved(path: Path) -> Callable[[Path], None]:
    def move(to: Path) -> None:
        path.rename(to)

    return move
