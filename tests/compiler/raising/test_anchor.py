"""The walk from a softmax to its product of q and k: what it takes along is exact, and what it does
not understand it says.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.program import Program
from attnopt.compiler.raising import raise_program
from attnopt.compiler.trace import trace
from tests.tolerance import assert_close

Weights = Callable[[Tensor, Tensor], Tensor]
_LOWEST = torch.finfo(torch.float64).min


class Attention(nn.Module):
    """Eager attention of 2 heads; `weights(scores, real)` makes the softmax, `real` [batch, T]."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.weights = weights
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        q, k, v = (p.unflatten(2, (2, 4)).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        made = self.weights(q @ k.transpose(-1, -2) * 0.5, real) @ v
        y: Tensor = self.out(made.transpose(1, 2).flatten(2)) + 0 * real.sum()
        return y


def inputs(batch: int, length: int) -> dict[str, Tensor]:
    """Right padding in the first sequence; the last, where there are several, has no real token."""
    real = torch.ones(batch, length, dtype=torch.bool)
    real[0, -2:] = False
    real[batch - 1] &= batch == 1
    return {"x": torch.randn(batch, length, 8, dtype=torch.float64), "real": real}


def raised(model: nn.Module, given: dict[str, Tensor]) -> Program:
    return raise_program(trace(Loaded(model.eval(), None, (), given, "anchor", "callable")))


def distances(scores: Tensor) -> Tensor:
    at = torch.arange(scores.shape[-1])
    return (at[None] - at[:, None]).to(scores.dtype)


def causal(scores: Tensor) -> Tensor:
    return distances(scores) > 0


def dropped(real: Tensor) -> Tensor:
    return ~real[:, None, None, :]


def sinks(scores: Tensor) -> Tensor:
    """A learned logit per head, as one more column."""
    return (
        torch.tensor([0.5, -1.0], dtype=scores.dtype)
        .view(1, 2, 1, 1)
        .expand(scores.shape[0], -1, scores.shape[2], 1)
    )


def less_most(logits: Tensor) -> Tensor:
    return logits - logits.max(-1, keepdim=True).values


def bias(real: Tensor) -> Tensor:
    return torch.zeros(real.shape, dtype=torch.float64)[:, None, None].masked_fill(
        dropped(real), -torch.inf
    )


EXACT: dict[str, Weights] = {
    "add with alpha": lambda s, r: torch.add(s, distances(s), alpha=0.5).softmax(-1),
    "score under alpha": lambda s, r: torch.add(distances(s), s, alpha=0.5).softmax(-1),
    "sub with alpha": lambda s, r: torch.sub(s, distances(s), alpha=0.5).softmax(-1),
    "bounded bias": lambda s, r: (s + bias(r)).clamp(min=_LOWEST).softmax(-1),
    "bounded fill": lambda s, r: (
        s.masked_fill(dropped(r), -torch.inf).clamp(min=_LOWEST).softmax(-1)
    ),
    "heads joined and split": lambda s, r: (
        s.view(-1, *s.shape[-2:]).view(s.shape).masked_fill(dropped(r), _LOWEST).softmax(-1)
    ),
    "dropout asleep": lambda s, r: nn.functional.dropout(s.softmax(-1), 0.3, training=False),
    "wider and back": lambda s, r: s.double().softmax(-1).to(s.dtype),
    "lowest before a bias": lambda s, r: (s.masked_fill(causal(s), _LOWEST) + distances(s)).softmax(
        -1
    ),
    "lowest twice before a bias": lambda s, r: (
        torch.where(dropped(r), _LOWEST, s.masked_fill(causal(s), _LOWEST)) + distances(s)
    ).softmax(-1),
    "sinks": lambda s, r: torch.cat([s, sinks(s)], -1).softmax(-1)[..., :-1],
    "sinks under the maximum": lambda s, r: less_most(
        torch.cat([s.masked_fill(dropped(r), _LOWEST), sinks(s)], -1)
    ).softmax(-1)[..., :-1],
    "maximum taken off": lambda s, r: (s - s.amax(-1, keepdim=True)).softmax(-1),
    "temperature of a head": lambda s, r: (
        s * torch.tensor([0.5, 2.0], dtype=s.dtype).view(2, 1, 1)
    ).softmax(-1),
    "temperature of a query": lambda s, r: (
        (s / (1 + torch.arange(s.shape[-2], dtype=s.dtype))[:, None])
        .masked_fill(dropped(r), _LOWEST)
        .softmax(-1)
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_takes_along_what_is_done_to_the_scores(name: str) -> None:
    model = Attention(EXACT[name]).double()
    program = raised(model, inputs(2, 8))
    assert not program.unraised
    assert len(program.sites) == 1
    for batch, length in ((2, 8), (3, 6)):
        given = inputs(batch, length)
        with torch.no_grad():
            assert_close(program(**given), model(**given), name)


STOPS: dict[str, tuple[Weights, str]] = {
    "softmax in two blocks": (
        lambda s, r: s.unflatten(3, (2, -1)).reshape(*s.shape[:3], 2, -1).softmax(-1).view(s.shape),
        "a change of shape splits or merges the axes of queries and keys",
    ),
    "softmax over all": (
        lambda s, r: s.reshape(*s.shape[:2], -1).softmax(-1).reshape(s.shape),
        "a change of shape splits or merges the axes of queries and keys",
    ),
    "whole logits": (
        lambda s, r: s.to(torch.int32).to(s.dtype).softmax(-1),
        "cast from torch.int32",
    ),
    "whole weights": (lambda s, r: s.softmax(-1).long().to(s.dtype), "to torch.int64"),
    "active dropout": (
        lambda s, r: nn.functional.dropout(s.softmax(-1), 0.3, training=True),
        "dropout is active",
    ),
    "mixed fills": (
        lambda s, r: s.masked_fill(causal(s), -torch.inf).masked_fill(dropped(r), -1e9).softmax(-1),
        "some logits are replaced by -inf, others by -1e+09",
    ),
    "two low numbers": (
        lambda s, r: s.masked_fill(causal(s), -1e9).masked_fill(dropped(r), -1e5).softmax(-1),
        "some logits are replaced by -1e+09, others by -100000",
    ),
    "bound inside a mask": (
        lambda s, r: (
            s.clamp(min=_LOWEST).masked_fill(dropped(r), -torch.inf).clamp(min=_LOWEST).softmax(-1)
        ),
        "bounded below",
    ),
    "bias after a fill": (
        lambda s, r: (s.masked_fill(causal(s), -1e9) + distances(s)).softmax(-1),
        "a bias or mask is added to logits already replaced by -1e+09",
    ),
    "bias below a lowest number": (
        lambda s, r: ((s + distances(s)).masked_fill(dropped(r), _LOWEST) + distances(s)).softmax(
            -1
        ),
        "a bias is added to logits before",
    ),
    "fill below a lowest number": (
        lambda s, r: (
            s.masked_fill(causal(s), -torch.inf).masked_fill(dropped(r), _LOWEST) + distances(s)
        ).softmax(-1),
        "some logits are replaced by -inf, others by",
    ),
    "narrow bias after a lowest number": (
        lambda s, r: (s.masked_fill(causal(s), _LOWEST) + distances(s).bfloat16()).softmax(-1),
        "a bias or mask is added to logits already replaced",
    ),
    "temperature of a key": (
        lambda s, r: (s * torch.arange(s.shape[-1], dtype=s.dtype)).softmax(-1),
        "differs between keys",
    ),
    "bias under a temperature": (
        lambda s, r: ((s + distances(s)) * torch.ones(2, 1, 1, dtype=s.dtype)).softmax(-1),
        "inside a scale by a tensor",
    ),
    "the divisor": (
        lambda s, r: (torch.ones(2, 1, 1, dtype=s.dtype) / s).softmax(-1),
        "divided by the logits",
    ),
    "two sinks": (
        lambda s, r: torch.cat([s, 0 * s[..., :2]], -1).softmax(-1)[..., :-2],
        "attention sinks",
    ),
    "a sink whose weight is kept": (
        lambda s, r: torch.cat([s[..., :-1], 0 * s[..., :1]], -1).softmax(-1),
        "attention sinks",
    ),
    "sinks under another maximum": (
        lambda s, r: torch.cat([s, 0 * s[..., :1]], -1).sub(s.amax()).softmax(-1)[..., :-1],
        "not understood",
    ),
    "mask of five axes": (
        lambda s, r: (
            (s.view(-1, 2, *s.shape[1:]) + torch.ones(1, 2, 1, *s.shape[2:], dtype=s.dtype))
            .view(s.shape)
            .softmax(-1)
        ),
        "other axes than batch and heads",
    ),
}


@pytest.mark.parametrize("name", STOPS)
def test_stops_and_says_why(name: str) -> None:
    weights, reason = STOPS[name]
    program = raised(Attention(weights).double(), inputs(4, 8))
    assert not program.sites
    (miss,) = program.unraised
    assert reason in miss.reason


class Wide(Attention):
    """Scores in float32 over values in the model's own dtype, as in GPT-J."""

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        q, k, v = (p.unflatten(2, (2, 4)).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        scores = (q.float() @ k.float().transpose(-1, -2)).masked_fill(dropped(real), -1e9)
        made = scores.softmax(-1).to(v.dtype) @ v
        y: Tensor = self.out(made.transpose(1, 2).flatten(2))
        return y


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_scores_may_be_wider_than_values(backend: str) -> None:
    model = Wide(lambda s, r: s).bfloat16()
    given = inputs(2, 8)
    given["x"] = given["x"].bfloat16()
    program = raised(model, given)
    (site,) = program.sites
    (node,) = program.attentions()
    assert site.v is not None
    assert site.out is not None
    assert len({arg.meta["val"].dtype for arg in node.args[:3]}) == 1  # type: ignore[union-attr]
    node.args = (*node.args[:4], site.spec.with_(backend=backend).text)
    with torch.no_grad():
        made, expected = program(**given), model(**given)
    torch.testing.assert_close(made, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("fused", [False, True])
def test_keys_without_a_batch_are_a_miss(fused: bool) -> None:
    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.kv = nn.Linear(8, 8), nn.Linear(8, 16)
            self.slots = nn.Parameter(torch.randn(6, 8))

        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x).unflatten(2, (2, 4)).transpose(1, 2)
            k, v = (p.unflatten(1, (2, 4)).transpose(0, 1) for p in self.kv(self.slots).chunk(2, 1))
            if fused:
                return nn.functional.scaled_dot_product_attention(q, k, v)
            return (q @ k.transpose(-1, -2)).softmax(-1) @ v

    program = raised(Memory(), {"x": torch.randn(2, 5, 8)})
    (miss,) = program.unraised
    assert "have rank 3" in miss.reason


def test_a_wider_temperature_is_a_miss() -> None:
    weights: Weights = lambda s, r: (s * torch.ones(2, 1, 1)).softmax(-1).to(s.dtype)  # noqa: E731
    given = inputs(2, 8)
    program = raised(Attention(weights).bfloat16(), {**given, "x": given["x"].bfloat16()})
    (miss,) = program.unraised
    assert "scaled by a tensor of torch.float32" in miss.reason


class Joined(nn.Module):
    """Heads folded into the batch, with one projection for all heads behind the attention."""

    def __init__(self, temperature: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.temperature = nn.Linear(8, 24), nn.Linear(4, 4), temperature

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p.unflatten(2, (2, 4)).transpose(1, 2).flatten(0, 1) for p in self.qkv(x).chunk(3, -1)
        )
        scores = q @ k.transpose(-1, -2)
        if self.temperature:
            split = scores.unflatten(0, (-1, 2)) * torch.ones(2, 1, 1, dtype=x.dtype)
            scores = split.flatten(0, 1)
        made: Tensor = self.out(scores.softmax(-1) @ v)
        return made


@pytest.mark.parametrize("temperature", [False, True])
def test_heads_in_the_batch_are_counted_where_each_has_its_own_projection(
    temperature: bool,
) -> None:
    model = Joined(temperature).double()
    given = {"x": torch.randn(3, 8, 8, dtype=torch.float64)}
    program = raised(model, given)
    with torch.no_grad():
        assert_close(program(**given), model(**given), "heads in the batch")
    if not temperature:
        (site,) = program.sites
        assert site.spec.heads == 2 and site.q and site.k and site.v
