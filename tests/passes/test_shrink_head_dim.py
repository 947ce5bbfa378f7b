"""shrink_head_dim: exact where heads have no more dims, else what was told is lost and no more."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn

from attnopt.compiler import head_dims
from attnopt.compiler.contract import Edit, Notes, passes, read_pass
from attnopt.compiler.decode import derive
from attnopt.compiler.gauge import unpaired
from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.lower import export
from attnopt.compiler.program import Batch, Program
from attnopt.compiler.raising import raise_program
from attnopt.compiler.site import Path
from attnopt.compiler.site_heads import Heads, output_source
from attnopt.compiler.site_weights import read_weight
from attnopt.compiler.trace import trace
from attnopt.passes.refit import Refit
from attnopt.passes.shrink_head_dim import ShrinkHeadDim
from tests.attention_models import (
    applied,
    distance,
    fused,
    logits,
    missed,
    notes,
    put,
    raised,
    rewritten,
    tokens,
)  # fmt: skip
from tests.tolerance import assert_close

HALF = "shrink_head_dim{keep=0.5}"


def shrunk(kind: str, line: str = HALF) -> tuple[Program, Edit]:
    return rewritten(kind, line)


def thin(program: Program) -> Program:
    """The program with heads of half the dims: values and dims in no rotary pair in a random
    subspace of that size, half of the rotary pairs zero."""
    made = program.copy()
    site = made.sites[0]
    pairs = site.rotary.pairs if site.rotary is not None else torch.empty(0, 2).long()
    for which in ("q", "k", "v"):
        path = cast(Path, getattr(site, which))
        weight, bias = read_weight(made, path)
        dim = weight.shape[1]
        maps = torch.eye(dim, dtype=torch.float64).repeat(len(weight), 1, 1)
        free = torch.arange(dim) if which == "v" else unpaired(dim, pairs)
        if which != "v":
            gone = pairs[: len(pairs) // 2].reshape(-1)
            maps[:, gone, gone] = 0.0
        narrow = torch.randn(len(weight), len(free), len(free) // 2, dtype=torch.float64)
        at = free[:, None], free[None, :]
        maps[:, at[0], at[1]] = narrow @ narrow.mT / len(free)
        put(made, path, maps @ weight, None if bias is None else (maps @ bias[..., None])[..., 0])
    return made


@pytest.mark.parametrize("kind", ("llama", "learned", "bloom", "by groups"))
def test_heads_that_have_no_more_dims_shrink_with_no_loss(kind: str) -> None:
    program = thin(raised(kind))
    made, edits = applied(program, ShrinkHeadDim(0.5), notes(program))
    assert_close(logits(made, tokens(3, 19)), logits(program, tokens(3, 19)))
    assert edits[0].evidence["qk_predicted"] < 1e-12
    assert edits[0].evidence["v_predicted"] < 1e-12
    spec = made.spec(made.sites[0])
    assert (spec.head_dim, spec.v_dim) == (4, 4)
    assert spec.scale == program.spec(program.sites[0]).scale


def test_all_dims_in_another_basis_are_the_same_function() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 40, 8).double()
    a, b, lost, energy = head_dims.logits(q.mT @ q, k.mT @ k, 8)
    assert_close((q @ a) @ (k @ b).mT, q @ k.mT)
    assert lost < 1e-12 * energy
    weight = torch.randn(3, 8, 20).double()
    basis = head_dims.values(k.mT @ k, weight @ weight.mT, 8)
    assert_close(k @ basis.down @ basis.up @ weight, k @ weight)


def test_the_closed_forms_are_optimal() -> None:
    """As near as the singular values allow, and as they tell."""
    torch.manual_seed(1)
    mix = torch.randn(2, 8, 8).double()
    q, k = (torch.randn(1, 60, 8).double() @ m for m in mix)
    a, b, lost, energy = head_dims.logits(q.mT @ q, k.mT @ k, 3)
    true = q @ k.mT
    left = true - (q @ a) @ (k @ b).mT
    best = torch.linalg.svdvals(true)[0, 3:].square().sum()
    assert float(left.square().sum()) == pytest.approx(float(best), rel=1e-9)
    assert lost == pytest.approx(float(best), rel=1e-9)
    assert energy == pytest.approx(float(true.square().sum()), rel=1e-9)
    weight = torch.randn(1, 8, 20).double()
    basis = head_dims.values(k.mT @ k, weight @ weight.mT, 3)
    wrong = k @ weight - k @ basis.down @ basis.up @ weight
    best = torch.linalg.svdvals(k @ weight)[0, 3:].square().sum()
    assert float(wrong.square().sum()) == pytest.approx(float(best), rel=1e-9)
    assert basis.lost == pytest.approx(float(best), rel=1e-9)


def test_the_logits_lose_what_was_told() -> None:
    """Measured on the operands of both graphs, over all pairs of tokens, without rotary."""
    program, known = raised("learned"), notes(raised("learned"))
    made, edit = shrunk("learned")
    old, new = (operands(p, known) for p in (program, made))
    truth = old[0] @ old[1].mT
    lost = (truth - new[0] @ new[1].mT).square().sum() / truth.square().sum()
    assert edit.evidence["qk_predicted"] == pytest.approx(float(lost), rel=1e-9)
    assert edit.evidence["qk_residual"] == pytest.approx(float(lost), rel=1e-9)
    assert edit.evidence["qk_heldout"] > 0.5 * float(lost)


@pytest.mark.parametrize("kind", ("llama", "partial"))
def test_rotary_pairs_go_whole_and_lose_what_was_told(kind: str) -> None:
    """Kept pairs hold after rotary what they held before it was cut."""
    program, known = raised(kind), notes(raised(kind))
    made, edit = shrunk(kind, f"{HALF[:-1]} parts=qk}}")
    assert edit.evidence["qk_predicted"] == pytest.approx(edit.evidence["qk_residual"], rel=1e-9)
    before, after = program.sites[0].rotary, made.sites[0].rotary
    assert before is not None and after is not None
    where = [int((before.frequencies - f).abs().argmin()) for f in after.frequencies]
    assert torch.equal(before.frequencies[where], after.frequencies)
    (q, k), (small_q, small_k) = (operands(p, known) for p in (program, made))
    for old, new in ((q, small_q), (k, small_k)):
        assert_close(new[..., after.pairs], old[..., before.pairs[where]])
    q_power, k_power = (x[..., before.pairs].square().sum((1, 3)) for x in (q, k))
    both = (q_power * k_power / 2).sum(0)
    if kind == "llama":
        lost = 1 - float(both[where].sum() / both.sum())
        # The tables of sines are float32.
        assert edit.evidence["qk_predicted"] == pytest.approx(lost, rel=1e-6)
    assert both[where].min() >= both[[p for p in range(len(both)) if p not in where]].max()


def operands(program: Program, known: Notes) -> tuple[Tensor, Tensor]:
    """Queries and keys as the attention reads them, all tokens of a head in one axis:
    `[heads, tokens, head_dim]`."""
    q, k = (str(arg) for arg in program.node(program.sites[0].node).args[:2])
    found = [values for values, _ in known.record(program, [q, k])]
    joined = [torch.cat([v[name].transpose(0, 1).flatten(1, 2) for v in found], 1)
              for name in (q, k)]  # fmt: skip
    return joined[0], joined[1]


@pytest.mark.parametrize("kind", ("llama", "learned", "bloom"))
def test_values_lose_what_was_told(kind: str) -> None:
    """Measured head by head on what both graphs give, each read as it is by the output."""
    program, known = raised(kind), notes(raised(kind))
    made, edit = shrunk(kind, f"{HALF[:-1]} parts=v}}")
    heads = Heads.read(program, program.sites[0])
    train = Heads.read(made, made.sites[0])
    old, new = (results(p, known) for p in (program, made))
    weighed = old @ heads.out
    down = torch.linalg.lstsq(heads.v.mT, train.v.mT).solution
    assert_close(new, old @ down)
    best = torch.linalg.svdvals(weighed)[:, 4:].square().sum() / weighed.square().sum()
    assert edit.evidence["v_predicted"] == pytest.approx(float(best), rel=1e-9)
    least = torch.linalg.lstsq(new, weighed).solution
    lost = (weighed - new @ least).square().sum() / weighed.square().sum()
    assert edit.evidence["v_predicted"] == pytest.approx(float(lost), rel=1e-9)
    assert edit.evidence["out_residual"] <= edit.evidence["out_unfitted"]
    assert edit.evidence["out_heldout"] < 1


def results(program: Program, known: Notes) -> Tensor:
    """What heads give, `[heads, tokens, v_dim]`."""
    site = program.sites[0]
    assert site.out is not None
    source = output_source(program, site).name
    rows = torch.cat([v[source].flatten(0, -2) for v, _ in known.record(program, [source])])
    return rows[:, site.out.channels].transpose(0, 1)


@pytest.mark.parametrize("kind", ("llama", "learned"))
def test_the_tensors_are_smaller_and_all_that_follows_works(kind: str) -> None:
    program, (made, edit) = raised(kind), shrunk(kind)
    site, old = made.sites[0], program.sites[0]
    for which in ("q", "k", "v", "out"):
        now, then = getattr(site, which), getattr(old, which)
        assert 2 * now.channels.numel() <= then.channels.numel() * 4 / 3
        assert made.has(now.projection)
    assert "->" in edit.note
    module = export(made).module()
    for batch in (tokens(3, 19), tokens(2, 5)):
        assert_close(module(**batch.kwargs)["logits"], logits(made, batch))
    decoder, whole = derive(made), logits(made, tokens(2, 7))
    ids, state = tokens(2, 7).kwargs["input_ids"], decoder.state(2, 7)
    steps = [decoder.prefill(state, ids[:, :5]), *(decoder.step(state, ids[:, i : i + 1])
             for i in (5, 6))]  # fmt: skip
    assert_close(torch.cat(steps, 1), whole)
    assert decoder.bytes_per_token() <= derive(program).bytes_per_token() * 2 // 3
    data = Notes(program, [tokens(8, 24, 5), tokens(8, 24, 6)], [tokens(4, 24, 9)])
    answer = Refit().rewrite(site, made, data)
    assert isinstance(answer, Edit) or "held-out error would go from" in answer.reason
    assert distance(made, program) < 1


def test_a_norm_of_each_head_leaves_the_values() -> None:
    _, edit = shrunk("normed")
    assert "values 8 -> 4" in edit.note and "queries and keys stay: a norm" in edit.note
    program = raised("normed")
    assert "a norm" in missed(program, ShrinkHeadDim(0.5, "qk"), notes(program)).reason


def test_says_why_it_does_not_fire() -> None:
    program = raised("llama")
    known = notes(program)
    assert "made so" in missed(fused(program), ShrinkHeadDim(), known).reason
    assert "calibration" in missed(program, ShrinkHeadDim(), Notes(program)).reason
    assert "unknown parts `k`" in missed(program, ShrinkHeadDim(parts="k"), known).reason
    small = raised("grouped")
    assert "4 dims do not come in steps" in missed(small, ShrinkHeadDim(), notes(small)).reason


class Turned(nn.Module):
    """Shared keys, and rotary written as complex numbers of neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)
        self.o = nn.Linear(32, 32)
        self.register_buffer("speed", 0.3 ** torch.arange(4))

    def forward(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[1])[:, None] * cast(Tensor, self.speed)
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]
        q, k, v = (p(x).unflatten(-1, (-1, 8)) for p in (self.q, self.k, self.v))
        q, k = (
            torch.view_as_real(torch.view_as_complex(part.unflatten(-1, (-1, 2))) * turn).flatten(3)
            for part in (q, k)
        )
        k, v = (part.repeat_interleave(2, dim=2) for part in (k, v))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        made: Tensor = x + self.o(mixed.transpose(1, 2).flatten(2))
        return made


def test_complex_rotary_and_shared_keys() -> None:
    loaded = Loaded(
        Turned().double().eval(), None, (), {"x": torch.randn(2, 9, 32).double()}, "turned",
        "callable",
    )  # fmt: skip
    program = raise_program(trace(loaded))
    data = [Batch((), {"x": torch.randn(4, 12, 32).double()}) for _ in range(3)]
    thinner = thin(program)
    made, edits = applied(thinner, ShrinkHeadDim(0.5), Notes(thinner, data[:2], data[2:]))
    assert "2 rotary pairs" in edits[0].note and "values 8 -> 4" in edits[0].note
    assert_close(made.run(data[0]), thinner.run(data[0]))


def test_reads_back_from_its_text() -> None:
    made = passes()["shrink_head_dim"](keep=0.5, parts="v")
    assert made.text == "shrink_head_dim{keep=0.5 parts=v}"
    assert read_pass(made.text) == made
