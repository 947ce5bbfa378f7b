"""Open one `torch.save` file: scan it, check its names, then load it.

Formats: a zip with one `data.pkl`; before torch 1.6, five pickles in a row (magic number, protocol,
system, object, storage keys) with raw storages behind them.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from attnopt.compiler.errors import Problem
from attnopt.compiler.intake import allow
from attnopt.compiler.intake.archive import open_archive, read_entry
from attnopt.compiler.intake.scan import Scan, scan_pickle

_ZIP = b"PK\x03\x04"
_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # torch's legacy magic number as a LONG1
_LEGACY_PICKLES = 5
LOAD_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    AttributeError,
    ImportError,
    KeyError,
    IndexError,
    TypeError,
    ValueError,
    AssertionError,
    OSError,
)


def scan_stream(stream: BinaryIO, size: int, where: str) -> Scan:
    """Everything that the pickles of a torch file would import; nothing is executed.

    Raises `Problem` A103 (damaged), A104 (a misleading archive) or A106 (a plain pickle).
    """
    head = stream.read(len(_MAGIC) + 2)
    stream.seek(0)
    if head.startswith(_ZIP):
        return _scan_zip(stream, size, where)
    return _scan_legacy(stream, head, where)


def _scan_zip(stream: BinaryIO, size: int, where: str) -> Scan:
    found = Scan()
    with open_archive(stream, size, where) as archive:
        pickles = [name for name in archive.namelist() if name.endswith(".pkl")]
        if len(pickles) != 1:
            raise Problem(
                "A104", f"expected one pickle in the archive, found {len(pickles)}", where=where
            )
        found.update(scan_pickle(read_entry(archive, pickles[0], where), f"{where}:{pickles[0]}"))
    return found


def _scan_legacy(stream: BinaryIO, head: bytes, where: str) -> Scan:
    found = Scan()
    legacy = head[2:] == _MAGIC
    for _ in range(_LEGACY_PICKLES if legacy else 1):
        found.update(scan_pickle(stream, where))
    if legacy:
        return found
    refused = allow.check(found, tensors_only=True)[1]
    raise Problem(
        "A106",
        "a plain pickle, not a file that torch.save wrote",
        where=where,
        why="; ".join(f"it imports {item.path}: {item.why}" for item in refused),
        help="save the model with torch.save(model, path)",
    )


def load_checkpoint(
    path: Path,
    allow_globals: Sequence[str] = (),
    *,
    trust: bool = False,
    tensors_only: bool = False,
) -> Any:
    """The object in a `torch.save` file, on the CPU.

    Only the names that `allow.check` passes are restored, by torch's weights-only loader; `trust`
    opens the file with the full pickle instead. Raises `Problem` A102 (names refused), A103
    (damaged), A104, A106 or A107 (not loadable).
    """
    where = str(path)
    with path.open("rb") as stream:
        scan = scan_stream(stream, path.stat().st_size, where)
    if trust:
        allow.importable_here()
        return _load(path, where, weights_only=False)
    allowed, refused = allow.check(scan, allow_globals, tensors_only=tensors_only)
    if refused:
        raise allow.refusal(refused, where)
    with torch.serialization.safe_globals(list(allowed)):
        return _load(path, where, weights_only=True)


def _load(path: Path, where: str, *, weights_only: bool) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=weights_only)
    except LOAD_ERRORS as error:
        raise Problem(
            "A107",
            "torch could not load the file",
            where=where,
            why=first_line(error),
            help="save it again with the versions installed here"
            + (", or open it with --trust if you trust its maker" if weights_only else ""),
        ) from error


def scan_bytes(data: bytes, where: str) -> Scan:
    """`scan_stream` over bytes."""
    return scan_stream(io.BytesIO(data), len(data), where)


def first_line(error: BaseException) -> str:
    """The type and the first line of an error's message."""
    text = str(error).strip()
    message = text.partition("WeightsUnpickler error: ")[2] or text
    message = message.strip().split("\n")[0]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
