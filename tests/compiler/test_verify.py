"""Comparing programs: NaN is never lost, and rounding is no excuse for another function."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnopt.compiler import verify
from attnopt.compiler.contract import Edit, Exactness, Miss, Notes, Pass
from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.pipeline import apply_pass, apply_plan
from attnopt.compiler.plan import Plan
from attnopt.compiler.program import Program
from attnopt.compiler.raising import raise_program
from attnopt.compiler.trace import trace
from attnopt.compiler.verify import compare, difference

WIDTH = 16


class Block(nn.Module):
    """One attention over learned positions, of which there are `most`."""

    def __init__(self, most: int = 64, fixed: bool = False) -> None:
        super().__init__()
        self.fixed = fixed
        self.positions = nn.Embedding(most, WIDTH)
        self.parts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        h = x + self.positions(torch.arange(length))
        q, k, v = (p(h).view(batch, length, 2, -1).transpose(1, 2) for p in self.parts[:3])
        mask = None
        if self.fixed:  # dtypes that the trace turns into constants
            mask = torch.zeros(length, length, dtype=x.dtype)
            q = (q.float() * 1.5).to(x.dtype)
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out: Tensor = self.parts[3](heads.transpose(1, 2).reshape(batch, length, -1))
        return out


@dataclass(frozen=True)
class Scaled(Pass):
    """Says that it is exact, and changes the scale."""

    name: ClassVar[str] = "scaled"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    by: float = 1.1

    def rewrite(self, target: Any, program: Program, notes: Notes) -> Edit | Miss:
        return Edit(spec=target.spec.with_(scale=target.spec.scale * self.by))


def block(dtype: torch.dtype, length: int = 12, **options: Any) -> Program:
    torch.manual_seed(0)
    model = Block(**options).to(dtype).eval()
    inputs = (torch.randn(3, length, WIDTH, dtype=dtype),)
    return raise_program(trace(Loaded(model, None, inputs, {}, "block", "callable")))


def test_nan_in_any_output_is_an_infinite_difference() -> None:
    ones, nan = torch.ones(2, 3), torch.full((2, 3), float("nan"))
    assert difference({"a": ones, "b": ones}, {"a": nan, "b": ones}) == math.inf
    assert difference({"a": ones, "b": ones}, {"a": ones, "b": nan}) == math.inf
    assert difference({"a": nan}, {"a": nan}) == math.inf


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_another_scale_is_refuted_in_every_dtype(dtype: torch.dtype, fixed: bool) -> None:
    program = block(dtype, fixed=fixed)
    same, _ = apply_pass(program, Scaled(by=1.0), ("*",), Notes(program), verify=False)
    other, _ = apply_pass(program, Scaled(by=1.0001), ("*",), Notes(program), verify=False)
    assert compare(program, same).same
    assert compare(program, same).dtype is torch.float64
    assert not compare(program, other).same


def test_sizes_that_the_model_cannot_take_are_left_out() -> None:
    program = block(torch.float32, length=32, most=32)
    same, (outcome,) = apply_pass(program, Scaled(by=1.0), ("*",), Notes(program))
    assert outcome.applied
    assert not apply_pass(same, Scaled(), ("*",), Notes(program))[1][0].applied


def test_what_has_no_float64_is_compared_in_the_models_own_dtype(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Program.run

    def only_own(self: Program, batch: Any) -> Any:
        if verify.own_dtype(self) is not torch.bfloat16:
            raise RuntimeError("no such product")
        return run(self, batch)

    program = block(torch.bfloat16)
    monkeypatch.setattr(Program, "run", only_own)
    same, _ = apply_pass(program, Scaled(by=1.0), ("*",), Notes(program), verify=False)
    assert compare(program, same) == verify.Comparison(0.0, 3e-2, torch.bfloat16)


def test_one_programs_outputs_are_kept() -> None:
    program = block(torch.float32)
    chain = [program]
    for _ in range(3):
        made, _ = apply_pass(chain[-1], Scaled(by=1.0), ("*",), Notes(program))
        chain.append(made)
    assert len(verify._LAST) == 1


class Encoder(nn.Module):
    """torch's own encoder, told by a mask of any name where the padding is."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 1)

    def forward(self, x: Tensor, unread: Tensor) -> Tensor:
        out: Tensor = self.layers(x, src_key_padding_mask=unread)
        return out


def test_padding_told_by_any_input_is_varied_and_unpadded() -> None:
    torch.manual_seed(0)
    unread = torch.arange(9)[None, :] >= torch.tensor([9, 6, 4])[:, None]
    inputs = (torch.randn(3, 9, WIDTH), unread)
    program = raise_program(trace(Loaded(Encoder().eval(), None, inputs, {}, "enc", "callable")))
    valid = [batch.valid for batch in verify.variations(program)]
    assert len(valid) == 5
    assert torch.equal(valid[0], ~unread)  # type: ignore[arg-type]
    plan = Plan().then("simplify_mask{}").then("fuse_attention{}").then("unpad{}")
    _, outcomes = apply_plan(program, plan, Notes(program))
    assert [o.reason for o in outcomes if not o.applied] == []
