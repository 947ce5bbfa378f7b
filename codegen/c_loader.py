"""A small C program that loads one emitted kernel and launches it once: what to start from."""

from __future__ import annotations

import torch

from attnopt.codegen.c_header import FILE as HEADER
from attnopt.codegen.c_header import Module, prefix
from attnopt.codegen.launch_facts import Argument, LaunchFacts

FILE = "loader.c"

_CUDA = """\
/* Loads {module} and launches it once on zeros:
 *     cc loader.c -lcuda -o loader && ./loader
 */
#include <stdio.h>
#include <stdlib.h>

#include "{header}"

static void check(CUresult result, const char *what) {{
  const char *said = 0;
  if (result == CUDA_SUCCESS) return;
  cuGetErrorString(result, &said);
  fprintf(stderr, "%s: %s\\n", what, said ? said : "unknown error");
  exit(1);
}}

static CUdeviceptr zeros(size_t bytes) {{
  CUdeviceptr made = 0;
  check(cuMemAlloc(&made, bytes), "cuMemAlloc");
  check(cuMemsetD8(made, 0, bytes), "cuMemsetD8");
  return made;
}}

static CUfunction kernel(const char *file, const char *symbol, int shared) {{
  CUmodule module = 0;
  CUfunction found = 0;
  check(cuModuleLoad(&module, file), file);
  check(cuModuleGetFunction(&found, module, symbol), symbol);
  if (shared > 49152)
    check(cuFuncSetAttribute(found, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared),
          "shared memory");
  return found;
}}

int main(void) {{
  CUdevice device = 0;
  CUcontext context = 0;
  check(cuInit(0), "cuInit");
  check(cuDeviceGet(&device, 0), "cuDeviceGet");
  check(cuDevicePrimaryCtxRetain(&context, device), "cuDevicePrimaryCtxRetain");
  check(cuCtxSetCurrent(context), "cuCtxSetCurrent");

{body}
  check(cuCtxSynchronize(), "the kernel");
  puts("done");
  return 0;
}}
"""

_HIP = """\
/* Loads {module} and launches it once on zeros:
 *     hipcc loader.c -o loader && ./loader
 */
#include <stdio.h>
#include <stdlib.h>

#include "{header}"

static void check(hipError_t result, const char *what) {{
  if (result == hipSuccess) return;
  fprintf(stderr, "%s: %s\\n", what, hipGetErrorString(result));
  exit(1);
}}

static hipDeviceptr_t zeros(size_t bytes) {{
  void *made = 0;
  check(hipMalloc(&made, bytes), "hipMalloc");
  check(hipMemset(made, 0, bytes), "hipMemset");
  return (hipDeviceptr_t)made;
}}

static hipFunction_t kernel(const char *file, const char *symbol) {{
  hipModule_t module = 0;
  hipFunction_t found = 0;
  check(hipModuleLoad(&module, file), file);
  check(hipModuleGetFunction(&found, module, symbol), symbol);
  return found;
}}

int main(void) {{
  check(hipSetDevice(0), "hipSetDevice");

{body}
  check(hipDeviceSynchronize(), "the kernel");
  puts("done");
  return 0;
}}
"""


def loader(module: Module, vendor: str) -> str:
    """The program's text for a module with its launches."""
    amd = vendor == "amd"
    pointer = "hipDeviceptr_t" if amd else "CUdeviceptr"
    used = {item.buffer for launch in module.launches for item in launch.arguments if item.buffer}
    lines = [
        f"  {pointer} {buffer.name} = zeros({buffer.bytes}); /* {buffer.role} */"
        for buffer in module.buffers if buffer.name in used
    ]  # fmt: skip
    sizes = {buffer.name: _item(buffer.dtype) for buffer in module.buffers}
    for at, launch in enumerate(module.launches):
        lines += ["", *_launch(module, at, launch, sizes, amd)]
    text = _HIP if amd else _CUDA
    return text.format(module=module.name, header=HEADER, body="\n".join(lines))


def _launch(
    module: Module, at: int, launch: LaunchFacts, sizes: dict[str, int], amd: bool
) -> list[str]:
    name = prefix(module, at)
    big = name.upper()
    x, y, z = (*launch.grid, 1, 1)[:3]
    shared = "" if amd else f", {big}_SHARED"
    return [
        f"  {name}_arguments a{at} = {{",
        *(f"      .{item.name} = {_value(item, sizes, amd)}," for item in launch.arguments), "  };",
        f"  if (!{name}_fits(&a{at})) return 1;",
        f"  check({name}_launch(kernel({big}_FILE, {big}_SYMBOL{shared}), {x}, {y}, {z}, 0, "
        f'&a{at}), "{name}");',
    ]  # fmt: skip


def _value(item: Argument, sizes: dict[str, int], amd: bool) -> str:
    if not item.buffer:
        return str(int(item.value) if isinstance(item.value, bool) else item.value)
    offset = item.offset * sizes[item.buffer]
    if not offset:
        return item.buffer
    return f"(char *){item.buffer} + {offset}" if amd else f"{item.buffer} + {offset}"


def _item(dtype: str) -> int:
    found: torch.dtype = getattr(torch, dtype)
    return found.itemsize
