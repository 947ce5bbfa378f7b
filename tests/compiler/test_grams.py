"""Streamed second moments are those of all the activations at once, without the padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnopt.compiler import grams
from attnopt.compiler.contract import Notes
from attnopt.compiler.grams import (
    Gram,
    input_moments,
    latest_moments,
    moments,
    rows,
    with_one,
)  # fmt: skip
from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.program import Batch, Program, peek
from attnopt.compiler.trace import trace
from tests.decoder import VOCABULARY, decoder
from tests.tolerance import assert_close


def batch(seed: int, valid: torch.Tensor | None = None) -> Batch:
    made = torch.Generator().manual_seed(seed)
    return Batch((), {"input_ids": torch.randint(0, VOCABULARY, (3, 9), generator=made)}, valid)


def test_streamed_moments_are_those_of_all_rows() -> None:
    program = decoder()
    name = program.sites[1].q.source  # type: ignore[union-attr]
    real = torch.ones(3, 9, dtype=torch.bool)
    real[0, 4:] = False
    batches = [batch(1), batch(2, real)]
    seen = torch.cat([rows(peek(program, [name], b)[name], b.valid) for b in batches]).double()
    found = moments(program, [name], batches)[name]
    assert len(seen) == 2 * 27 - 5
    assert found.rows == len(seen)
    assert_close(found.xx, with_one(seen).T @ with_one(seen))


def test_errors_follow_from_moments() -> None:
    x, y, w = torch.randn(40, 5), torch.randn(40, 3), torch.randn(5, 3).double()
    sums = Gram.empty(5, 3)
    sums.add(x[:15], y[:15])
    sums.add(x[15:], y[15:])
    expected = (x.double() @ w - y.double()).square().sum()
    assert sums.error(w) == pytest.approx(float(expected), rel=1e-10)


def test_rows_take_either_order_of_batch_and_seq() -> None:
    value = torch.randn(3, 9, 4)
    real = torch.rand(3, 9) > 0.4
    assert torch.equal(rows(value, real), value[real])
    crossed = rows(value.transpose(0, 1), real)
    assert sorted(crossed.tolist()) == sorted(value[real].tolist())
    assert torch.equal(rows(value.reshape(27, 4), real), value[real])
    with pytest.raises(ValueError, match="does not match"):
        rows(value[:2], real)


class TwoSequences(nn.Module):
    """An encoder with a mask, and a decoder of another length without one."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor, y: Tensor) -> Tensor:
        memory = (self.encoder(x) * mask[..., None]).sum(1, keepdim=True)
        flat = self.decoder(y.reshape(-1, 4)).reshape(y.shape)
        made: Tensor = self.decoder(flat + memory)
        return made


def test_a_mask_cuts_its_own_sequence_only() -> None:
    mask = torch.ones(3, 6, dtype=torch.int64)
    mask[0, 4:] = 0
    for length in (9, 6):  # the last is as long as the encoder's by chance
        given = {"x": torch.randn(3, 6, 4), "mask": mask, "y": torch.randn(3, 9, 4)}
        program = trace(Loaded(TwoSequences().eval(), None, (), given, "two", "callable"))
        given["y"] = given["y"][:, :length]
        one = Batch((), given, mask.bool())
        names = [n.name for n in program.graph.nodes if n.target is torch.ops.aten.linear.default]
        assert len(names) == 3
        found = moments(program, names, [one])
        assert [found[name].rows for name in names] == [16, 3 * length, 3 * length]


def test_one_pass_serves_every_site(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnopt.compiler import grams

    program = decoder().copy()
    calls: list[int] = []
    monkeypatch.setattr(grams, "peek", lambda *args, **how: calls.append(1) or peek(*args, **how))
    known = Notes(program, [batch(1), batch(2)], [batch(3)])
    names = [site.q.source for site in program.sites]  # type: ignore[union-attr]
    first = input_moments(known, [names[0]])[names[0]]
    assert len(calls) == 2
    second = input_moments(known, [names[1]])[names[1]]
    assert len(calls) == 2
    assert not torch.equal(first.xx, second.xx)
    assert input_moments(known, names, heldout=True)[names[0]].rows == 27
    assert len(calls) == 3
    other = Notes(program, [batch(4)], [])
    assert not torch.equal(input_moments(other, names)[names[0]].xx, first.xx)


def test_too_much_to_keep_is_made_one_site_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grams, "_KEEP_BYTES", 1)
    program = decoder().copy()
    known = Notes(program, [batch(1)])
    names = [site.q.source for site in program.sites]  # type: ignore[union-attr]
    assert set(input_moments(known, names[:1])) == {names[0]}
    assert not grams._entry(program, known.calibration, grams._kept)


def test_what_is_tried_at_one_program_shares_its_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    program, batches, ran = decoder().copy(), [batch(1), batch(2)], list[Sequence[str]]()

    def counted(
        program: Program, names: Sequence[str], given: Batch, there: bool
    ) -> dict[str, Any]:
        ran.append(names)
        return peek(program, names, given, there)

    monkeypatch.setattr(grams, "peek", counted)
    first, second = (site.q.source for site in program.sites)  # type: ignore[union-attr]
    found = latest_moments(program, [first], batches)
    assert latest_moments(program, [first], batches) == found and len(ran) == 2
    both = latest_moments(program, [first, second], batches)
    assert ran[2:] == [[second]] * 2 and both[first] is found[first]
    latest_moments(program, [first], batches[:1])
    assert len(ran) == 5  # other data
    latest_moments(program.copy(), [first], batches)
    latest_moments(program, [first], batches)
    assert len(ran) == 9  # another program has come between
