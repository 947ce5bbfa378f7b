"""On the trained language model: figures rank what rewrites cost, and copying heads are found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attnopt.autotune.data import gather
from attnopt.autotune.request import Wanted
from attnopt.compiler.contract import Notes, read_pass
from attnopt.compiler.damage import Damage
from attnopt.compiler.diagnostics.diagnose import diagnose
from attnopt.compiler.diagnostics.diagnosis import Diagnosis
from attnopt.compiler.intake.source import load
from attnopt.compiler.pipeline import apply_pass, read

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow
PYLM = Path(__file__).resolve().parents[3] / "examples" / "models" / "pylm"


@pytest.fixture(scope="module")
def seen() -> tuple[Notes, Diagnosis]:
    """Four calibration sequences of 1,024 tokens for the figures, two held-out ones for costs."""
    loaded = load(str(PYLM), batch=1, length=1024, dtype="float32")
    program = read(loaded)
    data = gather(loaded, Wanted(batch=1, length=1024), str(PYLM))
    found = diagnose(program, data.calibration, tokens=4096)
    return Notes(program, data.calibration[:1], data.heldout[:2]), found


def _rank_correlation(a: list[float], b: list[float]) -> float:
    ranks = [torch.tensor(x).argsort().argsort().double() for x in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def _costs(notes: Notes, line: str, targets: list[str]) -> list[float]:
    """The damage of one rewrite at each target alone."""
    damage = Damage(notes.original, notes.heldout)
    rewrite = read_pass(line)
    made = [apply_pass(notes.original, rewrite, (target,), notes) for target in targets]
    assert all(outcomes[0].applied for _, outcomes in made)
    return [damage(program) for program, _ in made]


def test_what_a_window_moves_ranks_its_damage(seen: tuple[Notes, Diagnosis]) -> None:
    notes, found = seen
    costs = _costs(notes, "sliding_window{left=64 sink=4}", [site.id for site in found.sites])
    moved = _rank_correlation(costs, [site.whole["moved_64"] for site in found.sites])
    lost = _rank_correlation(costs, [site.mean("lost_64") or 0.0 for site in found.sites])
    assert moved > 0.7, (moved, costs)  # 0.94 was seen
    assert 0 < lost < moved, (lost, costs)  # 0.49 was seen


def test_influence_ranks_the_damage_of_deletion(seen: tuple[Notes, Diagnosis]) -> None:
    notes, found = seen
    costs = _costs(notes, "skip_sublayers{method=delete}", [layer.id for layer in found.sublayers])
    influence = [layer.influence or 0.0 for layer in found.sublayers]
    assert _rank_correlation(costs, influence) > 0.7  # 0.94 was seen


def test_copying_heads_stand_in_the_last_two_layers(seen: tuple[Notes, Diagnosis]) -> None:
    best = {site.id: max(site.per_head["retrieval"]) for site in seen[1].sites}
    assert min(best["s4"], best["s5"]) > 0.2  # 0.46 and 0.33 were seen
    assert max(best[name] for name in ("s0", "s1", "s2", "s3")) < 0.1
