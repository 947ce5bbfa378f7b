"""Gradients of linear attention in the interpreter, held against autograd in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnopt.codegen.kernel import Load, read_kernel
from attnopt.codegen.kernels.linear_chunk import LinearChunk
from attnopt.codegen.kernels.linear_chunk_backward import (
    LinearChunkBackward,
    linear_chunk_backward,
)
from attnopt.codegen.kernels.references.linear_chunk import linear_chunk as plain
from attnopt.codegen.linear_attention import linear_attention
from attnopt.codegen.target import known, target
from attnopt.compiler.errors import Problem
from attnopt.compiler.linear_spec import LinearSpec
from tests.codegen.kernels.linear_cases import (
    exact,
    products_of_bfloat16,  # noqa: F401
    spec_of,
    tame,
)
from tests.tolerance import assert_close


def agree(
    spec: LinearSpec, kernel: LinearChunkBackward, tokens: int, batch: int = 1,
    dtype: str = "float32",
) -> None:  # fmt: skip
    inputs = tame(LinearChunkBackward.inputs(spec, Load(batch, tokens, tokens, dtype)))
    got = kernel.run(spec, inputs)
    wanted = LinearChunkBackward.reference(spec, exact(inputs))
    names = ("decay", "initial", "initial_sums")
    assert len(got) == len(wanted) == 3 + sum(name in inputs for name in names)
    for x, y in zip(got, wanted, strict=True):
        size = max(1.0, float(y.abs().max()))
        # States are float32 but no better than what they are made of.
        assert_close((x / size).to(Load(dtype=dtype).torch_dtype), y / size, spec.text)


@pytest.mark.parametrize("decay", ["none", "head", "token"])
@pytest.mark.parametrize("segment", [0, 32])
@pytest.mark.parametrize("states", [False, True])
def test_decays(decay: str, segment: int, states: bool) -> None:
    spec = spec_of(1, 1, 16, value_dim=24, decay=decay, initial=states, final=states)
    agree(spec, LinearChunkBackward(16, 16, segment), 50)


@pytest.mark.parametrize("feature", ["elu", "relu", "softmax"])
@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
def test_feature_maps(feature: str, two_sided: bool, normalised: bool) -> None:
    spec = spec_of(1, 1, 24, value_dim=16, feature=feature, two_sided=two_sided,
                   normalised=normalised)  # fmt: skip
    agree(spec, LinearChunkBackward(16, 16), 40)


@pytest.mark.parametrize("feature", ["elu", "softmax"])
@pytest.mark.parametrize("segment", [0, 16])
def test_everything_at_once(feature: str, segment: int) -> None:
    spec = spec_of(1, 1, 20, value_dim=16, feature=feature, two_sided=True, normalised=True,
                   decay="token", initial=True, final=True)  # fmt: skip
    agree(spec, LinearChunkBackward(16, 16, segment), 40)


@pytest.mark.parametrize(("heads", "kv_heads", "own"), [(4, 2, False), (8, 1, False), (4, 2, True)])
def test_grouped_heads(heads: int, kv_heads: int, own: bool) -> None:
    spec = spec_of(heads, kv_heads, 16, feature="elu", normalised=True, decay="token",
                   initial=True, final=True, state_heads=heads if own else 0)  # fmt: skip
    agree(spec, LinearChunkBackward(16, 16, 32), 40)


@pytest.mark.parametrize("tokens", [1, 63, 100, 128, 257])
def test_lengths(tokens: int) -> None:
    agree(spec_of(1, 1, decay="token", final=True), LinearChunkBackward(64, 32), tokens, batch=2)


@pytest.mark.parametrize("dim", [33, 40, 57, 64, 80, 96, 128, 192, 256])
def test_dimensions(dim: int) -> None:
    agree(spec_of(1, 1, dim, value_dim=dim - 8, decay="head"), LinearChunkBackward(32, 64), 40)


@pytest.mark.parametrize("feature", ["elu", "softmax"])
def test_every_query_reads_the_last_state(feature: str) -> None:
    spec = spec_of(2, 1, 16, feature=feature, causal=False, normalised=True, initial=True,
                   final=True)  # fmt: skip
    for segment in (0, 32):
        agree(spec, LinearChunkBackward(16, 16, segment), 40)


@pytest.mark.usefixtures("products_of_bfloat16")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("feature", ["elu", "softmax"])
def test_half_precision(dtype: str, feature: str) -> None:
    spec = spec_of(1, 1, feature=feature, normalised=True)
    agree(spec, LinearChunkBackward(32, 32), 64, dtype=dtype)


def test_results_of_the_forward_pass_are_taken() -> None:
    spec = spec_of(1, 1, 16, feature="elu", normalised=True, decay="token", final=True)
    size = Load(1, 40, 40, "float32")
    inputs = LinearChunkBackward.inputs(spec, size)
    forward = {x: inputs[x] for x in ("q", "k", "v", "decay")}
    arguments = {**LinearChunk(16, 16).constants(spec), "with_total": True}
    names = ("out", "final", "final_sums", "total")
    found = dict(zip(names, LinearChunk.launcher(**forward, **arguments), strict=True))
    options = LinearChunkBackward(16, 16).constants(spec)
    again = linear_chunk_backward(**inputs, **options)
    for got, want in zip(linear_chunk_backward(**inputs, **found, **options), again, strict=True):
        assert torch.equal(got, want)
    wrong = {**found, "out": found["out"] + 1}
    assert not torch.equal(linear_chunk_backward(**inputs, **wrong, **options)[0], again[0])
    fewer = linear_chunk_backward(**inputs, **options, with_decay=False)
    assert len(fewer) == 3


@pytest.mark.parametrize("normalised", [False, True])
def test_autograd(normalised: bool) -> None:
    spec = spec_of(2, 1, 16, feature="elu", normalised=normalised, decay="token", initial=True,
                   final=True)  # fmt: skip
    inputs = tame(LinearChunk.inputs(spec, Load(1, 40, 40, "float32")))
    ours = {k: x.clone().requires_grad_() for k, x in inputs.items()}
    theirs = {k: x.double().requires_grad_() for k, x in inputs.items()}
    found = linear_attention(spec, target("h100"), **ours)
    options = {"feature": "elu", "normalised": normalised, "scale": spec.scale}
    wanted = plain(**theirs, **options)
    assert len(found) == 2 + normalised
    for results in (found, wanted):
        states = [x[:, :1].square().sum() / 100 for x in results[1 : 2 + normalised]]
        sum(states, results[0].sin().sum()).backward()
    for name, x in ours.items():
        assert x.grad is not None and theirs[name].grad is not None
        size = max(1.0, float(theirs[name].grad.abs().max()))
        assert_close(x.grad / size, theirs[name].grad / size, name)


def test_autograd_of_the_state_alone_and_of_fixed_decays() -> None:
    spec = spec_of(1, 1, 16, decay="head", final=True)
    inputs = LinearChunk.inputs(spec, Load(1, 40, 40, "float32"))
    leaf, wide = inputs["k"].clone().requires_grad_(), inputs["k"].double().requires_grad_()
    linear_attention(spec, target("h100"), **{**inputs, "k": leaf})[1].sum().backward()
    plain(**{**exact(inputs), "k": wide}, scale=spec.scale)[1].sum().backward()
    assert leaf.grad is not None and wide.grad is not None
    assert_close(leaf.grad / 10, wide.grad / 10)


@pytest.mark.parametrize(
    ("spec", "others", "said"),
    [
        (spec_of(decay="token"), {}, "missing"),
        (spec_of(), {"initial": torch.zeros(1)}, "not in the spec"),
        (spec_of(feature="taylor"), {}, "no kernel"),
    ],
)
def test_what_is_missing_is_told(spec: LinearSpec, others: dict[str, Any], said: str) -> None:
    x = torch.zeros(1, 2, 4, 32)
    with pytest.raises(Problem, match=said) as told:
        linear_attention(spec, target("h100"), x, x, x, **others)
    assert told.value.code == "A826"


def test_defaults_are_in_the_space() -> None:
    for name in known():
        if name != "cpu":
            for spec, size in LinearChunkBackward.examples():
                kernel = LinearChunkBackward.default(spec, target(name), size)
                assert read_kernel(kernel.text) == kernel
                assert kernel.segment % kernel.block_c == 0


def test_work_is_all_inputs_and_gradients_once() -> None:
    least = LinearChunkBackward.work(LinearSpec(8, 8, 64, 64), Load(4, 1024, 1024))
    assert least.bytes == 7 * 4 * 8 * 1024 * 64 * 2
