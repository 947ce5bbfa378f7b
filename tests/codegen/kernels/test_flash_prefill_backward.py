"""Gradients of attention in the interpreter, held against autograd in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnopt.codegen.kernel import Inputs, Load
from attnopt.codegen.kernels.flash_prefill import FlashPrefill, flash_prefill, mask_arguments
from attnopt.codegen.kernels.flash_prefill_backward import (
    FlashPrefillBackward,
    flash_prefill_backward,
)
from attnopt.codegen.kernels.references.flash_prefill import flash_prefill as plain
from attnopt.compiler.spec import CAUSAL, FULL, AttentionSpec, Mask
from tests.tolerance import assert_close

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


def spec_of(mask: Mask = CAUSAL, dim: int = 32, group: int = 1, **changes: Any) -> AttentionSpec:
    """A small attention: two key/value heads, each read by `group` query heads."""
    return AttentionSpec(2 * group, 2, dim, dim, dim**-0.5, mask).with_(**changes)


def gradients(
    spec: AttentionSpec, inputs: Inputs, grad: Tensor, kernel: FlashPrefillBackward,
    hooks: Inputs | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """By name, from the kernels, forward and backward."""
    hooks = hooks or {}
    forward = FlashPrefill(32, 16).constants(spec)
    shared = {key: hooks[key] for key in hooks if key != "slope_hook"}
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


@pytest.mark.parametrize("length", [1, 63, 100, 128, 257])
@pytest.mark.parametrize("mask", [FULL, CAUSAL, *WINDOWS], ids=str)
def test_every_mask_at_every_length(mask: Mask, length: int) -> None:
    agree(spec_of(mask), Load(1, length, length, "float32"), SQUARE)
