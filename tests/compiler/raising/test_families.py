"""Raising on the families that have to raise fully: same numbers at three shapes, and the right
facts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.program import Program
from attnopt.compiler.raising import raise_program
from attnopt.compiler.trace import trace
from tests.families import CASES, Family, Inputs
from tests.tolerance import assert_close

SHAPES = ((2, 10), (3, 17), (4, 7))


def _double(inputs: Inputs) -> Inputs:
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def _raised(model: nn.Module, inputs: Inputs, name: str) -> Program:
    return raise_program(trace(Loaded(model, None, (), inputs, name, "hf", root_prefix="hf.")))


@pytest.mark.parametrize(("family", "spelling"), CASES, ids=lambda x: getattr(x, "name", x))
def test_raises_fully(family: Family, spelling: str) -> None:
    model = family.build(spelling).double()
    program = _raised(model, _double(family.inputs(*SHAPES[0])), family.name)

    assert not program.unraised
    assert program.sites
    for site in program.sites:
        assert not site.missing, site.missing
        assert (site.spec.heads, site.kv_heads, site.spec.head_dim) == (4, family.kv_heads, 16)
        assert site.spec.scale * site.gain == pytest.approx(1.0 if "t5" in family.name else 0.25)
        assert (site.mask, site.mask_certainty) == (family.mask, "proved")
        assert site.position == family.position
        assert site.qk_norm is family.qk_norm
        assert site.q and site.k and site.v and site.out
    for batch, length in SHAPES:
        inputs = _double(family.inputs(batch, length))
        with torch.no_grad():
            assert_close(program(**inputs), model(**inputs), f"{family.name} at {batch} x {length}")


def test_a_shifted_mask_is_caught() -> None:
    """A mask that is not causal is not called causal: the model lets each token see one token
    ahead."""
    from tests.families import Nano

    model = Nano().eval()
    for block in model.blocks:
        block.bias.copy_(torch.tril(torch.ones(128, 128), diagonal=1).view(1, 1, 128, 128))
    program = _raised(model, {"x": torch.randn(2, 9, 64)}, "shifted")
    assert all(site.mask != "causal" for site in program.sites)


def test_what_is_not_understood_is_said() -> None:
    """A temperature per key on the logits stops the walk, and the miss names it."""

    class Tempered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(64, 192)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (p.unflatten(-1, (4, 16)).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
            scores = q @ k.transpose(-1, -2)
            made: torch.Tensor = (scores * scores.mean(-2, keepdim=True)).softmax(-1) @ v
            return made

    program = _raised(Tempered().eval(), {"x": torch.randn(2, 9, 64)}, "tempered")
    assert not program.sites
    (miss,) = program.unraised
    assert "scaled by a tensor" in miss.reason
    assert "test_families.py" in miss.source


def test_a_router_is_no_attention() -> None:
    """A softmax over classes, as in a router or a classifier, is neither a site nor a miss."""

    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(64, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = self.gate(x).softmax(-1)
            return made

    program = _raised(Router().eval(), {"x": torch.randn(2, 9, 64)}, "router")
    assert not program.sites
    assert not program.unraised
