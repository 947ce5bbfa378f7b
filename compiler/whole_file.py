"""Write one file whole or not at all: it is built beside its place and moved there in one step."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from attnopt.compiler.errors import Problem


def write_whole(path: Path, text: str) -> None:
    """Make `path` hold exactly this text, in UTF-8; its folder has to be there.

    Raises `Problem` A502 when it cannot be written; what was there is then untouched.
    """
    check_place(path)
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as fresh:
            try:
                fresh.write(text)
                fresh.flush()
                os.fsync(fresh.fileno())
                os.chmod(fresh.name, _mode(path))
                Path(fresh.name).replace(path)
            except BaseException:
                Path(fresh.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise _refused(path, error.strerror or str(error)) from error


def check_place(path: Path) -> None:
    """Make sure, before any work starts, that a file can be written there.

    Raises `Problem` A502.
    """
    if path.is_dir():
        raise _refused(path, "it is a folder")
    if not path.absolute().parent.is_dir():
        raise _refused(path, f"there is no folder {path.parent}")


def _mode(path: Path) -> int:
    """The permissions of the file that is replaced, or those of a new one."""
    if path.is_file():
        return path.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _refused(path: Path, why: str) -> Problem:
    return Problem("A502", f"cannot write {path}", why=why, help="give another path")
