"""Look at a zip archive's directory before anything is unpacked: bombs, overlaps, duplicates,
cut-off files.

torch stores its archives uncompressed, so an entry that grows much on unpacking is no checkpoint.
The checks also make sure that every reader of the file sees the same entries: one directory, at the
very end, with nothing hidden around it.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

from attnopt.compiler.errors import Problem

MAX_ENTRIES = 500_000
MAX_GROWTH = 10  # uncompressed bytes per byte of the file
FREE_GROWTH = 1 << 20  # bytes of text that may compress as well as it likes
_END_RECORD = 22  # bytes of a zip's end record without a comment


def open_archive(source: Path | BinaryIO, size: int, where: str) -> zipfile.ZipFile:
    """Open a zip of `size` bytes after checking its directory.

    Raises `Problem` A103 for a damaged archive and A104 for one that is made to mislead or to
    exhaust memory.
    """
    try:
        _check_end(source, size)
        archive = zipfile.ZipFile(source)
    # zipfile raises NotImplementedError for a directory of a later version
    except (zipfile.BadZipFile, struct.error, ValueError, EOFError, NotImplementedError) as error:
        raise Problem(
            "A103",
            "the archive is damaged or cut short",
            where=where,
            why=str(error),
            help="download or save the file again",
        ) from error
    why = _suspicion(archive, size)
    if why:
        archive.close()
        raise Problem("A104", "refused to unpack the archive", where=where, why=why)
    return archive


def _check_end(source: Path | BinaryIO, size: int) -> None:
    """Raise BadZipFile unless the last bytes are the end record.

    A cut archive may still hold the directory of an archive inside it, which would be found.
    """
    stream = source.open("rb") if isinstance(source, Path) else source
    try:
        stream.seek(max(size - _END_RECORD, 0))
        end = stream.read(_END_RECORD)
        stream.seek(0)
    finally:
        if stream is not source:
            stream.close()
    if not end.startswith(b"PK\x05\x06"):
        raise zipfile.BadZipFile("it does not end with its directory: cut short, or extended")


def read_entry(archive: zipfile.ZipFile, name: str, where: str) -> bytes:
    """The bytes of one entry. Raises `Problem` A103 where its checksum or its length is wrong."""
    try:
        return archive.read(name)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise Problem(
            "A103",
            f"entry {name} of the archive is damaged",
            where=where,
            why=str(error),
            help="download or save the file again",
        ) from error


def _suspicion(archive: zipfile.ZipFile, size: int) -> str:
    """Why the archive should not be unpacked, or an empty string."""
    entries = archive.infolist()
    if not entries:
        return "the archive is empty"
    if len(entries) > MAX_ENTRIES:
        return f"{len(entries)} entries; a model has fewer than {MAX_ENTRIES}"
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > max(MAX_GROWTH * size, FREE_GROWTH):
        return f"zip bomb: {size} bytes would unpack to {unpacked} bytes"
    names = [entry.filename for entry in entries]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        return f"two entries share the name {twice}"
    if any(entry.flag_bits & 1 for entry in entries):
        return "entries are encrypted"
    return _layout(archive)


def _layout(archive: zipfile.ZipFile) -> str:
    """Why the entries do not lie in a row before the one directory, or an empty string."""
    ordered = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    if ordered[0].header_offset != 0:
        return "bytes are hidden in front of the first entry"
    ends = [entry.header_offset for entry in ordered[1:]] + [archive.start_dir]
    for entry, end in zip(ordered, ends, strict=True):
        if entry.header_offset + entry.compress_size > end:
            return f"entry {entry.filename} overlaps its neighbour"
    return ""
