"""Compiling launches for a target that need not be here, and what the compiled code takes of it.

What is compiled is what triton would compile on the device, but for line numbers, which are left
out: the same source gives the same bytes, wherever it lies.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend

from attnopt.codegen.kernel import Kernel, Load
from attnopt.codegen.record import Launch, recording
from attnopt.codegen.target import Target
from attnopt.compiler.errors import Problem

_POINTERS: Mapping[torch.dtype, str] = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.float64: "*fp64", torch.bool: "*i1", torch.uint8: "*u8", torch.int8: "*i8",
    torch.int32: "*i32", torch.int64: "*i64", torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
}  # fmt: skip
_ALIGNED = 16  # bytes of a pointer, or steps of a whole number, that the compiler may rely on
_WAVE = {"nvidia": 32, "amd": 64}
_NO_LINES = "TRITON_DISABLE_LINE_INFO"
_ERRORS = (triton.CompilationError, triton.runtime.errors.TritonError, RuntimeError)


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes of its target.

    `registers` of 32 bits and `spills`, the bytes that are stored away for want of them, are those
    of a thread; `stack` are the bytes of a thread in memory, spills among them; `shared` the bytes
    of a block. `accumulators` are the registers among them that only matrix instructions use
    (AMD). `serialized` says that the compiler could not overlap Hopper's matrix instructions.
    """

    kernel: str
    registers: int
    spills: int
    stack: int
    shared: int
    warps: int
    accumulators: int = 0
    serialized: bool = False

    def misfit(self, target: Target) -> str:
        """Why the kernel is not good on the target, empty where it is. What exceeds the shared
        memory cannot run there at all; triton does not say so for AMD."""
        if self.shared > target.shared_per_block:
            return f"exceeds shared memory: {self.shared} of {target.shared_per_block} bytes"
        return f"spills {self.spills} bytes per thread" if self.spills else ""


def require_compiler() -> None:
    """Raises `Problem` A804 in a process that runs triton's interpreter, which cannot compile."""
    if triton.knobs.runtime.interpret:
        raise Problem(
            "A804", "TRITON_INTERPRET is set, and triton's interpreter cannot compile",
            help="unset TRITON_INTERPRET for this command",
        )  # fmt: skip


def launches(kernel: Kernel[Any], spec: Any, load: Load) -> list[Launch]:
    """What the kernel launches at these sizes, in order. Raises `Problem` A804 as
    `require_compiler`."""
    require_compiler()
    with recording() as noted:
        kernel.run(spec, type(kernel).inputs(spec, load, "meta"))
    return noted


def compiled(launch: Launch, target: Target) -> Any:
    """The launch's kernel as triton compiles it for the target: `.asm` holds its texts and binary,
    `.metadata.shared` the bytes of shared memory of a block.

    Raises `Problem` A803 for the CPU, A804 in the interpreter, and A805 where triton fails.
    """
    require_compiler()
    told = signature(launch)
    source = triton.compiler.ASTSource(
        launch.kernel, told.types, told.constants, told.attributes
    )  # fmt: skip
    name, options = launch.kernel.fn.__name__, {"enable_fp_fusion": True, **launch.options}
    try:
        with _without_lines():
            return triton.compile(source, target=gpu(target), options=options)
    except _ERRORS as error:
        raise Problem(
            "A805", f"triton cannot compile {name} for {target.title}",
            why=(str(error).strip().splitlines() or [type(error).__name__])[-1],
            help="choose other tile sizes, or another target",
        ) from error  # fmt: skip


@dataclass(frozen=True)
class Signature:
    """A launch's arguments in triton's words: types by name, and by place what is compiled in and
    what may be relied on. A place is the number of a parameter, and of an item where it is a
    tuple."""

    types: Mapping[str, Any]
    constants: Mapping[tuple[int, ...], Any]
    attributes: Mapping[tuple[int, ...], Any]


def signature(launch: Launch) -> Signature:
    """The arguments of a launch, specialised as a launch on a device would."""
    types: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for place, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            types[parameter.name] = "constexpr"
            constants[(place,)] = value
            continue
        told = {} if parameter.do_not_specialize else attributes
        types[parameter.name] = _typed(value, (place,), constants, told)
        if parameter.do_not_specialize and constants.get((place,)) == 1:  # one code for all
            del constants[(place,)]
            types[parameter.name] = "i32"
    return Signature(types, constants, attributes)


def resources(made: Any, target: Target) -> Resources:
    """What a compiled kernel takes, read off its binary."""
    meta = made.metadata
    if target.vendor == "amd":
        return _of_amd(made.asm["amdgcn"], meta)
    used = _tool("cuobjdump", "-res-usage", made.asm["cubin"])
    registers, stack = (int(_found(rf"{word}:(\d+)", used)) for word in ("REG", "STACK"))
    hopper = target.capability == "9.0"
    log = _ptxas_log(made, target) if stack or hopper else ""
    return Resources(
        meta.name, registers, int(_found(r"(\d+) bytes spill stores", log, "0")), stack,
        meta.shared, meta.num_warps, serialized="wgmma.mma_async instructions are serial" in log,
    )  # fmt: skip


def _of_amd(text: str, meta: Any) -> Resources:
    count = {
        word: int(_found(rf"\.{word}:\s+(\d+)", text))
        for word in ("vgpr_count", "agpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    }
    return Resources(
        meta.name, count["vgpr_count"], 4 * count["vgpr_spill_count"],
        count["private_segment_fixed_size"], meta.shared, meta.num_warps, count["agpr_count"],
    )  # fmt: skip


def _ptxas_log(made: Any, target: Target) -> str:
    """What ptxas says when it makes this binary once more, which triton only prints."""
    backend, said = make_backend(gpu(target)), io.StringIO()
    knobs, before = triton.knobs.nvidia, triton.knobs.nvidia.dump_ptxas_log
    options = backend.parse_options(made.metadata._asdict())
    knobs.dump_ptxas_log = True
    try:
        with redirect_stdout(said), _without_lines():
            backend.make_cubin(made.asm["ptx"], {}, options, gpu(target).arch)
    finally:
        knobs.dump_ptxas_log = before
    return said.getvalue()


def _tool(name: str, option: str, binary: bytes) -> str:
    """What a tool of the triton wheel says of a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        path = getattr(triton.knobs.nvidia, name).path
        return subprocess.run(
            [path, option, file.name], capture_output=True, text=True, check=True
        ).stdout


def _found(pattern: str, text: str, otherwise: str | None = None) -> str:
    """The one group of a pattern in a text."""
    match = re.search(pattern, text)
    if match is None and otherwise is None:
        raise ValueError(f"no {pattern} in {text[:500]}")
    return str(otherwise) if match is None else match.group(1)


@contextmanager
def _without_lines() -> Iterator[None]:
    """Compile without line numbers: they hold the path of the source."""
    before = os.environ.get(_NO_LINES)
    os.environ[_NO_LINES] = "1"
    try:
        yield
    finally:
        del os.environ[_NO_LINES]
        if before is not None:
            os.environ[_NO_LINES] = before


def gpu(target: Target) -> GPUTarget:
    """The target as triton names it. Raises `Problem` A803 for the CPU."""
    if target.vendor not in _WAVE:
        raise Problem(
            "A803", f"Triton has no code for {target.title}",
            help="name a GPU: attnopt codegen --target h100",
        )  # fmt: skip
    if target.vendor == "amd":
        return GPUTarget("hip", target.capability, 64)
    return GPUTarget("cuda", int(target.capability.replace(".", "")), 32)


def _typed(value: Any, place: tuple[int, ...], constants: Any, attributes: Any) -> Any:
    """The type of an argument in triton's words; as the launch would, numbers of 1 become constants
    and multiples of 16 are told."""
    if isinstance(value, tuple):
        return tuple(
            _typed(item, (*place, at), constants, attributes) for at, item in enumerate(value)
        )
    if value is None or (type(value) is int and value == 1):
        constants[place] = value
        return "constexpr"
    if isinstance(value, Tensor):
        attributes[place] = [["tt.divisibility", _ALIGNED]]
        return _POINTERS[value.dtype]
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        if value % _ALIGNED == 0:
            attributes[place] = [["tt.divisibility", _ALIGNED]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"
