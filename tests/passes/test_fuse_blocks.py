"""fuse_blocks: the folded map is the explicit one, the run is gone, the rest is missed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attnopt.compiler.contract import Miss, Notes, passes, read_pass
from attnopt.compiler.grams import Gram, with_one
from attnopt.compiler.pipeline import apply_pass
from attnopt.compiler.program import Batch, Program, record
from attnopt.compiler.raising import raise_program
from attnopt.compiler.removal import without
from attnopt.passes.fuse_blocks import fold, solve
from tests.residual_models import MLP, WIDTH, Attention, Decoder, traced
from tests.tolerance import assert_close


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(3)
    model = Decoder()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return raise_program(traced(model, torch.randint(0, 50, (2, 9))))


@pytest.fixture(scope="module")
def notes(program: Program) -> Notes:
    torch.manual_seed(1)
    return Notes(program, [Batch((torch.randint(0, 50, (4, 16)),)) for _ in range(12)])


def test_the_folded_map_is_the_explicit_one(program: Program, notes: Notes) -> None:
    before, first, last = program.sublayers[1:4]
    made, (outcome,) = apply_pass(program, read_pass("fuse_blocks{}"), [first.id], notes)
    assert outcome.applied, outcome.reason
    sums = Gram.empty(WIDTH + 1, WIDTH)
    names = [before.branch, before.entry, last.exit]
    for batch in notes.calibration:
        found, _ = record(program, names, batch)
        m, s, end = (found[name].flatten(0, 1).double() for name in names)
        sums.add(with_one(m), end - s)
    explicit = solve(sums, 1e-2, True)
    for shape in ((2, 9), (3, 21)):
        batch = Batch((torch.randint(0, 50, shape),))
        found, _ = record(program, [before.branch, before.entry], batch)
        m, s = found[before.branch].double(), found[before.entry].double()
        expected = s + m @ explicit[:-1] + explicit[-1]
        actual, _ = record(made, [before.exit], batch)
        assert_close(actual[before.exit], expected.float())


def test_the_run_is_gone_and_the_map_is_better_than_nothing(program: Program, notes: Notes) -> None:
    made, (outcome,) = apply_pass(program, read_pass("fuse_blocks{}"), ["b1.attention"], notes)
    assert [layer.id for layer in made.sublayers] == ["b0.attention", "b0.mlp"]
    assert len(made.attentions()) == len(made.sites) == 1
    plain = without(program, program.sublayers[2:])
    assert {n.name for n in made.graph.nodes} == {n.name for n in plain.graph.nodes}
    assert outcome.evidence["residual"] < outcome.evidence["residual_deleted"]


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_folding_is_exact_in_both_layouts(layout: str) -> None:
    z, weight, bias = torch.randn(9, 6), torch.randn(6, 4), torch.randn(4)
    made = torch.randn(5, 4).double()
    kept = weight.T.contiguous() if layout == "out_in" else weight
    new, shift = fold(kept, bias, made, layout)  # type: ignore[arg-type]
    assert new.shape == kept.shape
    assert shift is not None
    expected = (z @ weight + bias).double() @ made[:-1] + made[-1]
    assert_close(z @ (new.T if layout == "out_in" else new) + shift, expected)
    bare, none = fold(kept, None, made[:-1], layout)  # type: ignore[arg-type]
    assert none is None
    assert_close(
        z @ (bare.T if layout == "out_in" else bare), z.double() @ weight.double() @ made[:-1]
    )


def test_the_regression_leans_towards_the_identity() -> None:
    sums = Gram.empty(4, 3)
    sums.add(with_one(torch.zeros(5, 3)), torch.zeros(5, 3))
    sums.xx[0, 0] = 1.0
    sums.xy[0, 0] = 0.5
    made = solve(sums, 1e-9, True)
    assert_close(made[1:3, 1:3], torch.eye(2).double())
    assert made[0, 0] == pytest.approx(0.5, abs=1e-6)


class PostNorm(nn.Module):
    """Post-norm sublayers: a norm stands on the stream between them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), MLP()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](x + self.attention(x))
        return self.norms[1](x + self.mlp(x))


def test_misses() -> None:
    program = raise_program(traced(PostNorm(), torch.randn(2, 7, WIDTH)))
    notes = Notes(program, [Batch((torch.randn(4, 20, WIDTH),))])
    first, second = program.sublayers
    line = "fuse_blocks{length=1}"
    said = [
        read_pass(line).rewrite(second, program, notes),
        read_pass(line).rewrite(first, program, notes),
        read_pass("fuse_blocks{length=4}").rewrite(second, program, notes),
        read_pass(line).rewrite(second, program, Notes(program)),
    ]
    reasons = [miss.reason if isinstance(miss, Miss) else "no miss" for miss in said]
    assert "passes a norm" in reasons[0]
    assert "no sublayer before" in reasons[1]
    assert "fewer than 4" in reasons[2]
    assert "calibration" in reasons[3]


def test_reads_back_from_its_text() -> None:
    made = passes()["fuse_blocks"](length=4, ridge=1e-4)
    assert read_pass(made.text) == made
