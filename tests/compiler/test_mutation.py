"""Writes in place, on the model's way or into its masks, are kept by tracing and by every pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnopt.compiler.contract import Notes
from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.lower import lower
from attnopt.compiler.pipeline import apply_plan
from attnopt.compiler.plan import Plan
from attnopt.compiler.program import Program
from attnopt.compiler.raising import raise_program
from attnopt.compiler.trace import trace, writes
from tests.tolerance import assert_close

WIDTH = 16


def set_first(x: Tensor) -> Tensor:
    x[:, 0] = torch.arange(float(WIDTH))
    return x


def add_to_slice(x: Tensor) -> Tensor:
    x[:, :2] += 1.0
    return x


def zero_a_view(x: Tensor) -> Tensor:
    x[:, 0].zero_()
    return x


def change_a_copy(x: Tensor) -> Tensor:
    copy = x.to(x.dtype, copy=True)
    copy.add_(1.0)
    return x + copy


def change_a_constant(x: Tensor) -> Tensor:
    factor = torch.tensor([1.0, 2.0] * (WIDTH // 2))
    factor += 1
    return x * factor


def fill_new_memory(x: Tensor) -> Tensor:
    made = x.new_empty(x.shape)
    made[..., : WIDTH // 2] = x[..., WIDTH // 2 :]
    made[..., WIDTH // 2 :] = x[..., : WIDTH // 2]
    return made


class Writing(nn.Module):
    """One attention over inputs that `change` has written into, with a mask written into too."""

    def __init__(self, change: Callable[[Tensor], Tensor], own: bool = True) -> None:
        super().__init__()
        self.change, self.own = change, own
        self.parts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        x = self.change(x * 1.0 if self.own else x)
        mask = torch.ones(length, length, dtype=torch.bool)
        mask[:, 3:] = False
        q, k, v = (p(x).view(batch, length, 2, -1).transpose(1, 2) for p in self.parts[:3])
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = x + self.parts[3](heads.transpose(1, 2).reshape(batch, length, -1))
        y[:, 1] = 0.0
        return y


class Counting(Writing):
    """Its answer depends on how often it was called."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__(set_first)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return super().forward(x) + self.calls


def traced(model: nn.Module) -> Program:
    return trace(Loaded(model.eval(), None, (torch.randn(2, 9, WIDTH),), {}, "writing", "callable"))


CHANGES = (
    set_first, add_to_slice, zero_a_view, change_a_copy, change_a_constant, fill_new_memory,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "own"), [*((change, True) for change in CHANGES), (add_to_slice, False)]
)
def test_what_is_written_in_place_is_computed(
    change: Callable[[Tensor], Tensor], own: bool
) -> None:
    torch.manual_seed(0)
    model = Writing(change, own)
    program = raise_program(traced(model))
    assert len(program.sites) == 1
    assert not any(writes(node) for node in program.graph.nodes)
    made, _ = apply_plan(program, Plan().then("fuse_attention{}"), Notes(program))
    for shape in ((2, 9, WIDTH), (3, 5, WIDTH)):
        x = torch.randn(shape)
        with torch.no_grad():
            expected = model(x.clone())
            assert_close(program(x.clone()), expected, "raised")
            assert_close(lower(made)(x.clone()), expected, "lowered")


def test_a_model_that_counts_its_calls_is_refused() -> None:
    with pytest.raises(Problem, match="`calls`"):
        traced(Counting())
