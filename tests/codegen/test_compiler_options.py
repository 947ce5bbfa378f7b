"""What kernels tell Triton's compiler beside warps and stages."""

from __future__ import annotations

from typing import Any

import pytest

from attnopt.codegen.kernel import CompilerOptions, kernels, read_kernel
from attnopt.codegen.target import target
from tests.codegen.compiling import compiling

SETTING = {
    name: kernel for name, kernel in kernels().items() if issubclass(kernel, CompilerOptions)
}


def test_kernels_whose_time_is_spent_in_products_have_them() -> None:
    assert sorted(SETTING) == [
        "block_sparse_prefill", "flash_prefill", "latent_decode", "latent_prefill",
        "linear_chunk", "split_decode",
    ]  # fmt: skip


@pytest.mark.parametrize("name", sorted(SETTING))
def test_each_vendor_has_its_own(name: str) -> None:
    own = {"h100": ("maxnreg",), "mi300x": ("waves_per_eu", "matrix_instr_nonkdim")}
    for here, there in (("h100", "mi300x"), ("mi300x", "h100")):
        space = SETTING[name].space(target(here))
        assert all(len(space[option]) > 1 for option in own[here])
        assert all(space[option] == (0,) for option in own[there])


@pytest.mark.parametrize("name", sorted(SETTING))
def test_what_is_set_reaches_the_launcher_and_nothing_else(name: str) -> None:
    kernel: Any = read_kernel(f"{name}{{maxnreg=168 waves_per_eu=2}}")
    spec, _ = kernel.examples()[0]
    assert kernel.constants(spec)["compiler"] == (("maxnreg", 168), ("waves_per_eu", 2))
    assert read_kernel(kernel.text) == kernel
    assert SETTING[name]().constants(spec)["compiler"] == ()


_LAUNCHED = """
from dataclasses import replace
from attnopt.codegen.aot import launches
from attnopt.codegen.kernel import kernels
from attnopt.codegen.target import target

told = {}
for name in sys.argv[1:]:
    kernel = kernels()[name]
    spec, load = kernel.examples()[0]
    chosen = replace(kernel.default(spec, target("h100"), load), maxnreg=168)
    told[name] = {one.kernel.fn.__name__: one.options for one in launches(chosen, spec, load)}
"""


@pytest.mark.slow
def test_every_kernel_launches_with_them() -> None:
    for name, found in compiling(_LAUNCHED, *SETTING).items():
        own = [options for kernel, options in found.items() if name.split("_")[0] in kernel]
        own = own or [options for kernel, options in found.items() if kernel == "_chunks"]
        assert own and all(options["maxnreg"] == 168 for options in own), (name, found)


_COMPILED = """
from dataclasses import asdict, replace
from attnopt.codegen.aot import compiled, launches, resources
from attnopt.codegen.kernel import Load
from attnopt.codegen.kernels.flash_prefill import FlashPrefill
from attnopt.codegen.target import target

def made(name, **options):
    on, load = target(name), Load(1, 1024, 1024, "float16")
    spec, _ = FlashPrefill.examples()[0]
    kernel = replace(FlashPrefill.default(spec, on, load), **options)
    return compiled(launches(kernel, spec, load)[0], on)

few = made("h100", maxnreg=96)
told = {
    "maxnreg": resources(few, target("h100")).registers,
    "instructions": [
        sorted({line.split()[0] for line in made(name, matrix_instr_nonkdim=size, waves_per_eu=2)
                .asm["amdgcn"].splitlines() if line.strip().startswith("v_mfma")})
        for name in ("mi250", "mi300x") for size in (16, 32)
    ],
    "waves": 'amdgpu-waves-per-eu"="3' in made("mi300x", waves_per_eu=3).asm["llir"],
}
"""


@pytest.mark.slow
def test_the_compiler_does_as_it_is_told() -> None:
    told = compiling(_COMPILED)
    assert told["maxnreg"] <= 96 and told["waves"]
    for at, instructions in enumerate(told["instructions"]):
        size = "32x32x" if at % 2 else "16x16x"
        assert instructions and all(size in one for one in instructions), told
