"""Rotations and tables of positions: told apart from what only looks like them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.program import Program
from attnopt.compiler.raising import raise_program
from attnopt.compiler.raising.absolute import absolute_positions
from attnopt.compiler.raising.evaluate import Unknown
from attnopt.compiler.raising.rotation_probe import _gridded, _linear, _NotLinear
from attnopt.compiler.trace import trace

_FREQUENCIES = 10000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)


def turned(angles: Tensor, interleaved: bool) -> Tensor:
    """Random vectors `[probes, positions, 16]` turned by angles `[positions, 8]`."""
    torch.manual_seed(0)
    x = torch.randn(6, 1, 16, dtype=torch.float64)
    pairs = torch.arange(16).view(8, 2).T if interleaved else torch.arange(16).view(2, 8)
    a, b = x[..., pairs[0]], x[..., pairs[1]]
    made = torch.empty(6, len(angles), 16, dtype=torch.float64)
    made[..., pairs[0]] = a * angles.cos() - b * angles.sin()
    made[..., pairs[1]] = a * angles.sin() + b * angles.cos()
    return made


def grid(rows: int, columns: int, prefix: int = 0) -> Tensor:
    """Angles of a 2-D rotary embedding from (0, 0) on, after tokens that do not turn."""
    half = _FREQUENCIES[:4]
    laid = [torch.cat((r * half, c * half)) for r in range(rows) for c in range(columns)]
    return torch.stack([*([torch.zeros(8, dtype=torch.float64)] * prefix), *laid])


@pytest.mark.parametrize("interleaved", [False, True])
def test_linear_in_the_position(interleaved: bool) -> None:
    angles = torch.arange(7.0, dtype=torch.float64)[:, None] * _FREQUENCIES
    pairs, frequencies = _linear(turned(angles, interleaved))
    assert len(pairs) == 8
    assert torch.allclose(frequencies.sort().values, _FREQUENCIES.sort().values)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "angles", [grid(4, 4), grid(3, 4), grid(2, 6), grid(4, 4, 1), grid(3, 5, 5)]
)
def test_rows_and_columns_of_a_grid(angles: Tensor, interleaved: bool) -> None:
    with pytest.raises(_NotLinear):
        _linear(turned(angles, interleaved))
    pairs, _ = _gridded(turned(angles, interleaved))
    assert len(pairs) == 8


@pytest.mark.parametrize(
    "angles",
    [
        (torch.arange(8, dtype=torch.float64) // 2)[:, None] * _FREQUENCIES,
        torch.rand(8, 8, dtype=torch.float64),
        torch.zeros(8, 8, dtype=torch.float64),
    ],
    ids=["each position twice", "random", "none"],
)
def test_other_rotations_are_unknown(angles: Tensor) -> None:
    with pytest.raises(Unknown):
        _linear(turned(angles, False))
    with pytest.raises(Unknown):
        _gridded(turned(angles, False))


class Looking(nn.Module):
    """Tokens with a table that is looked up in the way that `how` names."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.tokens, self.table = nn.Embedding(20, 8), nn.Embedding(20, 8)
        self.register_buffer("one", torch.tensor(1))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        if self.how == "counted":
            x = x + self.table((ids != 0).cumsum(1))
        elif self.how == "one kind":
            x = x + self.table(self.one)
        elif self.how == "tokens":
            x = x + self.table(ids)
        elif self.how == "distances":
            at = torch.arange(ids.shape[1])
            x = x + self.table((at[:, None] - at[None]).abs()).sum(1)
        made: Tensor = nn.functional.scaled_dot_product_attention(x, x, x)
        return made


@pytest.mark.parametrize(
    ("how", "kind"),
    [("counted", "learned"), ("one kind", "none"), ("tokens", "none"), ("distances", "learned")],
)
def test_tables_that_are_looked_up(how: str, kind: str) -> None:
    given = {"ids": torch.randint(1, 9, (2, 7))}
    traced = trace(Loaded(Looking(how).eval(), None, (), given, "looking", "callable"))
    assert absolute_positions(traced) == kind


def _masked(convolution: bool) -> Program:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)
            self.patches = nn.Conv2d(1, 1, 1) if convolution else nn.Identity()

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            q, k, v = (p.unflatten(2, (2, 4)).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
            made: Tensor = nn.functional.scaled_dot_product_attention(q, k, v, self.patches(mask))
            return made

    given = {"x": torch.randn(2, 9, 8), "mask": torch.zeros(2, 1, 9, 9)}
    return raise_program(trace(Loaded(Model().eval(), None, (), given, "masked", "callable")))


def test_a_float_mask_is_no_image() -> None:
    assert set(_masked(False).dynamic["mask"]) == {0, 2, 3}
    assert set(_masked(True).dynamic["mask"]) == {0}


class Rotated(nn.Module):
    """A causal attention whose table of angles is rounded to the dtype of its inputs."""

    def __init__(self, stored: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Embedding(50, 32), nn.Linear(32, 96)
        angles = torch.arange(24)[:, None] * _FREQUENCIES.float()
        self.register_buffer("turns", torch.cat((angles, angles), -1).cos().to(stored))
        self.register_buffer("more", torch.cat((angles, angles), -1).sin().to(stored))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        cos, sin = (t[: x.shape[1]].to(x.dtype) for t in (self.turns, self.more))
        q, k = (t * cos + torch.cat((-t[..., 8:], t[..., :8]), -1) * sin for t in (q, k))
        made = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return made.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_table_that_is_rounded_at_run_time_is_read_before_it_is(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Rotated().eval()
    for part in (model.embed, model.qkv):
        part.to(dtype)
    ids = {"input_ids": torch.randint(0, 50, (2, 12))}
    (site,) = raise_program(trace(Loaded(model, None, (), ids, "m", "callable"))).sites
    assert site.rotary is not None, site.missing
    found = site.rotary.frequencies.sort().values
    assert torch.allclose(found, _FREQUENCIES.sort().values, rtol=1e-3)


def test_a_table_that_is_stored_rounded_is_none() -> None:
    """Its pairs do not turn: their lengths change from position to position."""
    torch.manual_seed(0)
    ids = {"input_ids": torch.randint(0, 50, (2, 12))}
    model = Rotated(torch.bfloat16).eval()
    (site,) = raise_program(trace(Loaded(model, None, (), ids, "m", "callable"))).sites
    assert site.rotary is None and "rotary" in site.missing
