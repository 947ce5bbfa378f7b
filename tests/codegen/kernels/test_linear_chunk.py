"""`linear_chunk` in the interpreter, held against all pairs of tokens in float64."""

from __future__ import annotations

import pytest
import torch

from attnopt.codegen.kernel import Load, read_kernel
from attnopt.codegen.kernels.linear_chunk import LinearChunk, linear_chunk, segment_length
from attnopt.codegen.kernels.references import linear_chunk as plain
from attnopt.codegen.kernels.references.linear_step import linear_step
from attnopt.codegen.target import known, target
from attnopt.compiler.errors import Problem
from attnopt.compiler.linear_spec import LinearSpec, parse_linear_spec
from tests.codegen.kernels.linear_cases import (
    check,
    exact,
    products_of_bfloat16,  # noqa: F401
    spec_of,
    tame,
)
from tests.tolerance import assert_close

DECAYS = ("none", "head", "token")


def load(tokens: int, batch: int = 1, dtype: str = "float32") -> Load:
    return Load(batch, tokens, tokens, dtype)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("segment", [0, 64])
def test_decays(decay: str, segment: int) -> None:
    check(spec_of(decay=decay, final=True), LinearChunk(32, 32, segment), load(100))


@pytest.mark.parametrize("feature", ["elu", "relu", "softmax"])
@pytest.mark.parametrize("two_sided", [False, True])
def test_feature_maps(feature: str, two_sided: bool) -> None:
    spec = spec_of(
        1, 1, 24, feature=feature, two_sided=two_sided, normalised=True, initial=True, final=True
    )
    check(spec, LinearChunk(32, 32), load(70))


def test_segments_start_from_what_came_before() -> None:
    spec = spec_of(1, 1, 24, feature="elu", two_sided=True, normalised=True, decay="token",
                   initial=True, final=True)  # fmt: skip
    check(spec, LinearChunk(16, 16, 32), load(100))


@pytest.mark.usefixtures("products_of_bfloat16")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("normalised", [False, True])
def test_half_precision(dtype: str, normalised: bool) -> None:
    spec = spec_of(feature="elu" if normalised else "identity", normalised=normalised,
                   decay="token")  # fmt: skip
    check(spec, LinearChunk(32, 32), load(100, dtype=dtype))


@pytest.mark.parametrize("tokens", [1, 63, 100, 128, 257])
def test_lengths(tokens: int) -> None:
    check(spec_of(1, 1, decay="token", final=True), LinearChunk(64, 32, 128), load(tokens))


@pytest.mark.parametrize("dim", [33, 40, 57, 64, 80, 96, 128, 192, 256])
def test_dimensions(dim: int) -> None:
    spec = spec_of(1, 1, dim, value_dim=dim - 8, decay="token", final=True, initial=True)
    check(spec, LinearChunk(32, 64), load(70))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (8, 1)])
@pytest.mark.parametrize("own", [False, True])
def test_grouped_heads(heads: int, kv_heads: int, own: bool) -> None:
    spec = spec_of(heads, kv_heads, 16, decay="token", initial=True, final=True,
                   state_heads=heads if own else 0)  # fmt: skip
    check(spec, LinearChunk(32, 16, 32), load(50))


@pytest.mark.parametrize("normalised", [False, True])
def test_every_query_reads_the_last_state(normalised: bool) -> None:
    spec = spec_of(4, 2, 24, feature="softmax", causal=False, normalised=normalised, initial=True,
                   final=True)  # fmt: skip
    for segment in (0, 64):
        check(spec, LinearChunk(32, 32, segment), load(100))


def test_batches_and_strides() -> None:
    spec = spec_of(2, 2, 24, decay="token", final=True)
    inputs = tame(LinearChunk.inputs(spec, load(50, batch=2)))
    wanted = LinearChunk.reference(spec, exact(inputs))
    packed = torch.stack([inputs[x] for x in "qkv"], 3).transpose(1, 2)  # [batch, S, heads, 3, D]
    views = {x: packed[:, :, :, n].transpose(1, 2) for n, x in enumerate("qkv")}
    other = {**inputs, **views, "v": inputs["v"].mT.contiguous().mT}  # not dense
    for given in (inputs, other):
        for got, want in zip(LinearChunk(16, 16).run(spec, given), wanted, strict=True):
            assert_close(got, want)


def test_two_calls_equal_one() -> None:
    spec = spec_of(2, 1, 24, feature="elu", normalised=True, decay="token", final=True)
    inputs, cut = tame(LinearChunk.inputs(spec, load(100))), 37
    whole, state, sums = LinearChunk(32, 32).run(spec, inputs)
    parts = [{k: x[:, :, at] for k, x in inputs.items()} for at in (slice(cut), slice(cut, None))]
    first, between, between_sums = LinearChunk(32, 32).run(spec, parts[0])
    rest = {**parts[1], "initial": between, "initial_sums": between_sums}
    second, last, last_sums = LinearChunk(16, 16, 32).run(spec.with_(initial=True), rest)
    assert_close(torch.cat([first, second], 2), whole)
    assert_close(last / 10, state / 10)
    assert_close(last_sums / 10, sums / 10)


def test_strong_decays_stay_finite() -> None:
    spec = spec_of(1, 1, 16, decay="token", final=True)
    inputs = LinearChunk.inputs(spec, load(70))
    inputs["decay"] = inputs["decay"] * 1000  # down to e^-100 per token
    for got, want in zip(
        LinearChunk(32, 16).run(spec, inputs),
        LinearChunk.reference(spec, exact(inputs)),
        strict=True,
    ):
        assert_close(got, want)


def test_states_may_outgrow_half_precision() -> None:
    spec = spec_of(1, 1, 16, scale=1e-5, final=True)
    inputs = {x: torch.full((1, 1, 200, 16), 30.0, dtype=torch.float16) for x in "qkv"}
    out, final = LinearChunk(32, 16).run(spec, inputs)
    assert float(final.max()) == 200 * 900
    assert_close(out / 26, LinearChunk.reference(spec, exact(inputs))[0] / 26)


def test_what_rows_are_divided_by() -> None:
    spec = spec_of(1, 1, 16, feature="elu", normalised=True)
    inputs = LinearChunk.inputs(spec, load(40))
    arguments = {**LinearChunk(16, 16).constants(spec), "with_total": True}
    _, total = linear_chunk(**inputs, **arguments)
    q, k = (plain.features(inputs[x].double(), "elu") for x in "qk")
    wanted = spec.scale * (q @ k.mT).tril().sum(-1) + spec.eps
    assert_close(total / 10, wanted / 10)


@pytest.mark.parametrize("decay", DECAYS)
def test_both_references_agree(decay: str) -> None:
    spec = spec_of(4, 2, 6, feature="elu", normalised=True, decay=decay, initial=True)
    inputs = exact(LinearChunk.inputs(spec, load(9, batch=2)))
    options = {"feature": "elu", "normalised": True, "scale": spec.scale}
    pairs = plain.linear_chunk(**inputs, **options)
    named = {"state": inputs.pop("initial"), "sums": inputs.pop("initial_sums")}
    for x, y in zip(pairs, linear_step(**inputs, **named, **options), strict=True):
        assert_close(x if x is pairs[0] else x[:, ::2], y)


def test_specs_are_text() -> None:
    for spec, _ in LinearChunk.examples():
        assert parse_linear_spec(spec.text) == spec
    assert spec_of(feature="softmax", two_sided=True).features == 64
    with pytest.raises(Problem, match="expected linear"):
        parse_linear_spec("attn{heads=1}")


@pytest.mark.parametrize(
    "wrong",
    [
        {"heads": 3}, {"kv_heads": 0}, {"state_heads": 3}, {"feature": "tanh"},
        {"decay": "head", "causal": False}, {"two_sided": True}, {"decay": "channel"},
    ],
)  # fmt: skip
def test_specs_that_make_no_sense(wrong: dict[str, object]) -> None:
    with pytest.raises(Problem) as told:
        spec_of(4, 2).with_(**wrong)
    assert told.value.code == "A825"


def test_support_is_told() -> None:
    device = target("h100")
    assert LinearChunk.supports(spec_of(), device) is None
    for spec, word in ((spec_of(feature="taylor"), "second-order"), (spec_of(dim=320), "256")):
        miss = LinearChunk.supports(spec, device)
        assert miss is not None and word in miss.reason


def test_no_tokens_are_refused() -> None:
    spec = spec_of()
    with pytest.raises(ValueError, match="no token"):
        LinearChunk(16, 16).run(spec, LinearChunk.inputs(spec, Load(1, 0, 0, "float32")))


def test_defaults_are_in_the_space() -> None:
    for name in known():
        if name != "cpu":
            for spec, size in LinearChunk.examples():
                kernel = LinearChunk.default(spec, target(name), size)
                assert read_kernel(kernel.text) == kernel
                assert kernel.segment % kernel.block_c == 0


def test_work_and_traffic() -> None:
    spec, size = LinearSpec(8, 8, 256, 256), Load(4, 8192, 8192)
    least = LinearChunk.work(spec, size)
    assert least.bytes == 4 * (4 * 8 * 8192 * 256) * 2
    assert least.flops == 4 * 4 * 8 * 8192 * 256 * 256
    assert LinearChunk().traffic(spec, size) == least.bytes
    split = LinearChunk(segment=4096).traffic(spec, size)
    state = 4 * 8 * 256 * 256 * 4
    assert split == least.bytes + 2 * 4 * 8 * 4096 * 256 * 2 + 8 * state
    assert segment_length(8192, 1000, 132) == 0
    assert segment_length(8192, 66, 132) == 4096
