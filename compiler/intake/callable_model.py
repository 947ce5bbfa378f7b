"""Read `module.path:callable`: the user's own code, found from the current directory, builds the
model.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

from torch import nn

from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.allow import importable_here
from attnopt.compiler.intake.inputs import Batch, as_batch

_PATTERN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def is_callable_path(source: str) -> bool:
    """Whether the text has the form `module.path:callable`."""
    return _PATTERN.fullmatch(source) is not None


def load_callable(source: str) -> tuple[nn.Module, Batch | None]:
    """Call it, and return the module in eval mode with the inputs, where it gave any.

    It may return a module or `(module, inputs)`. Errors inside the user's function are left as they
    are. Raises `Problem` A112 where the name is not found or the result is something else.
    """
    module_path, _, name = source.partition(":")
    importable_here()
    try:
        value: Any = importlib.import_module(module_path)
    except ModuleNotFoundError as error:
        if error.name and not f"{module_path}.".startswith(f"{error.name}."):
            raise Problem(
                "A112", f"importing {module_path} failed", where=source, why=str(error)
            ) from error
        raise Problem(
            "A112",
            f"there is no module {module_path}",
            where=source,
            help="run from the folder that holds it, or install its package",
        ) from error
    for part in name.split("."):
        if not hasattr(value, part):
            raise Problem("A112", f"{module_path} has no {name}", where=source)
        value = getattr(value, part)
    if isinstance(value, nn.Module):
        return value.eval(), None
    if not callable(value):
        raise Problem("A112", f"{name} is a {type(value).__name__}, not a function", where=source)
    return _unpack(value(), source)


def _unpack(result: Any, source: str) -> tuple[nn.Module, Batch | None]:
    if isinstance(result, nn.Module):
        return result.eval(), None
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], nn.Module):
        return result[0].eval(), as_batch(result[1], source)
    raise Problem(
        "A112",
        f"{source} returned a {type(result).__name__}",
        where=source,
        help="return a module, or a pair (module, inputs)",
    )
