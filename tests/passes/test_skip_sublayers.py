"""skip_sublayers: deletion is removal by hand; linear maps are exact for linear sublayers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from attnopt.compiler.contract import Edit, Miss, Notes, passes, read_pass
from attnopt.compiler.damage import Damage
from attnopt.compiler.pipeline import apply_pass
from attnopt.compiler.program import Batch, Program, record
from attnopt.compiler.raising import raise_program
from attnopt.compiler.removal import edited
from tests.residual_models import WIDTH, Attention, Block, Decoder, traced, traced_family
from tests.tolerance import assert_close


class Linear(nn.Module):
    """Two projections and nothing between them: linear in its input."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.out = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.value(x))


def decoder(linear_block: int | None = None) -> Decoder:
    torch.manual_seed(3)
    model = Decoder()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    if linear_block is not None:
        block = model.blocks[linear_block]
        assert isinstance(block, Block)
        block.mlp = Linear()
    return model.eval()


def tokens(batch: int = 2, seq: int = 9) -> Tensor:
    return torch.randint(0, 50, (batch, seq))


def batches(count: int, seq: int = 16) -> list[Batch]:
    return [Batch((tokens(4, seq),)) for _ in range(count)]


@pytest.fixture(scope="module")
def model() -> Decoder:
    return decoder()


@pytest.fixture(scope="module")
def program(model: Decoder) -> Program:
    return raise_program(traced(model, tokens()))


@pytest.fixture(scope="module")
def notes(program: Program) -> Notes:
    torch.manual_seed(1)
    return Notes(program, batches(12), batches(4))


@pytest.fixture(scope="module")
def linear_program() -> Program:
    return raise_program(traced(decoder(linear_block=0), tokens()))


def by_hand(model: Decoder, ids: list[str]) -> Decoder:
    made = copy.deepcopy(model)
    for id in ids:
        block, kind = id[1:].split(".")
        setattr(made.blocks[int(block)], kind, None)
    return made


@pytest.mark.parametrize(
    "ids",
    [["b0.attention"], ["b1.mlp"], ["b0.attention", "b0.mlp", "b1.attention"],
     ["b0.attention", "b0.mlp", "b1.attention", "b1.mlp"]],
)  # fmt: skip
def test_deletion_is_removal_by_hand_at_every_length(
    model: Decoder, program: Program, notes: Notes, ids: list[str]
) -> None:
    made, outcomes = apply_pass(program, read_pass("skip_sublayers{method=delete}"), ids, notes)
    assert [o.target for o in outcomes if o.applied] == ids
    for shape in ((2, 9), (1, 5), (3, 21)):
        given = tokens(*shape)
        with torch.no_grad():
            expected = by_hand(model, ids)(given)["logits"]
        assert_close(made(given)["logits"], expected)


def test_what_a_deleted_attention_had_is_gone(program: Program, notes: Notes) -> None:
    layer = program.sublayers[0]
    made, (outcome,) = apply_pass(
        program, read_pass("skip_sublayers{method=delete}"), [layer.id], notes
    )
    left = {node.name for node in made.graph.nodes}
    assert not left & set(layer.inner)
    assert len(made.attentions()) == len(program.attentions()) - 1
    assert [site.id for site in made.sites] == [
        s.id for s in program.sites if s.id not in layer.sites
    ]
    gone = {name for name, _ in program.module.named_parameters()}
    gone -= {name for name, _ in made.module.named_parameters()}
    assert gone == {f"blocks.0.{name}" for name in (
        "norm1.weight", "norm1.bias", "attention.joint.weight", "attention.joint.bias",
        "attention.out.weight", "attention.out.bias")}  # fmt: skip
    assert outcome.evidence["kv_values_per_token"] == 2 * WIDTH


def test_the_other_sublayers_keep_their_ids(program: Program, notes: Notes) -> None:
    made, _ = apply_pass(
        program, read_pass("skip_sublayers{method=delete}"), ["b0.attention"], notes
    )
    assert [s.id for s in made.sublayers] == ["b0.mlp", "b1.attention", "b1.mlp"]
    assert all(made.has(s.entry) and made.has(s.exit) for s in made.sublayers)


def test_rotary_tables_go_with_the_last_attention_that_reads_them() -> None:
    pytest.importorskip("transformers")
    _, made = traced_family("llama")
    raised = raise_program(made)
    ids = [s.id for s in raised.sublayers if s.kind == "attention"]
    after, _ = apply_pass(raised, read_pass("skip_sublayers{method=delete}"), ids, Notes(raised))
    assert not after.attentions()
    assert not after.sites
    tables = (torch.ops.aten.cos.default, torch.ops.aten.sin.default)
    assert [n for n in raised.graph.nodes if n.target in tables]
    assert not [n for n in after.graph.nodes if n.target in tables]


@pytest.mark.parametrize("name", ["neox", "bert"])
def test_parallel_and_post_norm_models(name: str) -> None:
    """With its last projection at zero a branch adds nothing, so deletion changes nothing."""
    pytest.importorskip("transformers")
    model, made = traced_family(name)
    ends = ("attention.dense", "dense_4h_to_h", "output.dense")
    for key, parameter in model.named_parameters():
        if any(f"{end}.{leaf}" in key for end in ends for leaf in ("weight", "bias")):
            nn.init.zeros_(parameter)
    after, outcomes = apply_pass(
        made, read_pass("skip_sublayers{method=delete}"), ["*"], Notes(made)
    )
    assert all(outcome.applied for outcome in outcomes)
    assert not after.sublayers
    expected, actual = made.run(made.example), after.run(made.example)
    for key, value in expected.items():
        assert_close(actual[key], value, key)


def test_a_linear_sublayer_is_replaced_without_loss(linear_program: Program) -> None:
    program = linear_program
    notes = Notes(program, batches(12), batches(4))
    made, (outcome,) = apply_pass(
        program, read_pass("skip_sublayers{method=linear}"), ["b0.mlp"], notes
    )
    assert outcome.applied, outcome.reason
    assert outcome.evidence["residual"] < 1e-9
    for shape in ((2, 9), (1, 5), (3, 21)):
        given = tokens(*shape)
        assert_close(made(given)["logits"], program(given)["logits"])


@pytest.mark.parametrize("id", ["b0.attention", "b1.mlp"])
def test_the_reported_residual_is_the_measured_one(program: Program, notes: Notes, id: str) -> None:
    layer = next(s for s in program.sublayers if s.id == id)
    edit = read_pass("skip_sublayers{method=linear}").rewrite(layer, program, notes)
    assert isinstance(edit, Edit), edit
    assert edit.graph is not None
    made = edited(program, edit.graph)
    (mapped,) = (n for n in made.graph.nodes if "linear_maps" in str(n.all_input_nodes))
    targets, estimates = [], []
    for batch in notes.calibration:
        targets.append(
            record(program, [layer.branch], batch)[0][layer.branch].flatten(0, 1).double()
        )
        estimates.append(record(made, [mapped.name], batch)[0][mapped.name].flatten(0, 1).double())
    y, fitted = torch.cat(targets), torch.cat(estimates)
    measured = float((y - fitted).square().sum() / (y - y.mean(0)).square().sum())
    assert edit.evidence["residual"] == pytest.approx(measured, rel=1e-6)
    assert 0 < measured < 1


def test_best_takes_what_changes_the_outputs_least(program: Program, notes: Notes) -> None:
    damage = Damage(notes.original, notes.heldout)
    for id in ("b0.attention", "b1.mlp"):
        measured = {}
        for method in ("delete", "linear", "best"):
            rewrite = read_pass(f"skip_sublayers{{method={method}}}")
            measured[method] = damage(apply_pass(program, rewrite, [id], notes)[0])
        assert measured["best"] == min(measured["delete"], measured["linear"])


class Even(nn.Module):
    """A sublayer that is linear on positive streams, and the opposite map on negative ones."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        nn.init.eye_(self.down.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.down(x).abs())


def test_best_keeps_deletion_where_the_map_is_worse() -> None:
    program = raise_program(traced(Even(), torch.randn(2, 7, WIDTH)))
    positive, negative = torch.rand(4, 40, WIDTH), -torch.rand(4, 40, WIDTH)
    notes = Notes(program, [Batch((positive,))], [Batch((negative,))])
    made, (outcome,) = apply_pass(program, read_pass("skip_sublayers{}"), ["b0.mlp"], notes)
    assert outcome.note.startswith("deleted; relative output error")
    assert outcome.evidence["heldout_deleted"] < outcome.evidence["heldout_linear"]
    assert not made.sublayers
    assert_close(made(negative), negative)


def test_padding_does_not_enter_the_fit(program: Program) -> None:
    real = tokens(8, 12)
    padded = torch.cat((real, torch.full((8, 9), 7)), dim=1)
    valid = torch.cat((torch.ones(8, 12), torch.zeros(8, 9)), dim=1).bool()
    layer = program.sublayers[1]
    rewrite = read_pass("skip_sublayers{method=linear}")
    edits = [
        rewrite.rewrite(layer, program, Notes(program, [batch]))
        for batch in (Batch((real,)), Batch((padded,), valid=valid))
    ]
    assert all(isinstance(edit, Edit) for edit in edits)
    first, second = (edit.evidence for edit in edits)  # type: ignore[union-attr]
    assert first["rows"] == second["rows"] == 96
    assert first["residual"] == pytest.approx(second["residual"], rel=1e-4)


def test_the_residual_target_mends_drift(program: Program, notes: Notes) -> None:
    drifted, _ = apply_pass(program, read_pass("skip_sublayers{method=delete}"), ["b0.mlp"], notes)
    damage = Damage(notes.original, notes.calibration)
    measured = {}
    for against in ("branch", "residual"):
        rewrite = read_pass(f"skip_sublayers{{method=linear against={against}}}")
        measured[against] = damage(apply_pass(drifted, rewrite, ["b1.attention"], notes)[0])
    assert measured["residual"] < measured["branch"]


def answer(program: Program, notes: Notes, line: str, id: str) -> Edit | Miss:
    layer = next(s for s in notes.original.sublayers if s.id == id)
    return read_pass(line).rewrite(layer, program, notes)


def test_misses_without_calibration(program: Program) -> None:
    miss = answer(program, Notes(program), "skip_sublayers{method=linear}", "b0.mlp")
    assert not miss
    assert isinstance(miss, Miss)
    assert "calibration" in miss.reason


def test_misses_with_too_few_tokens(program: Program) -> None:
    few = Notes(program, [Batch((tokens(1, 8),))])
    miss = answer(program, few, "skip_sublayers{method=linear}", "b0.mlp")
    assert isinstance(miss, Miss)
    assert "too few" in miss.reason


def test_misses_a_sublayer_that_is_gone(program: Program, notes: Notes) -> None:
    made, _ = apply_pass(program, read_pass("skip_sublayers{method=delete}"), ["b0.mlp"], notes)
    miss = answer(made, notes, "skip_sublayers{}", "b0.mlp")
    assert isinstance(miss, Miss)
    assert "earlier rewrite" in miss.reason


class Narrow(nn.Module):
    """A bottleneck cheaper than any map of the whole width."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.attention = (
            nn.Linear(WIDTH, 2), nn.Linear(2, WIDTH), Attention())  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.up(torch.relu(self.down(x)))


def test_misses_where_the_map_costs_more_than_the_sublayer() -> None:
    program = raise_program(traced(Narrow(), torch.randn(2, 7, WIDTH)))
    notes = Notes(program, [Batch((torch.randn(4, 20, WIDTH),))])
    miss = answer(program, notes, "skip_sublayers{method=linear}", "b0.mlp")
    assert isinstance(miss, Miss)
    assert "products per token" in miss.reason


def test_reads_back_from_its_text() -> None:
    made = passes()["skip_sublayers"](method="linear", against="branch")
    assert read_pass(made.text) == made
