"""toeplitz_bias: a bias of distances is worked out once per distance, bit for bit; others stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnopt.compiler.contract import Notes, read_pass
from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.pipeline import apply_pass
from attnopt.compiler.plan import Outcome
from attnopt.compiler.program import Program
from attnopt.compiler.raising import raise_program
from attnopt.compiler.trace import trace


class Biased(nn.Module):
    """Two attentions with one bias, made of distances in one of several ways."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.table = nn.Embedding(40, 4)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias(x)
        return self.attend(self.attend(x, bias), bias)

    def attend(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(-1, -2) * 8**-0.5 + bias).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(x.shape))

    def bias(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1])
        far = at[None, :] - at[:, None]
        if self.kind == "query minus key":
            far = at[:, None] - at[None, :]
        if self.kind == "narrow":
            at = at.to(torch.int8)
            far = (at[None, :] - at[:, None]).long()
        if self.kind == "doubled":
            far = 2 * at[None, :] - at[:, None]
        if self.kind == "shifted":
            far = at[None, :] - (at[:, None] + 1)
        if self.kind == "position added":
            far = far + at[:, None]
        if self.kind == "summed":
            far = far.cumsum(-1)
        bias = self.table(far.clamp(-20, 19) + 20).permute(2, 0, 1)
        return bias.transpose(1, 2)[None] if self.kind == "turned" else bias[None]


def rewritten(kind: str, length: int = 9) -> tuple[nn.Module, Program, list[Outcome]]:
    torch.manual_seed(0)
    model = Biased(kind).double().eval()
    inputs = {"x": torch.randn(2, length, 32).double()}
    program = raise_program(trace(Loaded(model, None, (), inputs, "m", "callable")))
    made, outcomes = apply_pass(program, read_pass("toeplitz_bias"), ("*",), Notes(program))
    return model, made, outcomes


@pytest.mark.parametrize("kind", ["key minus query", "query minus key"])
@pytest.mark.parametrize("length", [1, 2, 9, 33])
def test_the_bias_is_the_same_bit_for_bit(kind: str, length: int) -> None:
    model, program, outcomes = rewritten(kind)
    assert sorted(outcome.applied for outcome in outcomes) == [False, True]
    assert outcomes[0].reason == "it reads a bias that was rewritten at another attention"
    (embedding,) = [n for n in program.graph.nodes if n.target is torch.ops.aten.embedding.default]
    assert embedding.meta["val"].shape[0] == 1
    x = torch.randn(3, length, 32).double()
    bias = program.attentions()[0].args[3][0]  # type: ignore[index]
    seen: dict[str, Any] = {}

    class Seen(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            seen[n.name] = super().run_node(n)
            return seen[n.name]

    Seen(program.module).run(x, enable_io_processing=False)
    assert torch.equal(seen[bias.name], model.bias(x))  # type: ignore[union-attr,operator]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("doubled", "not made of arange"),
        ("narrow", "not made of arange"),
        ("shifted", "not made of arange"),
        ("position added", "each distance alone"),
        ("summed", "each distance alone"),
        ("turned", None),
    ],
)
def test_what_is_no_bias_of_distances_stays(kind: str, reason: str | None) -> None:
    model, program, outcomes = rewritten(kind)
    if reason is None:  # queries and keys have changed places: another Toeplitz matrix
        reason = "not the last two axes"
    assert not any(outcome.applied for outcome in outcomes)
    assert reason in outcomes[0].reason
    x = torch.randn(2, 9, 32).double()
    torch.testing.assert_close(program(x=x), model(x))
