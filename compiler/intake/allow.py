"""Which names a model's pickle may import: torch's own, and the module and configuration classes of
known libraries.

A class of a known library may be instantiated without a call of its constructor, which is how
`torch.save` writes modules; it may not be called, and no function of a library may be imported at
all. A module is imported for this check only when it belongs to a library on the list below.
"""

from __future__ import annotations

import enum
import importlib
import os
import sys
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._weights_only_unpickler import _get_allowed_globals

from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.scan import Global, Scan

KNOWN_LIBRARIES = (
    "diffusers",
    "einops",
    "open_clip",
    "rotary_embedding_torch",
    "sentence_transformers",
    "timm",
    "torchvision",
    "transformers",
    "vit_pytorch",
    "x_transformers",
)
_TORCH_MODULES = ("torch.nn.modules.", "torch.nn.utils.parametri")
# Pure functions that torch's own layers keep as attributes (`TransformerEncoderLayer.activation`
# and the like).
_ACTIVATIONS = frozenset(
    [f"torch.nn.functional.{name}" for name in ("relu", "gelu", "silu", "mish", "elu", "softmax")]
    + [f"torch._C._nn.{name}" for name in ("gelu", "silu", "scaled_dot_product_attention")]
)
_PLAIN_TYPES = frozenset(
    ["collections.deque", "types.SimpleNamespace"]
    + [f"builtins.{name}" for name in ("bool", "bytes", "dict", "float", "frozenset", "int")]
    + [f"builtins.{name}" for name in ("list", "object", "range", "slice", "str", "tuple")]
)


_COMMANDS = frozenset(
    ["os", "posix", "nt", "subprocess", "pty", "runpy", "socket", "shutil", "ctypes", "importlib"]
    + [f"builtins.{name}" for name in ("eval", "exec", "compile", "open", "getattr", "__import__")]
)
_COMMANDS_SAY = "can run any command"


@dataclass(frozen=True)
class Refused:
    """A name that stays out, and why."""

    path: str
    why: str


def torch_default(path: str) -> bool:
    """Whether torch's own weights-only loader knows the name: tensors, storages, dtypes, plain
    containers.
    """
    return path in _get_allowed_globals()


def importable_here() -> None:
    """Make modules of the current directory importable, as `python -m` does; for names that the
    user typed.
    """
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)


def check(
    scan: Scan, allow_globals: Sequence[str] = (), *, tensors_only: bool = False
) -> tuple[list[tuple[Any, str]], list[Refused]]:
    """Sort the names of a scan into those to hand to `torch.serialization.safe_globals` and those
    refused.

    With `tensors_only`, library classes are refused too: right for weights and inputs, which hold
    no modules.
    """
    allowed: list[tuple[Any, str]] = []
    refused: list[Refused] = []
    for item in sorted(scan.globals):
        if torch_default(item.path):
            continue
        if item.path in allow_globals:
            allowed.append((_named_by_user(item.path), item.path))
            continue
        found = _judge(item) if not tensors_only else Refused(item.path, "not a tensor")
        if item.path in _COMMANDS or item.module in _COMMANDS:
            found = Refused(item.path, f"{_COMMANDS_SAY} ({_spelled(item)})")
        if not isinstance(found, Refused) and item in scan.called and not _may_be_called(found):
            found = Refused(item.path, "the file calls it, and only values may be restored")
        if isinstance(found, Refused):
            refused.append(found)
        else:
            allowed.append((found, item.path))
    return allowed, refused


def _spelled(item: Global) -> str:
    """The name as it is written in Python: os.system is pickled as posix.system."""
    return f"os.{item.name}" if item.module in ("posix", "nt") else item.path


def refusal(refused: Iterable[Refused], where: str) -> Problem:
    """The `Problem` A102 that lists the refused names, and the flags that would let them in."""
    items = list(refused)
    flags = " ".join(f"--allow-global {item.path}" for item in items if "<" not in item.path)
    hidden = len(flags.split("--")) - 1 < len(items)
    return Problem(
        "A102",
        "refused to open the file: it imports " + ", ".join(item.path for item in items),
        where=where,
        why="; ".join(f"{item.path}: {item.why}" for item in items),
        help=(f"if you know these names: {flags}; " if flags and not hidden else "")
        + "if you trust the whole file and whoever made it: --trust",
    )


def _named_by_user(path: str) -> Any:
    """Import what `--allow-global` names. Raises `Problem` A105 where there is no such thing."""
    importable_here()
    parts = path.split(".")
    for split in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:split])
        try:
            value: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name and not (module_name + ".").startswith(error.name + "."):
                raise Problem(
                    "A105", f"--allow-global {path}: importing {module_name} failed", why=str(error)
                ) from error
            continue
        for name in parts[split:]:
            value = getattr(value, name, None)
        if value is not None:
            return value
    raise Problem(
        "A105",
        f"--allow-global {path}: there is no such name here",
        help="run from the folder that holds the module, or install the package",
    )


def _judge(item: Global) -> Any:
    """The object that the name stands for when it may be restored, else `Refused`."""
    if item.path in _ACTIVATIONS or item.path in _PLAIN_TYPES:
        return _attribute(importlib.import_module(item.module), item)
    if f"{item.module}.".startswith(_TORCH_MODULES):
        return _module_class(importlib.import_module(item.module), item)
    root = item.module.split(".")[0]
    if root not in KNOWN_LIBRARIES:
        return Refused(item.path, f"{root or 'this'} is not a library that is known to be safe")
    if not all(part.isidentifier() and not part.startswith("__") for part in item.path.split(".")):
        return Refused(item.path, "not a plain name")
    try:
        module = importlib.import_module(item.module)
    except ImportError as error:
        return Refused(item.path, f"{root} does not import here ({error})")
    return _module_class(module, item)


def _attribute(module: Any, item: Global) -> Any:
    value = module
    for name in item.name.split("."):
        value = getattr(value, name, None)
    return Refused(item.path, "no such name in this version") if value is None else value


def _module_class(module: Any, item: Global) -> Any:
    """The class, when it is one that models are made of and its own library defines it."""
    value = _attribute(module, item)
    if isinstance(value, Refused):
        return value
    if not isinstance(value, type):
        return Refused(item.path, "a function, not a class of a module or a configuration")
    if value.__module__.split(".")[0] != item.module.split(".")[0]:
        return Refused(item.path, f"borrowed from {value.__module__}")
    if issubclass(value, (nn.Module, nn.Parameter, torch.Size, OrderedDict, enum.Enum)):
        return value
    if _is_configuration(value):
        return value
    return Refused(item.path, "neither a module nor a configuration")


def _is_configuration(value: type) -> bool:
    """A class of plain settings: it, or one it derives from, is called a configuration by its
    library.
    """
    return any(base.__name__.endswith(("Config", "Configuration")) for base in value.__mro__)


def _may_be_called(value: Any) -> bool:
    """Members of an enumeration and plain containers are restored by calling their class."""
    if isinstance(value, type) and issubclass(value, enum.Enum):
        return True
    return (
        f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}" in _PLAIN_TYPES
    )
