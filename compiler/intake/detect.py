"""Say what kind of file a path holds, from its bytes; suffixes lie."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path

from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.archive import open_archive

_ZIP = b"PK\x03\x04"
_LEGACY = b"\x80"  # the PROTO opcode: a pickle that is not in a zip
_WHOLE = (
    "save the whole module with torch.save(model, path), an exported program with "
    "torch.export.save or to ONNX, or give module.path:callable"
)


class Kind(Enum):
    """What a path holds."""

    TORCH_ZIP = "a torch.save archive"
    TORCH_LEGACY = "a torch.save file of the format before torch 1.6, or a plain pickle"
    EXPORT = "a torch.export.save archive"
    ONNX = "an ONNX model"
    HF = "a directory written by save_pretrained"


def detect(path: Path) -> Kind:
    """The kind of a file or directory. Raises `Problem` A101 (missing), A103, A104 or A106 (cannot
    be used).
    """
    if not path.exists():
        raise Problem(
            "A101",
            "there is no such file",
            where=str(path),
            help="give a file, a directory or module:callable",
        )
    if path.is_dir():
        return _directory(path)
    try:
        with path.open("rb") as stream:
            head = stream.read(4096)
    except OSError as error:
        raise Problem("A101", "the file cannot be read", where=str(path), why=str(error)) from error
    if not head:
        raise Problem(
            "A103", "the file is empty", where=str(path), help="download or save it again"
        )
    if head.startswith(_ZIP):
        return _archive(path)
    if head.startswith(_LEGACY):
        return Kind.TORCH_LEGACY
    if _is_onnx(head, path):
        return Kind.ONNX
    raise _stranger(path, head)


def _directory(path: Path) -> Kind:
    if (path / "config.json").is_file():
        return Kind.HF
    below = sorted(child.parent for child in path.glob("*/config.json"))
    raise Problem(
        "A106",
        "the directory holds no config.json",
        where=str(path),
        why="a directory is read as one that save_pretrained wrote",
        help=f"did you mean {below[0]}?" if below else "give the directory that holds config.json",
    )


def _archive(path: Path) -> Kind:
    with open_archive(path, path.stat().st_size, str(path)) as archive:
        names = archive.namelist()
    inner = {name.split("/", 1)[-1] for name in names}
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        raise Problem(
            "A106",
            "this is a TorchScript archive",
            where=str(path),
            why="TorchScript keeps compiled code and no modules, and torch no longer develops it",
            help=f"start from the Python model: {_WHOLE}",
        )
    if "archive_format" in inner or "serialized_exported_program.json" in inner:
        return Kind.EXPORT
    if "data.pkl" in inner:
        return Kind.TORCH_ZIP
    raise Problem(
        "A106",
        "a zip archive, but not one of torch's",
        where=str(path),
        why="it has no data.pkl and no archive_format",
        help=_WHOLE,
    )


def _stranger(path: Path, head: bytes) -> Problem:
    """The `Problem` A106 for a file that is no torch file, named as precisely as its first bytes
    allow.
    """
    if _is_safetensors(head, path.stat().st_size):
        what = "a safetensors file holds weights without a model"
        help = (
            "give the directory with its config.json, or module.path:callable that builds the model"
        )
    elif head.startswith(b"GGUF"):
        what, help = "this is a GGUF file, which cannot be read", _WHOLE
    elif head.startswith(b"\x89HDF"):
        what, help = "this is an HDF5 (Keras) file, which cannot be read", _WHOLE
    elif head.startswith(b"version https://git-lfs"):
        what, help = "this is a Git LFS pointer, not the file itself", "run git lfs pull"
    else:
        what, help = "this is no model file that can be read", _WHOLE
    return Problem("A106", what, where=str(path), help=help)


def _is_onnx(head: bytes, path: Path) -> bool:
    """The version of the format, field 1 of the message, comes first; a maker's name follows."""
    known = (b"onnx", b"pytorch", b"tf2", b"ai.", b"optimum")
    return head[:1] == b"\x08" and (path.suffix == ".onnx" or any(word in head for word in known))


def _is_safetensors(head: bytes, size: int) -> bool:
    """Eight bytes of header length, then a JSON object."""
    length = int.from_bytes(head[:8], "little")
    if not 2 <= length <= size - 8 or head[8:9] != b"{":
        return False
    if length + 8 > len(head):
        return b'"dtype"' in head or b"__metadata__" in head
    try:
        return isinstance(json.loads(head[8 : 8 + length]), dict)
    except ValueError:
        return False
