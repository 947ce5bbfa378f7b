"""A mask that is not what it looked like when the model was read: exact rewrites either do not rely
on its looks, or the original runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from attnopt.autotune.order import compose
from attnopt.compiler import backend
from attnopt.compiler.contract import Notes
from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.lower import lower
from attnopt.compiler.pipeline import apply_plan, read
from tests.families import Nano
from tests.tolerance import assert_close

LOWEST = torch.finfo(torch.float32).min


class Given(nn.Module):
    """A block whose whole mask `[batch, 1, seq, seq]` is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * 0.25
        kept = scores.masked_fill(~mask, LOWEST) if mask.dtype == torch.bool else scores + mask
        made: Tensor = x + self.out((kept.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return made


def _masks(length: int) -> dict[str, Tensor]:
    ones = torch.ones(2, 1, length, length, dtype=torch.bool)
    rest = torch.rand(2, 1, length, length) < 0.5
    rest[:, :, :, 0] = True
    gap = rest & (torch.arange(length) != 3)[:, None]
    return {
        "causal": ones.tril(), "full": ones, "anti-causal": ones.triu(),
        "window": ones.tril().triu(-3), "scattered": rest, "a row without keys": gap,
    }  # fmt: skip


def _added(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, LOWEST)


@pytest.mark.parametrize("form", ["bool", "added"])
@pytest.mark.parametrize("through", ["plan", "backend"])
def test_a_whole_mask_that_was_causal(through: str, form: str) -> None:
    model = Given().eval()
    spelled: Callable[[Tensor], Tensor] = _added if form == "added" else lambda mask: mask
    inputs = {"x": torch.randn(2, 12, 32), "mask": spelled(_masks(12)["causal"])}
    if through == "plan":
        program = read(Loaded(model, None, (), dict(inputs), "given", "callable"))
        assert program.sites[0].mask_certainty == "observed" or program.sites[0].mask == "tensor"
        made, outcomes = apply_plan(program, compose([]), Notes(program))
        assert any(o.rewrite == "fuse_attention{}" and o.applied for o in outcomes)
        fast: Any = lower(made)
    else:
        torch._dynamo.reset()
        fast = torch.compile(model, backend=_lowered)
        fast(**inputs)
    with torch.no_grad():
        for length in (12, 9, 20):
            x = torch.randn(2, length, 32)
            for name, mask in _masks(length).items():
                given = {"x": x, "mask": spelled(mask)}
                assert_close(fast(**given), model(**given), f"{name} at {length}")


def _lowered(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    numbers = [x.node.hint if isinstance(x, torch.SymInt) else x for x in inputs]
    found = backend._rewritten(graph, numbers)
    assert found is not None
    return found[0].forward


def test_lengths_from_64_to_4096_take_two_compilations() -> None:
    torch._dynamo.reset()
    made: list[int] = []

    def counted(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        made.append(1)
        return _lowered(graph, inputs)

    model = Nano(5000).eval()  # at its own length the slice of its mask is another graph
    compiled = torch.compile(model, backend=counted)
    with torch.no_grad():
        for length in (64, 100, 1000, 2048, 4096, 65):
            x = torch.randn(1, length, 64)
            assert_close(compiled(x), model(x), f"{length} tokens")
    assert len(made) <= 2
