"""tf32: where it is asked for alone, told in what is written, and in the compiled code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from attnopt.codegen.arguments import precision_argument
from attnopt.codegen.emit import emit
from attnopt.codegen.kernel import Kernel, Load, kernels, read_kernel
from attnopt.codegen.kernels.flash_prefill import FlashPrefill
from attnopt.codegen.pick import Picked, pick
from attnopt.codegen.target import target
from attnopt.compiler.errors import Problem
from attnopt.compiler.spec import CAUSAL, AttentionSpec
from tests.codegen.compiling import compiling
from tests.tolerance import assert_close

H100 = target("h100")
SPEC = AttentionSpec(4, 2, 32, 32, 32**-0.5, CAUSAL)
LOAD = Load(1, 40, 40, "float32")
TF32: dict[str, Any] = {"precision": "tf32"}
ROUNDING = (
    "block_sparse_prefill", "flash_prefill", "latent_decode", "latent_prefill", "split_decode"
)  # fmt: skip

_COMPILED = """
from dataclasses import replace
from attnopt.codegen.aot import compiled, launches
from attnopt.codegen.kernel import Load, kernels
from attnopt.codegen.target import target
told = {}
for name in sys.argv[1].split(","):
    kernel = kernels()[name]
    spec, load = kernel.examples()[0]
    load, on = replace(load, dtype="float32"), target("a100")
    for precision in ("ieee", "tf32"):
        tiles = replace(kernel.default(spec, on, load), precision=precision)
        made = compiled(launches(tiles, spec, load)[0], on)
        told[f"{name} {precision}"] = "tf32" in made.asm["ptx"]
"""


def _with(precision: str) -> Kernel[AttentionSpec]:
    return FlashPrefill(32, 32, precision=precision)


def test_kernels_round_only_where_it_is_asked_for() -> None:
    for name in ROUNDING:
        kernel = kernels()[name]
        assert "precision" not in kernel.space()
        spec, load = kernel.examples()[0]
        tiles = kernel.default(spec, H100, load)
        assert "precision" not in tiles.constants(spec)
        asked = replace(tiles, **TF32)
        assert asked.constants(spec) == {**tiles.constants(spec), "precision": "tf32"}
    assert _with("ieee").constants(SPEC) == FlashPrefill(32, 32).constants(SPEC)
    with pytest.raises(Problem, match="cannot be 'tf33'") as problem:
        precision_argument("tf33")
    assert problem.value.code == "A802"


def test_it_stands_in_the_text_and_in_the_module() -> None:
    asked = _with("tf32")
    assert asked.text.endswith("precision=tf32}") and read_kernel(asked.text) == asked
    said, plain = (emit(kernel, SPEC, H100, LOAD) for kernel in (asked, _with("ieee")))
    assert "precision=tf32}\n" in said and 'precision="tf32",\n' in said
    assert "tf32: operands of products in float32 are rounded to it" in said
    assert "tf32" not in plain


def test_the_interpreter_runs_it() -> None:
    """It rounds nothing; that compiled code does stands in the next test."""
    inputs = FlashPrefill.inputs(SPEC, LOAD)
    got = _with("tf32").run(SPEC, inputs)
    wanted = FlashPrefill.reference(SPEC, {key: x.double() for key, x in inputs.items()})
    assert_close(got, wanted)


@pytest.mark.slow
def test_compiled_code_multiplies_in_tf32() -> None:
    told = compiling(_COMPILED, ",".join(ROUNDING))
    wanted = {f"{name} {how}": how == "tf32" for name in ROUNDING for how in ("ieee", "tf32")}
    assert told == wanted


def test_a_pick_asks_for_it_of_kernels_that_have_it() -> None:
    picked = pick(SPEC, H100, LOAD, precision="tf32")
    plain = pick(SPEC, H100, LOAD)
    assert isinstance(picked, Picked) and isinstance(plain, Picked)
    assert picked.kernel.text.endswith("precision=tf32}") and "precision" not in plain.kernel.text
    assert picked.seconds <= plain.seconds
    assert not isinstance(pick(SPEC, H100, LOAD, ("merge_partials",), "tf32"), Picked)
