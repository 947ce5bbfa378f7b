"""A C header for compiled kernels: names, argument structs, and a function that launches each.

For CUDA's driver API, and for HIP's on AMD.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from textwrap import wrap

from attnopt.codegen.launch_facts import Argument, Buffer, LaunchFacts

FILE = "attnopt_kernels.h"
_HEAD = (
    "/* The kernels of this folder, by attnopt: for each launch a struct of its arguments; *_fits,",
    " * whether they keep what the compiler took for granted; and *_launch. The grids of other",
    " * sizes, and what arguments follow from these, are worked out by the launcher in the .py. */",
)
_NUMBERS = {
    "i32": "int32_t", "i64": "int64_t", "u1": "uint8_t", "fp32": "float", "fp64": "double",
}  # fmt: skip


@dataclass(frozen=True)
class Api:
    """The words of a driver API."""

    include: str
    pointer: str
    function: str
    stream: str
    status: str
    launch: str
    address: str
    """How a pointer becomes a number."""


CUDA = Api(
    "#include <cuda.h>", "CUdeviceptr", "CUfunction", "CUstream", "CUresult", "cuLaunchKernel",
    "{}",
)  # fmt: skip
HIP = Api(
    "#include <hip/hip_runtime_api.h>", "hipDeviceptr_t", "hipFunction_t", "hipStream_t",
    "hipError_t", "hipModuleLaunchKernel", "(uintptr_t){}",
)  # fmt: skip


def api(vendor: str) -> Api:
    """The driver API of a vendor."""
    return HIP if vendor == "amd" else CUDA


@dataclass(frozen=True)
class Module:
    """A kernel as the header tells it: the name of its file, what it computes, its launches."""

    name: str
    said: str
    launches: tuple[LaunchFacts, ...]
    buffers: tuple[Buffer, ...]


def prefix(module: Module, at: int) -> str:
    """What the C names of a module's launch start with."""
    return f"{module.name}_{at}"


def header(modules: Iterable[Module], vendor: str) -> str:
    """The text of the header."""
    words = api(vendor)
    lines = [
        *_HEAD, "#ifndef ATTNOPT_KERNELS_H", "#define ATTNOPT_KERNELS_H", "",
        "#include <stdint.h>", "", words.include, "",
    ]  # fmt: skip
    for module in modules:
        known = {buffer.name: buffer for buffer in module.buffers}
        for at, launch in enumerate(module.launches):
            lines += _launch(module, at, launch, known, words)
    return "\n".join([*lines, "#endif"]) + "\n"


def _launch(
    module: Module, at: int, launch: LaunchFacts, known: dict[str, Buffer], words: Api
) -> list[str]:
    name = prefix(module, at)
    big = name.upper()
    given = [f"&a->{item.name}" for item in launch.arguments]
    given += ["&none"] * len(launch.null_pointers)
    spare = f"  {words.pointer} none = 0;" if launch.null_pointers else ""
    sizes = f"x, y, z, {big}_THREADS, 1, 1, {big}_SHARED"
    call = f"{words.launch}(\n      function, {sizes}, stream, given, 0)"
    return [
        f"/* {module.name}, launch {at + 1} of {len(module.launches)}: {module.said} */",
        f'#define {big}_FILE "{launch.file}"', f'#define {big}_SYMBOL "{launch.symbol}"',
        f"#define {big}_THREADS {launch.threads}", f"#define {big}_SHARED {launch.shared}", "",
        "typedef struct {", *(_field(item, known, words) for item in launch.arguments),
        f"}} {name}_arguments;", "",
        f"static inline int {name}_fits(const {name}_arguments *a) {{",
        f"  return {_fits(launch.arguments, words)};", "}", "",
        f"static inline {words.status} {name}_launch(",
        f"    {words.function} function, unsigned x, unsigned y, unsigned z,",
        f"    {words.stream} stream, {name}_arguments *a) {{", *([spare] if spare else []),
        *wrap(f"void *given[] = {{{', '.join(given)}}};", 96, initial_indent="  ",
              subsequent_indent="      "),
        f"  return {call};", "}", "",
    ]  # fmt: skip


def _field(item: Argument, known: dict[str, Buffer], words: Api) -> str:
    if item.type.startswith("*"):
        buffer = known[item.buffer]
        shape = " x ".join(map(str, buffer.shape)) or "1"
        where = f" from element {item.offset}" if item.offset else ""
        note = f"{item.type}, {buffer.role} {item.buffer}, {shape}{where}"
        return f"  {words.pointer} {item.name}; /* {note} */"
    told = f"{int(item.value) if isinstance(item.value, bool) else item.value}"
    return f"  {_NUMBERS[item.type]} {item.name}; /* {told} in the recorded call */"


def _fits(arguments: Sequence[Argument], words: Api) -> str:
    checks = []
    for item in arguments:
        if item.aligned:
            at = f"a->{item.name}"
            number = words.address.format(at) if item.type.startswith("*") else at
            checks.append(f"{number} % 16 == 0")
    return "\n      && ".join(checks) or "a != 0"
