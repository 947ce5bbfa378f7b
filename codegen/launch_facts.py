"""What another program has to know to launch a compiled kernel: its arguments in order, its grid,
and what the compiler took for granted.

Facts are read off a recorded launch and its binary, so they hold for the sizes of that launch: a
number that was 1 is compiled in, and one that was a multiple of 16 has to stay one.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from attnopt.codegen.target import Target

if TYPE_CHECKING:
    from attnopt.codegen.aot import Resources
    from attnopt.codegen.record import Launch

SCRATCH = ("global_scratch", "profile_scratch")  # what triton adds behind a kernel's own arguments


@dataclass(frozen=True)
class Buffer:
    """A tensor that launches read or write: `role` is input, output or scratch; `shape`, `stride`
    and `bytes` are those of the recorded call."""

    name: str
    role: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Argument:
    """One argument of a compiled kernel. `type` is triton's word: `*bf16` (points to bfloat16),
    `i32`, `fp32`. A pointer has the name of its `buffer` and the `offset` in it, in elements; a
    number its recorded `value`. `aligned`: a pointer to a multiple of 16 bytes, a number that 16
    divides."""

    name: str
    type: str
    buffer: str = ""
    offset: int = 0
    value: float | int | bool | None = None
    aligned: bool = False


@dataclass(frozen=True)
class LaunchFacts:
    """One launch. `grid` are its blocks in the recorded call, by `grid_formula` in the words of the
    launcher; a block has `threads`; `shared` bytes of memory are given to it at the launch.

    `null_pointers` go behind the arguments. `compiled_in` are the parameters that became constants.
    """

    file: str
    sha256: str
    symbol: str
    grid: tuple[int, ...]
    grid_formula: str
    threads: int
    shared: int
    arguments: tuple[Argument, ...]
    null_pointers: tuple[str, ...]
    compiled_in: Mapping[str, Any]
    resources: Resources
    binary: bytes = field(repr=False, default=b"")

    def as_json(self) -> dict[str, Any]:
        """The facts as a JSON object, without the binary."""
        return {key: value for key, value in asdict(self).items() if key != "binary"}


def buffers(inputs: Mapping[str, Any], outputs: Any, noted: list[Launch]) -> dict[int, Buffer]:
    """All tensors of the launches by the identity of their memory, named by what they are to the
    caller."""
    found: dict[int, Buffer] = {}
    made = outputs if isinstance(outputs, tuple) else (outputs,)
    named = [(name, "input", value) for name, value in inputs.items()]
    named += [
        ("out" if len(made) == 1 else f"out{at}", "output", value) for at, value in enumerate(made)
    ]
    scratch = (v for one in noted for _, v in _flat(tuple(one.arguments.values()), ()))
    for name, role, value in [*named, *(("", "scratch", value) for value in scratch)]:
        if not isinstance(value, Tensor) or _memory(value) in found:
            continue
        count = sum(buffer.role == "scratch" for buffer in found.values())
        found[_memory(value)] = Buffer(
            name or f"scratch{count}", role, str(value.dtype).removeprefix("torch."),
            tuple(value.shape), value.stride(), value.untyped_storage().nbytes(),
        )  # fmt: skip
    return found


def facts(
    file: str, launch: Launch, made: Any, target: Target, known: Mapping[int, Buffer], formula: str
) -> LaunchFacts:
    """The facts of one launch, `made` being its kernel as compiled and `known` the tensors.

    Raises ValueError where the binary takes other arguments than the launch gives.
    """
    from attnopt.codegen.aot import resources, signature

    told, meta = signature(launch), made.metadata
    arguments: list[Argument] = []
    constants: dict[str, Any] = {}
    for place, (name, types) in enumerate(told.types.items()):
        if types == "constexpr":
            constants[name] = _plain(launch.arguments[name])
            continue
        values = _flat(launch.arguments[name], (place,))
        for (path, value), type_ in zip(values, _leaves(types), strict=True):
            spelled = "_".join([name, *map(str, path[1:])])
            if type_ == "constexpr":
                constants[spelled] = _plain(value)
            else:
                arguments.append(_argument(spelled, type_, value, path in told.attributes, known))
    amd = target.vendor == "amd"
    count = _amd_count(made.asm["amdgcn"]) if amd else _nvidia_count(made.asm["ptx"], meta.name)
    spare = count - len(arguments)
    scratch = getattr(meta, "global_scratch_size", 0)  # triton 3.6 has none on AMD
    if not 0 <= spare <= len(SCRATCH) or scratch or meta.num_ctas != 1:
        raise ValueError(f"{meta.name} takes {count} arguments, and is given {len(arguments)}")
    binary = made.asm["hsaco" if amd else "cubin"]
    return LaunchFacts(
        file, hashlib.sha256(binary).hexdigest(), meta.name, launch.grid, formula,
        meta.num_warps * meta.warp_size, meta.shared, tuple(arguments), SCRATCH[:spare], constants,
        resources(made, target), binary,
    )  # fmt: skip


def grid_formulas(source: str) -> dict[str, str]:
    """For each kernel that a module's functions launch as `kernel[grid](...)`, its grid as an
    expression of the launcher's names."""
    found: dict[str, str] = {}
    for function in ast.parse(source).body:
        if not isinstance(function, ast.FunctionDef):
            continue
        assigned = {
            target.id: ast.unparse(node.value)
            for node in ast.walk(function) if isinstance(node, ast.Assign)
            for target in node.targets if isinstance(target, ast.Name)
        }  # fmt: skip
        for node in ast.walk(function):
            launched = node.func if isinstance(node, ast.Call) else None
            if isinstance(launched, ast.Subscript) and isinstance(launched.value, ast.Name):
                grid = ast.unparse(launched.slice)
                found[launched.value.id] = assigned.get(grid, grid)
    return found


def _argument(
    name: str, type_: str, value: Any, aligned: bool, known: Mapping[int, Buffer]
) -> Argument:
    if isinstance(value, Tensor):
        buffer = known[_memory(value)].name
        return Argument(name, type_, buffer, int(value.storage_offset()), None, aligned)
    return Argument(name, type_, value=value, aligned=aligned)


def _flat(value: Any, place: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Any]]:
    """The items of an argument that is a tuple, or of one in it, with their places."""
    if not isinstance(value, tuple):
        yield place, value
        return
    for at, item in enumerate(value):
        yield from _flat(item, (*place, at))


def _leaves(types: Any) -> Iterator[str]:
    if not isinstance(types, tuple):
        yield types
        return
    for item in types:
        yield from _leaves(item)


def _memory(tensor: Tensor) -> int:
    """What two views of one tensor share."""
    found: int = tensor.untyped_storage()._cdata
    return found


def _plain(value: Any) -> Any:
    """A constant as JSON data: functions by name."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return getattr(getattr(value, "fn", value), "__name__", str(value))


def _nvidia_count(ptx: str, symbol: str) -> int:
    entry = ptx[ptx.index(f".entry {symbol}") :]
    return entry[: entry.index("{")].count(".param ")


def _amd_count(text: str) -> int:
    """How many arguments the kernel's metadata lists, hidden ones of the runtime left out."""
    kinds = re.findall(r"\.value_kind:\s+(\w+)", text[text.index("amdhsa.kernels:") :])
    return sum(not kind.startswith("hidden_") for kind in kinds)
