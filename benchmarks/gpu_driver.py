"""Launching compiled kernels as another program does: by CUDA's or HIP's driver and the facts that
were written beside the binary, without triton."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnopt.codegen.launch_facts import Argument, Buffer, LaunchFacts

_NUMBERS = {
    "i32": ctypes.c_int32, "i64": ctypes.c_int64, "u1": ctypes.c_uint8, "fp32": ctypes.c_float,
    "fp64": ctypes.c_double,
}  # fmt: skip
_DYNAMIC_SHARED, _PLAIN_SHARED = 8, 49152  # the attribute's number; bytes that need none
_POISON = 0xFF  # bytes of a NaN in the dtypes of outputs


@dataclass(frozen=True)
class Driver:
    """The functions of a driver's library."""

    library: Any
    vendor: str

    @classmethod
    def of(cls, vendor: str) -> Driver:
        """The vendor's. Raises OSError where its library is not there."""
        name = "libamdhip64.so" if vendor == "amd" else "libcuda.so.1"
        return cls(ctypes.CDLL(name), vendor)

    def launch(self, facts: LaunchFacts, memory: Memory, stream: int) -> None:
        """One launch, after those that are on the stream. Raises RuntimeError where the driver
        refuses it."""
        amd = self.vendor == "amd"
        load, find, run = (
            ("hipModuleLoadData", "hipModuleGetFunction", "hipModuleLaunchKernel")
            if amd
            else ("cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel")
        )
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._ask(load, ctypes.byref(module), facts.binary)
        self._ask(find, ctypes.byref(function), module, facts.symbol.encode())
        if facts.shared > _PLAIN_SHARED and not amd:
            self._ask("cuFuncSetAttribute", function, _DYNAMIC_SHARED, facts.shared)
        values = [_value(item, memory) for item in facts.arguments]
        values += [ctypes.c_void_p() for _ in facts.null_pointers]
        given = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        grid = (*facts.grid, 1, 1)[:3]
        self._ask(
            run, function, *grid, facts.threads, 1, 1, facts.shared, ctypes.c_void_p(stream), given,
            None,
        )  # fmt: skip

    def _ask(self, name: str, *arguments: Any) -> None:
        status = getattr(self.library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} gives error {status}")


class Memory:
    """The buffers of a module's launches on a device: the inputs', and others that are poisoned."""

    def __init__(self, buffers: Sequence[Buffer], inputs: Mapping[str, Any], device: str) -> None:
        self.tensors = {
            buffer.name: inputs[buffer.name] if buffer.role == "input" else _new(buffer, device)
            for buffer in buffers
        }

    def address(self, name: str, offset: int) -> int:
        """Where the number `offset` of a buffer lies."""
        tensor = self.tensors[name]
        return tensor.untyped_storage().data_ptr() + offset * tensor.element_size()


def _new(buffer: Buffer, device: str) -> Tensor:
    made = torch.full((buffer.bytes,), _POISON, dtype=torch.uint8, device=device)
    return made.view(getattr(torch, buffer.dtype)).as_strided(buffer.shape, buffer.stride)


def _value(item: Argument, memory: Memory) -> Any:
    if item.buffer:
        return ctypes.c_void_p(memory.address(item.buffer, item.offset))
    return _NUMBERS[item.type](item.value)
