"""Replace a folder of results in one step, so that a kill at any moment leaves the old folder or
the new one, whole.

The new folder is built beside the old one and synced to disk; then the two names are exchanged by
one system call (`renameat2` with `RENAME_EXCHANGE`, Linux). Where that call is missing, two renames
do it and `recover` finishes what a kill between them left. Everything in the old folder that is not
an output is carried over as hard links, so the journal in `.work/` keeps its identity: a process
that holds it open writes on into the new folder. Needs no torch.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from attnopt.compiler.errors import Problem

WORK = ".work"
OUTPUTS = (
    "model.pt2",
    "plan.json",
    "report.json",
    "report.md",
    "report.html",
    "calibration.pt",
)
Content = bytes | Path | Callable[[Path], None]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)
_NO_LINK = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)


def write(folder: str | Path, files: Mapping[str, Content], stale: Collection[str] = ()) -> Path:
    """Make `folder` hold exactly these outputs, and whatever else it held that is neither an output
    nor among the `stale` names.

    A value is the bytes, a file to copy, or a function that writes the file at the path it is
    given. Returns the folder's real path. Raises `Problem` A502 when the disk refuses; the old
    folder is then untouched.
    """
    target = _real(folder)
    recover(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        with building(target) as fresh:
            for name, content in files.items():
                _put(fresh / name, content)
            _carry(target, fresh, leave_out={*OUTPUTS, *files, *stale})
            _sync(fresh)
            _swap(fresh, target)
    except OSError as error:
        raise _unwritable(target, error) from error
    return target


def recover(folder: str | Path) -> None:
    """Finish a replacement that was killed between its two renames. Does nothing when there is
    nothing to finish.
    """
    target = _real(folder)
    old = _old(target)
    if not old.exists():
        return
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        return
    try:
        os.rename(old, target)
    except OSError as error:
        raise _unwritable(target, error) from error


def check_writable(folder: str | Path) -> Path:
    """Make sure, before any work starts, that `write` will be able to replace `folder`. Returns its
    real path.

    Raises `Problem` A502 when it cannot be written, and A508 when it holds files that are not
    results of attnopt.
    """
    target = _real(folder)
    recover(target)
    if target.exists() and not target.is_dir():
        raise Problem(
            "A502", f"the output folder {folder} is a file", help="give another path to --out"
        )
    _check_place(target)
    if target.is_dir() and not is_ours(target):
        raise Problem(
            "A508",
            f"the folder {folder} holds files that are not results of attnopt",
            why="replacing it could destroy them",
            help="give --out a new or empty folder",
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for place in (target.parent, target):
            if place.is_dir():
                with tempfile.TemporaryDirectory(prefix=_prefix(target), dir=place):
                    pass
    except OSError as error:
        raise _unwritable(target, error) from error
    return target


def is_ours(folder: Path) -> bool:
    """Whether a folder is empty or was written by attnopt (it holds `.work/`, a plan or a report of
    its format, or the manifest of emitted kernels).
    """
    names = {path.name for path in folder.iterdir()}
    if not names or (folder / WORK).is_dir():
        return True
    marks = {"plan.json": "steps", "report.json": "schema", "manifest.json": "attnopt"}
    return any(_holds(folder / name, key) for name, key in marks.items())


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """A fresh sibling of the folder `target`, removed at the end, and locked while its maker lives,
    so that `write` can tell what a killed one left from work in progress.

    Raises OSError where it cannot be made.
    """
    fresh = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
    os.chmod(fresh, 0o777 & ~_umask())
    handle = _lock(fresh)
    try:
        yield fresh
    finally:
        shutil.rmtree(fresh, ignore_errors=True)  # after the exchange this is the old folder
        if handle is not None:
            os.close(handle)


def work_folder(folder: str | Path) -> Path:
    """`folder/.work`, made when missing: where a running search keeps its journal. It survives
    every `write`.
    """
    target = check_writable(folder) / WORK
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(target, error) from error
    return target


def _real(folder: str | Path) -> Path:
    """Through symbolic links, so that the link stays and what it points at is replaced."""
    return Path(os.path.realpath(folder))


def _prefix(target: Path) -> str:
    return f".{target.name}.attnopt-"


def _old(target: Path) -> Path:
    return target.parent / f".{target.name}.attnopt.old"


def _unwritable(target: Path, error: OSError) -> Problem:
    why = error.strerror or str(error)
    at = f" ({error.filename})" if error.filename else ""
    return Problem(
        "A502",
        f"cannot write the output folder {target}",
        why=why + at,
        help="free space on that disk"
        if error.errno == errno.ENOSPC
        else "give another path to --out",
    )


def _check_place(target: Path) -> None:
    if target.is_dir() and os.path.ismount(target):
        raise Problem(
            "A502",
            f"the output folder {target} is a mount point, which cannot be replaced in one step",
            help=f"give --out a folder below it, such as {target / 'attnopt'}",
        )
    here = Path.cwd()
    if target == here or target in here.parents:
        raise Problem(
            "A502",
            "the output folder is the folder you are in, and would be replaced under you",
            where=str(target),
            help="give --out a folder of its own, such as attnopt-out",
        )


def _holds(path: Path, key: str) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and key in found


def _sweep(target: Path) -> None:
    """Remove what killed writers of this folder left beside it."""
    for leftover in target.parent.glob(f"{_prefix(target)}*"):
        handle = _lock(leftover) if leftover.is_dir() else None
        if handle is not None:
            shutil.rmtree(leftover, ignore_errors=True)
            os.close(handle)


def _lock(folder: Path) -> int | None:
    """A handle that holds the folder's lock; None when another process holds it, or without
    locks.
    """
    if os.name != "posix":
        return None  # leftovers of killed writers then stay until they are removed by hand
    import fcntl

    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _put(path: Path, content: Content) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, Path):
        shutil.copyfile(content, path)
    else:
        content(path)


def _carry(old: Path, fresh: Path, leave_out: set[str]) -> None:
    if not old.is_dir():
        return
    for path in old.iterdir():
        if path.name not in leave_out:
            _link(path, fresh / path.name)


def _link(source: Path, copy: Path) -> None:
    if source.is_symlink():
        os.symlink(os.readlink(source), copy)
        return
    if source.is_dir():
        copy.mkdir()
        for child in source.iterdir():
            _link(child, copy / child.name)
        return
    try:
        os.link(source, copy)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        shutil.copy2(source, copy)


def _sync(folder: Path) -> None:
    """Force files and folders to disk: a power cut after the exchange must not leave empty
    files.
    """
    for root, _, names in os.walk(folder):
        for name in names:
            _sync_one(Path(root) / name)
        _sync_one(Path(root))


def _sync_one(path: Path) -> None:
    if path.is_symlink() or (path.is_dir() and os.name == "nt"):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.EACCES):
            raise
    finally:
        os.close(handle)


def _swap(fresh: Path, target: Path) -> None:
    if not target.exists():
        os.rename(fresh, target)
    elif not _exchange(fresh, target):
        old = _old(target)
        os.rename(target, old)
        try:
            os.rename(fresh, target)
        except OSError:
            os.rename(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    _sync_one(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    call = (
        getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if os.name == "posix"
        else None
    )
    if call is None:
        return False
    done = call(
        ctypes.c_int(_AT_FDCWD),
        ctypes.c_char_p(os.fsencode(one)),
        ctypes.c_int(_AT_FDCWD),
        ctypes.c_char_p(os.fsencode(other)),
        ctypes.c_uint(_RENAME_EXCHANGE),
    )
    if done == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
