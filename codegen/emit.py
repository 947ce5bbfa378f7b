"""A kernel at its tile sizes, written out as a module that needs torch and triton alone.

The text is a function of what is given: no dates, no paths, nothing of the machine.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from textwrap import wrap
from typing import Any

import torch
from torch import Tensor

import attnopt
from attnopt.codegen.kernel import Inputs, Kernel, Load
from attnopt.codegen.link import CannotLink, link
from attnopt.codegen.target import Target
from attnopt.compiler.spec import AttentionSpec

TRITON = ("3.6", "3.9")  # the oldest that the kernels are written for, the newest they ran with
_WIDTH = 100
_NEEDED = {
    "torch": "import torch", "Tensor": "from torch import Tensor", "Any": "from typing import Any"
}  # fmt: skip


def emit(
    kernel: Kernel[Any],
    spec: Any,
    target: Target,
    load: Load,
    hooks: Mapping[str, Callable[..., Any]] | None = None,
) -> str:
    """The module's text: what it computes and how it is called, the kernel with all it reaches, and
    one function `public_name(spec)` of the kernel's inputs that launches it.

    `hooks` are `triton.jit` functions by the launcher's parameter (`keep_hook`); where the launcher
    takes `data` for them, the function takes it too. Raises `CannotLink` where the kernel or a hook
    cannot stand alone.
    """
    launcher = type(kernel).launcher
    inputs = type(kernel).inputs(spec, load, "meta")
    constants = {**kernel.constants(spec), **(hooks or {})}
    jitted = [value for value in constants.values() if hasattr(value, "fn")]
    name, given = public_name(spec), list(inputs)
    if hooks and "data" in inspect.signature(launcher).parameters and "data" not in given:
        given.append("data")
    function = _function(name, launcher, inputs, given, constants)
    needed = [line for word, line in _NEEDED.items() if re.search(rf"\b{word}\b", function)]
    linked = link([*jitted, launcher], "\n".join(needed))
    if name in linked.names:
        raise CannotLink(f"`{name}`, the public function, means something else in the kernel")
    facts = {
        "spec": str(getattr(spec, "text", spec)),
        "tiles": kernel.text,
        **_rounded(kernel),
        **{key: literal(hook) for key, hook in (hooks or {}).items()},
        "target": f"{target.title} ({target.name}, {target.capability})",
    }
    head = _header(kernel, facts, inputs, f"{name}({', '.join(given)})")
    return f"{head}\n\n{linked.imports}\n\n\n{linked.definitions}\n\n\n{function}\n"


def _rounded(kernel: Kernel[Any]) -> dict[str, str]:
    """What a reader has to know of products that are not exact."""
    precision = getattr(kernel, "precision", "ieee")
    if precision == "ieee":
        return {}
    return {"precision": f"{precision}: operands of products in float32 are rounded to it"}


def public_name(spec: Any) -> str:
    """The name of the function of an emitted module that launches the kernel."""
    attends = isinstance(spec, AttentionSpec) or hasattr(spec, "attention")
    return "attention" if attends else "run"


def _header(kernel: Kernel[Any], facts: Mapping[str, str], inputs: Inputs, call: str) -> str:
    """The module's docstring."""
    source = f" after {kernel.source}" if kernel.source else ""
    oldest, newest = TRITON
    shapes = {name: _shape(value) for name, value in inputs.items()}
    lines = [
        summary(type(kernel).launcher), "",
        *wrap(
            f"Written by attnopt {attnopt.__version__}{source}. Needs torch and triton (written "
            f"for {oldest} to {newest}), and nothing of attnopt.", _WIDTH,
        ), "",
        *_columns(facts), "",
        *wrap(
            f"Call `{call}` with tensors on one device. The tiles were chosen for "
            "the sizes below; other batches and lengths are computed too, other head counts and "
            "dims are another module.", _WIDTH,
        ), "",
        *_columns(shapes),
    ]  # fmt: skip
    return '"""' + "\n".join(lines).replace("\\", "\\\\") + '\n"""'


def summary(function: Callable[..., Any]) -> str:
    """What a function does, by its docstring."""
    return (inspect.getdoc(function) or function.__name__).splitlines()[0]


def _columns(rows: Mapping[str, str]) -> list[str]:
    wide = max(map(len, rows))
    return [f"    {name:<{wide}}  {said}" for name, said in rows.items()]


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__


def _function(
    name: str, launcher: Callable[..., Any], inputs: Inputs, given: list[str],
    constants: Mapping[str, Any],
) -> str:  # fmt: skip
    """The public function: the launcher with its constants written out."""
    returns = launcher.__annotations__.get("return", "Any")
    returns = returns if isinstance(returns, str) else getattr(returns, "__name__", "Any")
    takes = [f"{key}: {_annotation(inputs.get(key))}" for key in given]
    passed = [f"{key}={key}" for key in given]
    passed += [f"{key}={literal(value)}" for key, value in constants.items()]
    return "\n".join([
        f"def {name}(", *(f"    {item}," for item in takes), f") -> {returns}:",
        f'    """{summary(launcher)}', "",
        f"    Shapes and errors: see `{launcher.__name__}`.", '    """',
        f"    return {launcher.__name__}(", *(f"        {item}," for item in passed), "    )",
    ])  # fmt: skip


def _annotation(value: Any) -> str:
    if isinstance(value, Tensor):
        return "Tensor"
    return type(value).__name__ if isinstance(value, (bool, int, float)) else "Any"


def literal(value: Any) -> str:
    """A constant of a launcher as Python source. Raises TypeError for what has none."""
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else f'float("{value}")'
    if value is None or isinstance(value, (bool, int)):
        return repr(value)
    if isinstance(value, str):
        return '"' + repr(value)[1:-1].replace('"', '\\"') + '"'
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, tuple):
        inside = ", ".join(map(literal, value))
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    if hasattr(value, "fn"):
        return str(value.fn.__name__)
    raise TypeError(f"{value!r} cannot be written as a constant")
