"""The order of removal: shared runs give what single runs give, and greedy sees stand-ins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attnopt.compiler.contract import Notes, read_pass
from attnopt.compiler.damage import Damage
from attnopt.compiler.program import Batch, Program, record
from attnopt.compiler.raising import raise_program
from attnopt.compiler.removal import forks, without
from attnopt.compiler.skip_order import greedy, one_shot, removals
from tests.residual_models import WIDTH, Attention, Decoder, traced
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
    return Notes(program, [Batch((torch.randint(0, 50, (3, 11)),)) for _ in range(2)])


def ids(program: Program) -> list[str]:
    return [layer.id for layer in program.sublayers]


def test_a_fork_is_the_program_without_the_sublayer(program: Program, notes: Notes) -> None:
    batch = notes.calibration[0]
    seen = []
    for layer, out in forks(program, program.sublayers, batch):
        alone = program if layer is None else without(program, [layer])
        assert_close(out["logits"], alone.run(batch)["logits"])
        seen.append(layer.id if layer else None)
    assert seen == [*ids(program), None]


class Parallel(nn.Module):
    """x + attention + MLP in one sum, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleList([Attention(), Attention()])
        self.first = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])
        self.second = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])

    def forward(self, x: Tensor) -> Tensor:
        for attention, first, second in zip(self.attention, self.first, self.second, strict=True):
            x = x + (attention(x) + second(torch.relu(first(x))))
        return x


def test_forks_and_removals_of_parallel_branches() -> None:
    program = raise_program(traced(Parallel(), torch.randn(2, 7, WIDTH)))
    batch = Batch((torch.randn(2, 7, WIDTH),))
    for layer, out in forks(program, program.sublayers, batch):
        if layer is not None:
            assert_close(out, without(program, [layer]).run(batch))
    bare = without(program, program.sublayers)
    assert_close(bare.run(batch), batch.args[0])
    assert not bare.sublayers


def test_greedy_starts_as_one_shot_does_and_measures_anew(program: Program, notes: Notes) -> None:
    steps = list(greedy(program, notes, ids(program), count=3))
    ranks = one_shot(program, notes, ids(program), by="removal")
    assert steps[0].id == ranks[0].id
    assert steps[0].damage == pytest.approx(ranks[0].score, rel=1e-5)
    damage = Damage(program, notes.calibration)
    for step in steps:
        assert step.damage == pytest.approx(damage(step.program), rel=1e-4)
        assert step.damage == min(step.deletions.values())
    assert [len(step.program.sublayers) for step in steps] == [3, 2, 1]


def test_greedy_stops_at_the_bound(program: Program, notes: Notes) -> None:
    all_steps = list(greedy(program, notes, ids(program)))
    assert len(all_steps) == 4
    bound = all_steps[1].damage
    assert all_steps[2].damage > bound
    assert [s.id for s in greedy(program, notes, ids(program), until=bound)] == [
        s.id for s in all_steps[:2]
    ]


def test_greedy_with_linear_maps_reports_the_damage_of_the_map(
    program: Program, notes: Notes
) -> None:
    told: list[str] = []
    more = Notes(program, [Batch((torch.randint(0, 50, (8, 16)),))], notes.calibration)
    rewrite = read_pass("skip_sublayers{method=linear}")
    (step,) = greedy(program, more, ["b1.mlp"], count=1, rewrite=rewrite, progress=told.append)
    assert step.damage == pytest.approx(Damage(program, more.calibration)(step.program), rel=1e-5)
    assert step.damage < step.deletions["b1.mlp"]
    assert told[0].startswith("b1.mlp: KL in nats")


class Twins(nn.Module):
    """The second sublayer undoes the first; the third does little."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(WIDTH // 2, 2 * WIDTH)
        self.up = nn.Linear(2 * WIDTH, WIDTH // 2, bias=False)
        self.third = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        nn.init.normal_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        for sign in (1.0, -1.0):
            half = self.up(torch.relu(self.down(x[..., : WIDTH // 2])))
            x = x + torch.cat((torch.zeros_like(half), sign * half), dim=-1)
        return x + self.third(x)


def test_greedy_sees_what_one_shot_cannot() -> None:
    """Each twin alone is needed; with one of them gone (here: first), so must the other go."""
    program = raise_program(traced(Twins(), torch.randn(2, 7, WIDTH)))
    assert len(program.sublayers) == 3
    notes = Notes(program, [Batch((torch.randn(2, 9, WIDTH),))])
    first, second, third = program.sublayers
    started = without(program, [first])
    (step,) = greedy(started, notes, [second.id, third.id], count=1)
    assert step.id == second.id
    assert step.damage < 1e-5
    ranks = one_shot(program, notes, [second.id, third.id], by="removal")
    assert ranks[0].id == third.id


def test_block_influence_is_one_minus_the_cosine(program: Program, notes: Notes) -> None:
    ranks = {rank.id: rank.score for rank in one_shot(program, notes, ids(program))}
    layer = program.sublayers[-1]
    far = []
    for batch in notes.calibration:
        found, _ = record(program, [layer.entry, layer.exit], batch)
        far.append(1 - torch.cosine_similarity(found[layer.entry], found[layer.exit], dim=-1))
    assert ranks[layer.id] == pytest.approx(float(torch.cat(far).mean()), rel=1e-4)


def test_removals_count_real_tokens_alone(program: Program) -> None:
    real = torch.randint(0, 50, (2, 8))
    padded = torch.cat((real, torch.full((2, 5), 7)), dim=1)
    valid = torch.arange(13)[None, :].expand(2, 13) < 8
    plain = removals(program, program.sublayers, Damage(program, [Batch((real,))]))
    masked = removals(program, program.sublayers, Damage(program, [Batch((padded,), valid=valid)]))
    for id, value in plain.items():
        assert masked[id] == pytest.approx(value, rel=1e-4)
