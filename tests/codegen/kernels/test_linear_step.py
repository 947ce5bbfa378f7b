"""`linear_step` in the interpreter, held against the recurrence in float64 and `linear_chunk`."""

from __future__ import annotations

import pytest
import torch

from attnopt.codegen.kernel import Load, read_kernel
from attnopt.codegen.kernels.linear_chunk import LinearChunk
from attnopt.codegen.kernels.linear_step import LinearStep
from attnopt.codegen.target import known, target
from attnopt.compiler.linear_spec import LinearSpec
from tests.codegen.kernels.linear_cases import exact, spec_of, tame
from tests.tolerance import assert_close


def agree(spec: LinearSpec, kernel: LinearStep, load: Load) -> None:
    inputs = LinearStep.inputs(spec, load)
    wanted = LinearStep.reference(spec, exact(inputs))
    got = kernel.run(spec, inputs)
    assert len(got) == len(wanted) == 2 + spec.normalised
    assert got[1].data_ptr() == inputs["state"].data_ptr()
    for x, y in zip(got, wanted, strict=True):
        size = max(1.0, float(y.abs().max()))
        assert_close((x / size).to(x.dtype), y / size, spec.text)


@pytest.mark.parametrize("decay", ["none", "head", "token"])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("normalised", [False, True])
def test_decays(decay: str, tokens: int, normalised: bool) -> None:
    spec = spec_of(feature="elu", decay=decay, normalised=normalised)
    agree(spec, LinearStep(16), Load(2, tokens, tokens, "float32"))


@pytest.mark.parametrize("feature", ["elu", "relu", "softmax"])
@pytest.mark.parametrize("two_sided", [False, True])
def test_feature_maps(feature: str, two_sided: bool) -> None:
    spec = spec_of(2, 2, 24, feature=feature, two_sided=two_sided)
    agree(spec, LinearStep(16), Load(1, 2, 2, "float32"))


@pytest.mark.parametrize(("heads", "kv_heads", "own"), [(4, 2, False), (8, 1, False), (8, 2, True)])
@pytest.mark.parametrize("normalised", [False, True])
def test_grouped_heads(heads: int, kv_heads: int, own: bool, normalised: bool) -> None:
    spec = spec_of(heads, kv_heads, 16, value_dim=24, decay="token", feature="elu",
                   normalised=normalised, state_heads=heads if own else 0)  # fmt: skip
    agree(spec, LinearStep(16), Load(2, 2, 2, "float32"))


@pytest.mark.parametrize("dim", [33, 40, 57, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dimensions(dim: int, dtype: str) -> None:
    spec = spec_of(1, 1, dim, value_dim=dim - 8, decay="head")
    agree(spec, LinearStep(64), Load(1, 1, 1, dtype))


def test_steps_continue_a_chunk() -> None:
    spec = spec_of(2, 1, 16, feature="softmax", two_sided=True, normalised=True, decay="token",
                   final=True)  # fmt: skip
    inputs = tame(LinearChunk.inputs(spec, Load(1, 20, 20, "float32")))
    whole, final, final_sums = LinearChunk(16, 16).run(spec, inputs)
    parts = [{k: x[:, :, at] for k, x in inputs.items()} for at in (slice(13), slice(13, None))]
    rows, state, sums = LinearChunk(16, 16).run(spec, parts[0])
    for t in range(7):
        now = {k: x[:, :, t : t + 1] for k, x in parts[1].items()}
        row, state, sums = LinearStep(16).run(spec, {**now, "state": state, "sums": sums})
        rows = torch.cat([rows, row], 2)
    for x, y in ((rows, whole), (state, final), (sums, final_sums)):
        assert_close(x, y)


def test_no_steps_without_an_order() -> None:
    miss = LinearStep.supports(spec_of(causal=False), target("h100"))
    assert miss is not None and "order" in miss.reason
    assert LinearStep.supports(spec_of(feature="taylor"), target("h100")) is not None


def test_defaults_are_in_the_space() -> None:
    for name in known():
        if name != "cpu":
            for spec, size in LinearStep.examples():
                kernel = LinearStep.default(spec, target(name), size)
                assert read_kernel(kernel.text) == kernel


def test_the_state_is_what_a_step_moves() -> None:
    spec = LinearSpec(32, 32, 128, 128)
    moved = LinearStep.work(spec, Load(8, 1, 1)).bytes
    state = 8 * 32 * 128 * 128 * 4
    assert 2 * state < moved < 2.05 * state


def test_a_state_that_lies_apart_is_refused() -> None:
    spec = spec_of()
    inputs = LinearStep.inputs(spec, Load(1, 1, 1, "float32"))
    with pytest.raises(ValueError, match="dense in its last dimension"):
        LinearStep(16).run(spec, {**inputs, "state": inputs["state"].mT})
