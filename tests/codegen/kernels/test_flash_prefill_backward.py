"""Gradients of attention in the interpreter, held against autograd in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from attnopt.codegen.arguments import mask_arguments
from attnopt.codegen.flash_attention import flash_attention
from attnopt.codegen.kernel import Inputs, Load, kernels, read_kernel
from attnopt.codegen.kernels.flash_prefill import FlashPrefill, flash_prefill
from attnopt.codegen.kernels.flash_prefill_backward import (
    FlashPrefillBackward,
    flash_prefill_backward,
)
from attnopt.codegen.kernels.references.flash_prefill import flash_prefill as plain
from attnopt.codegen.pieces.alibi import alibi
from attnopt.codegen.target import known, target
from attnopt.compiler import attend
from attnopt.compiler.errors import Problem
from attnopt.compiler.spec import CAUSAL, FULL, AttentionSpec, Mask
from tests.tolerance import assert_close

H100 = target("h100")
TILES = FlashPrefillBackward(32, 16, block_m=32, step_n=16)
SQUARE = FlashPrefillBackward(64, 64, block_m=64, step_n=64)
NAMES = ("q", "k", "v", "bias", "sinks")
WINDOWS = (
    Mask("window", left=1),
    Mask("window", left=40),
    Mask("window", left=40, sink=3),
    Mask("window", left=5, sink=40),
    Mask("window", left=500, sink=3),
    Mask("window", left=40, causal=False),
    Mask("window", left=20, sink=3, causal=False),
    Mask("window", left=5, sink=90, causal=False),
)


def spec_of(
    mask: Mask = CAUSAL, dim: int = 32, group: int = 1, kv_heads: int = 1, **changes: Any
) -> AttentionSpec:
    """A small attention: key/value heads that are read by `group` query heads each."""
    return AttentionSpec(group * kv_heads, kv_heads, dim, dim, dim**-0.5, mask).with_(**changes)


def gradients(
    spec: AttentionSpec, inputs: Inputs, grad: Tensor, kernel: FlashPrefillBackward,
    hooks: Inputs | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """By name, from the kernels, forward and backward."""
    hooks = hooks or {}
    forward = FlashPrefill(64, 64).constants(spec)
    shared = {key: hooks[key] for key in hooks if key not in ("slope_hook", "longest_keys")}
    out, lse = flash_prefill(**inputs, **forward, **shared, with_lse=True)
    wanted = tuple(name for name in NAMES if inputs.get(name) is not None)
    options = {**kernel.constants(spec), "wanted": wanted, **hooks}
    found = flash_prefill_backward(**inputs, grad=grad, out=out, lse=lse, **options)
    return dict(zip(wanted, found, strict=True))


def expected(
    spec: AttentionSpec, inputs: Inputs, grad: Tensor, hooks: Inputs | None = None
) -> dict[str, Tensor]:
    """The same by autograd of the forward pass's reference, in float64."""
    exact: Inputs = {}
    for name, x in inputs.items():
        floats = isinstance(x, Tensor) and x.is_floating_point()
        exact[name] = x.detach().double().requires_grad_() if floats else x
    out, _ = plain(
        **exact, **mask_arguments(spec.mask), scale=spec.scale, softcap=spec.softcap,
        mean_of_none=spec.fill == "min", **(hooks or {}),
    )  # fmt: skip
    leaves = {name: exact[name] for name in NAMES if exact.get(name) is not None}
    found = torch.autograd.grad(out, list(leaves.values()), grad.double(), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if x is None else x
        for (name, leaf), x in zip(leaves.items(), found, strict=True)
    }


def agree(
    spec: AttentionSpec, load: Load, kernel: FlashPrefillBackward = TILES,
    hooks: tuple[Inputs, Inputs] = ({}, {}), **changes: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """Hold all gradients against autograd; `changes` are inputs, `hooks` the kernel's and the
    reference's."""
    inputs = {**FlashPrefill.inputs(spec, load), **changes}
    inputs = {name: x for name, x in inputs.items() if x is not None}
    q, v = inputs["q"], inputs["v"]
    grad = torch.randn(*q.shape[:3], v.shape[3], dtype=q.dtype)
    got = gradients(spec, inputs, grad, kernel, hooks[0])
    for name, want in expected(spec, inputs, grad, hooks[1]).items():
        assert got[name].shape == inputs[name].shape and got[name].dtype == inputs[name].dtype
        size = max(1.0, float(want.abs().max())) if want.numel() else 1.0
        assert_close((got[name] / size).to(q.dtype), want / size, f"{name} of {spec.text}")
    return got


@pytest.mark.parametrize("mask", [FULL, CAUSAL, *WINDOWS], ids=str)
@pytest.mark.parametrize("length", [1, 63, 100, 128])
def test_every_mask_at_every_length(mask: Mask, length: int) -> None:
    agree(spec_of(mask), Load(1, length, length, "float32"), SQUARE)


@pytest.mark.parametrize("mask", [FULL, CAUSAL, *WINDOWS], ids=str)
def test_many_tiles(mask: Mask) -> None:
    agree(spec_of(mask), Load(1, 257, 257, "float32"), FlashPrefillBackward(64, 32))


@pytest.mark.parametrize("dim", [32, 33, 40, 57, 64, 80, 96, 128, 192, 256])
def test_every_head_dim(dim: int) -> None:
    agree(spec_of(dim=dim), Load(1, 63, 63, "float32"), SQUARE)


@pytest.mark.parametrize(("dim", "v_dim"), [(40, 64), (64, 24), (192, 128)])
def test_values_may_have_another_width(dim: int, v_dim: int) -> None:
    agree(spec_of(FULL, dim, 2, v_dim=v_dim), Load(1, 40, 33, "float32"))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("mask", [CAUSAL, WINDOWS[2]], ids=str)
def test_grouped_heads(mask: Mask, group: int) -> None:
    agree(spec_of(mask, group=group, kv_heads=2 if group < 4 else 1), Load(1, 37, 37, "float32"))


@pytest.mark.parametrize("held", [16, 128])
@pytest.mark.parametrize("step", [16, 128])
def test_tiles(held: int, step: int) -> None:
    kernel = FlashPrefillBackward(held, step, block_m=held, step_n=step)
    for mask in (CAUSAL, WINDOWS[6]):
        agree(spec_of(mask), Load(1, 63, 63, "float32"), kernel)


@pytest.mark.parametrize(("queries", "keys"), [(1, 100), (100, 1), (37, 70), (70, 37)])
@pytest.mark.parametrize("mask", [FULL, CAUSAL, *WINDOWS[3:]], ids=str)
def test_as_many_keys_as_one_likes(mask: Mask, queries: int, keys: int) -> None:
    fill = "min" if queries == 70 else "-inf"
    agree(spec_of(mask, fill=fill), Load(1, queries, keys, "float32"))


@pytest.mark.parametrize("offset", [-150, -7, 20, 300])
@pytest.mark.parametrize("fill", ["-inf", "min"])
def test_queries_may_stand_before_and_behind_all_keys(fill: str, offset: int) -> None:
    for mask in (CAUSAL, WINDOWS[2], WINDOWS[7]):
        agree(spec_of(mask, fill=fill), Load(1, 40, 50, "float32"), offset=offset)


@pytest.mark.parametrize("mask", [CAUSAL, *WINDOWS], ids=str)
def test_tiles_begin_and_end_anywhere(mask: Mask) -> None:
    small = FlashPrefillBackward(16, 16, block_m=16, step_n=16)
    spec = spec_of(mask, 16)
    for offset in range(-18, 50, 17):
        agree(spec, Load(1, 18, 35, "float32"), small, offset=offset)


EXTRAS = [("bias",), ("keep",), ("padding",), ("sinks",), ("bias", "keep", "padding", "sinks")]


@pytest.mark.parametrize("extras", EXTRAS, ids="+".join)
def test_extras(extras: tuple[str, ...]) -> None:
    for mask, fill in ((CAUSAL, "min"), (WINDOWS[6], "-inf")):
        agree(spec_of(mask, group=2, extras=extras, fill=fill), Load(2, 40, 40, "float32"))


@pytest.mark.parametrize("shape", [(33,), (45, 1), (1, 4, 1, 33), (2, 1, 45, 33), (1, 1, 1, 1)])
def test_gradients_of_a_bias_are_summed_up_to_its_shape(shape: tuple[int, ...]) -> None:
    given = {"bias": torch.randn(shape), "keep": torch.rand(shape) < 0.7}
    agree(spec_of(FULL, group=2, kv_heads=2), Load(2, 45, 33, "float32"), SQUARE, **given)


@pytest.mark.parametrize("shape", [(1,), (4, 1, 1), (2, 4, 1, 1), (1, 1, 45, 1)])
def test_gradients_of_sinks_are_summed_up_to_their_shape(shape: tuple[int, ...]) -> None:
    agree(spec_of(group=4), Load(2, 45, 45, "float32"), SQUARE, sinks=torch.randn(shape))


def test_a_sink_of_minus_infinity_is_none() -> None:
    keep = torch.ones(45, 45, dtype=torch.bool)
    keep[7] = False
    sinks = torch.tensor([0.5, float("-inf"), 2.0, float("-inf")])[:, None, None]
    spec = spec_of(group=2, kv_heads=2)
    inputs = {**FlashPrefill.inputs(spec, Load(1, 45, 45, "float32")), "keep": keep}
    got = gradients(spec, {**inputs, "sinks": sinks}, torch.randn(1, 4, 45, 32), TILES)
    for name in ("q", "k", "v"):
        assert got[name].isfinite().all()
    assert not got["q"][:, :, 7].any() and not got["sinks"][[1, 3]].any()
    assert got["sinks"][[0, 2]].all()


@pytest.mark.parametrize("fill", ["-inf", "min"])
def test_rows_without_keys(fill: str) -> None:
    keep = torch.rand(2, 1, 45, 45) < 0.8
    keep[0, 0, 3] = keep[1, 0, 40:] = False
    for mask in (CAUSAL, WINDOWS[2]):
        got = agree(spec_of(mask, group=2, fill=fill), Load(2, 45, 45, "float32"), keep=keep)
        assert not got["q"][0, :, 3].any() and not got["q"][1, :, 40:].any()
    nothing = torch.zeros(45, 45, dtype=torch.bool)
    got = agree(spec_of(fill=fill), Load(1, 45, 45, "float32"), keep=nothing)
    assert not got["q"].any() and not got["k"].any() and got["v"].any() == (fill == "min")


def test_rows_of_the_lowest_bias_alone_have_no_gradient() -> None:
    spec, load = spec_of(FULL, extras=("bias",)), Load(1, 45, 45, "float32")
    inputs, grad = FlashPrefill.inputs(spec, load), torch.randn(1, 1, 45, 32)
    inputs["bias"][..., 3, :] = torch.finfo(torch.float32).min
    got = gradients(spec, inputs, grad, TILES)
    grad[:, :, 3] = 0
    for name, want in expected(spec, inputs, grad).items():
        assert_close(got[name] / 10, want / 10, name)


def test_a_soft_cap() -> None:
    q = 30 * torch.randn(2, 2, 45, 32)
    for extras in ((), ("bias", "keep")):
        agree(spec_of(group=2, softcap=5.0, extras=extras), Load(2, 45, 45, "float32"), q=q)


def test_logits_beyond_what_exp_takes() -> None:
    q, k = torch.randint(-60, 60, (1, 1, 45, 32)), torch.randint(-3, 3, (1, 1, 45, 32))
    got = agree(spec_of(scale=0.25), Load(1, 45, 45, "float32"), q=q.float(), k=k.float())
    assert all(x.isfinite().all() for x in got.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("mask", [CAUSAL, WINDOWS[2]], ids=str)
def test_half_precision(mask: Mask, dtype: str) -> None:
    spec, load = spec_of(mask, 64, 2, extras=("bias", "sinks")), Load(1, 100, 100, dtype)
    inputs = FlashPrefillBackward.inputs(spec, load)
    got = FlashPrefillBackward(64, 32).run(spec, inputs)
    wide = {name: x.double() for name, x in inputs.items()}
    kept = [x for at, x in enumerate(FlashPrefillBackward.reference(spec, wide)) if at != 3]
    for x, y in zip(got, kept, strict=True):
        assert x.dtype == load.torch_dtype
        assert_close(x / y.abs().max(), y / y.abs().max())


def test_any_layout() -> None:
    q, k = torch.randn(2, 45, 4, 32).transpose(1, 2), torch.randn(2, 2, 32, 40).transpose(2, 3)
    v = torch.randn(1, 2, 40, 64)[..., ::2].expand(2, 2, 40, 32)
    bias = torch.randn(40, 45, 4, 2).permute(3, 2, 1, 0)
    agree(spec_of(FULL, group=2, kv_heads=2), Load(2, 45, 40, "float32"), q=q, k=k, v=v, bias=bias)


@triton.jit
def near_or_even(b, h, i, j, data):
    return (i - j < data[0] + h) | (j % 2 == b)


@triton.jit
def squared(logits, b, h, i, j, data):
    return logits * tl.abs(logits) * data[0]


@triton.jit
def squared_slope(logits, b, h, i, j, data):
    return tl.abs(logits) * data[0] * 2.0


def test_a_hook_drops_keys() -> None:
    kept = lambda b, h, i, j: (i - j < 3 + h) | (j % 2 == b)  # noqa: E731
    hooks = {"keep_hook": near_or_even, "data": (3,)}, {"keep_hook": kept}
    agree(spec_of(FULL, group=2), Load(2, 45, 50, "float32"), TILES, hooks)


def test_a_hook_adds_alibi() -> None:
    slopes = 2.0 ** -torch.arange(1.0, 3.0).expand(2, 2)
    added = lambda x, b, h, i, j: x + slopes[0][:, None, None] * (j - i)  # noqa: E731
    hooks = {"score_hook": alibi, "data": (slopes, *slopes.stride())}, {"score_hook": added}
    agree(spec_of(group=2), Load(2, 45, 45, "float32"), TILES, hooks)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_a_hook_with_a_derivative(softcap: float) -> None:
    ours = {"score_hook": squared, "slope_hook": squared_slope, "data": (0.5,)}
    hooks = ours, {"score_hook": lambda x, b, h, i, j: x * x.abs() * 0.5}
    agree(spec_of(group=2, softcap=softcap), Load(1, 45, 45, "float32"), TILES, hooks)


QUERIES, KEYS = (0, 1, 1, 38, 138, 138, 150), (0, 1, 64, 101, 101, 113, 300)


@pytest.mark.parametrize("fill", ["-inf", "min"])
@pytest.mark.parametrize("mask", [FULL, CAUSAL, WINDOWS[2], WINDOWS[7]], ids=str)
def test_sequences_of_various_lengths(mask: Mask, fill: str) -> None:
    """Of one token, one query, as many queries as keys, no keys, no queries, fewer queries."""
    spec, load = spec_of(mask, group=2, fill=fill), Load(1, 150, 300, "float32")
    starts = {"q_starts": torch.tensor(QUERIES), "k_starts": torch.tensor(KEYS)}
    given = {name: x.to(torch.int32) for name, x in starts.items()} | {"longest": 100}
    inputs, grad = {**FlashPrefill.inputs(spec, load), **given}, torch.randn(1, 2, 150, 32)
    wanted = expected(spec, inputs, grad)
    for name, got in gradients(spec, inputs, grad, SQUARE).items():
        assert_close(got / 3, wanted[name] / 3, name)
    sinks = {**inputs, "sinks": torch.randn(1, 2, 1, 1)}
    found = gradients(spec, sinks, grad, SQUARE, {"longest_keys": 199})
    each = [torch.zeros(())] * 2
    for a, b, c, d in zip(QUERIES, QUERIES[1:], KEYS, KEYS[1:], strict=False):
        part = {"q": inputs["q"][:, :, a:b], "offset": d - c - (b - a), "sinks": sinks["sinks"]}
        part |= {name: inputs[name][:, :, c:d] for name in ("k", "v")}
        want = expected(spec, part, grad[:, :, a:b])
        assert_close(found["q"][:, :, a:b] / 3, want["q"] / 3)
        each[1] = each[1] + want["sinks"]
    assert_close(found["sinks"] / 10, each[1] / 10)


def test_rows_beyond_the_last_sequence_have_no_gradient() -> None:
    spec, load = spec_of(CAUSAL, group=2), Load(1, 40, 40, "float32")
    starts = torch.tensor([0, 13, 30], dtype=torch.int32)
    given = {"q_starts": starts, "k_starts": starts, "longest": 17}
    inputs = {**FlashPrefill.inputs(spec, load), **given, "sinks": torch.randn(1, 2, 1, 1)}
    found = gradients(spec, inputs, torch.randn(1, 2, 40, 32), SQUARE)
    for name in ("q", "k", "v"):
        assert not found[name][:, :, 30:].any(), name
        assert bool(found[name].isfinite().all()) and bool(found[name][:, :, :30].any())
    assert bool(found["sinks"].isfinite().all())


def attend_of(spec: AttentionSpec, given: Inputs) -> Tensor:
    return attend.reference(given["q"], given["k"], given["v"], [given["bias"]], spec)


@pytest.mark.parametrize("mask", [CAUSAL, FULL], ids=str)
def test_rows_of_the_lowest_bias_are_the_mean_where_a_spec_says_so(mask: Mask) -> None:
    spec, load = spec_of(mask, group=2, fill="min", extras=("bias",)), Load(1, 20, 20, "float32")
    inputs = FlashPrefill.inputs(spec, load)
    inputs["bias"][..., :5, :] = torch.finfo(torch.float32).min
    grad = torch.randn(1, 2, 20, 32)
    assert_close(FlashPrefill(32, 16).run(spec, inputs), attend_of(spec, inputs))
    got = gradients(spec, inputs, grad, SQUARE)
    leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}  # in float64 not the lowest
    (wanted,) = torch.autograd.grad(attend_of(spec, leaves), [leaves["v"]], grad)
    assert_close(got["v"] / 3, wanted / 3)


def test_only_what_is_wanted_is_computed() -> None:
    spec, load = spec_of(extras=("bias", "sinks")), Load(1, 20, 20, "float32")
    inputs = FlashPrefillBackward.inputs(spec, load)
    options = FlashPrefillBackward(16, 16).constants(spec)
    assert options["wanted"] == ("q", "k", "v", "sinks")
    whole = flash_prefill_backward(**inputs, **{**options, "wanted": NAMES})
    for name, want in zip(NAMES, whole, strict=True):
        (got,) = flash_prefill_backward(**inputs, **{**options, "wanted": (name,)})
        assert torch.equal(got, want)
    assert flash_prefill_backward(**inputs, **{**options, "wanted": ()}) == ()


def test_what_has_no_meaning_is_refused() -> None:
    spec = spec_of()
    inputs = FlashPrefillBackward.inputs(spec, Load(1, 20, 20, "float32"))
    with pytest.raises(ValueError, match="are not of q"):
        TILES.run(spec, {**inputs, "grad": inputs["grad"][:, :, 1:]})
    with pytest.raises(ValueError, match="no bias to give a gradient of"):
        flash_prefill_backward(**inputs, **{**TILES.constants(spec), "wanted": ("bias",)})
    with pytest.raises(Problem, match="gives no gradients"):
        TILES.run(spec, {**inputs, "q": inputs["q"].requires_grad_()})


def test_no_queries_and_no_keys() -> None:
    spec = spec_of(fill="min")
    got = TILES.run(spec, FlashPrefillBackward.inputs(spec, Load(2, 0, 5, "float32")))
    assert not got[1].any() and not got[2].any()
    got = TILES.run(spec, FlashPrefillBackward.inputs(spec, Load(2, 5, 0, "float32")))
    assert not got[0].any() and got[1].shape == (2, 1, 0, 32)


def test_it_is_a_kernel_that_is_known_by_name() -> None:
    assert kernels()["flash_prefill_backward"] is FlashPrefillBackward
    assert read_kernel("flash_prefill_backward{block_n=128}") == FlashPrefillBackward(128)


def test_what_it_does_not_support() -> None:
    assert FlashPrefillBackward.supports(spec_of(), target("h100")) is None
    miss = FlashPrefillBackward.supports(spec_of(dim=320), target("h100"))
    assert miss is not None and miss.reason == "head_dim 320 is more than 256"
    miss = FlashPrefillBackward.supports(spec_of(), target("t4"))
    assert miss is not None and "no matrix units" in miss.reason


@pytest.mark.parametrize("name", [name for name in known() if name not in ("cpu", "t4")])
def test_default_tiles(name: str) -> None:
    space, device = FlashPrefillBackward.space(), target(name)
    for dim in (64, 128, 256):
        for dtype in ("bfloat16", "float32"):
            for length in (1, 100, 8192):
                load = Load(1, length, length, dtype)
                made = FlashPrefillBackward.default(spec_of(dim=dim), device, load)
                assert all(getattr(made, key) in values for key, values in space.items())


def test_work_counts_five_products() -> None:
    load = Load(1, 1024, 1024)
    spec = spec_of(FULL, 64)
    assert FlashPrefillBackward.work(spec, load).flops == 2.5 * FlashPrefill.work(spec, load).flops


@pytest.mark.parametrize("extras", [(), ("bias", "padding", "sinks"), ("keep",)], ids=str)
def test_autograd(extras: tuple[str, ...]) -> None:
    spec = spec_of(WINDOWS[2], group=2, extras=extras, softcap=5.0)
    inputs = FlashPrefill.inputs(spec, Load(2, 40, 40, "float32"))
    floats = [name for name, x in inputs.items() if x.is_floating_point()]
    ours = {k: x.clone().requires_grad_(k in floats) for k, x in inputs.items()}
    wanted = expected(spec, inputs, torch.ones(2, 2, 40, 32))
    flash_attention(spec, H100, *ours.values()).sum().backward()
    for name in floats:
        assert ours[name].grad is not None
        assert_close(ours[name].grad / 5, wanted[name] / 5, name)


def test_autograd_of_some_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def noted(*given: Any, **options: Any) -> Any:
        asked.append(options["wanted"])
        return flash_prefill_backward(*given, **options)

    monkeypatch.setattr("attnopt.codegen.flash_attention.flash_prefill_backward", noted)
    spec = spec_of(extras=("bias",))
    q, k, v, bias = FlashPrefill.inputs(spec, Load(1, 20, 20, "float32")).values()
    flash_attention(spec, H100, q, k.requires_grad_(), v, bias).sum().backward()
    assert asked == [("k",)] and k.grad is not None and q.grad is None
    assert not flash_attention(spec, H100, q, k.detach(), v, bias).requires_grad
    found = flash_attention(spec, H100, q, k, v, bias).square().sum()
    (slope,) = torch.autograd.grad(found, k, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()
    with pytest.raises(Problem, match="no kernels for this attention"):
        flash_attention(spec, target("t4"), q, k, v, bias)
