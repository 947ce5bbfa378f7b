"""On the trained language model: greedy beats one-shot ranking, the map beats deletion."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attnopt.compiler.contract import Notes, read_pass
from attnopt.compiler.damage import Damage
from attnopt.compiler.intake.data import lm_batches, read_text, split_text
from attnopt.compiler.intake.hf_model import HFModel
from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.pipeline import apply_pass, read
from attnopt.compiler.program import Batch, Program
from attnopt.compiler.removal import without
from attnopt.compiler.skip_order import greedy, one_shot

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow
PYLM = Path(__file__).resolve().parents[2] / "examples" / "models" / "pylm"
LENGTH = 128


@pytest.fixture(scope="module")
def notes() -> Notes:
    """Calibration and held-out text apart, 16 and 4 batches of 4 sequences."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(PYLM)
    model = transformers.AutoModelForCausalLM.from_pretrained(PYLM, dtype=torch.float32)
    fitted, kept = split_text(read_text(PYLM / "calibration.txt"))
    calibration = batches(tokenizer, fitted, 16)
    loaded = Loaded(
        HFModel(model).eval(), None, (), dict(calibration[0].kwargs), "pylm", "hf",
        task="causal-lm", root_prefix="hf.",
    )  # fmt: skip
    return Notes(read(loaded), calibration, batches(tokenizer, kept, 4))


@pytest.fixture(scope="module")
def evaluation() -> list[Batch]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(PYLM)
    return batches(tokenizer, read_text(PYLM / "eval.txt"), 4)


def batches(tokenizer: object, text: str, count: int) -> list[Batch]:
    return [Batch(*pair) for pair in lm_batches(tokenizer, text, LENGTH, 4, limit=count)]


def test_greedy_beats_one_shot_ranking(notes: Notes, evaluation: list[Batch]) -> None:
    program = notes.original
    ids = [layer.id for layer in program.sublayers]
    assert len(ids) == 12
    data = notes.calibration[:4]
    count = 3
    steps = list(greedy(program, notes, ids, count=count, batches=data))
    chosen = {
        "influence": one_shot(program, notes, ids, by="influence", batches=data),
        "removal": one_shot(program, notes, ids, by="removal", batches=data),
    }
    seen, apart = Damage(program, data), Damage(program, evaluation)
    removed = {
        name: cut(program, [rank.id for rank in ranks[:count]]) for name, ranks in chosen.items()
    }
    assert steps[-1].damage < seen(removed["influence"])
    assert steps[-1].damage <= seen(removed["removal"]) * (1 + 1e-6)
    assert apart(steps[-1].program) < apart(removed["influence"])


def cut(program: Program, ids: list[str]) -> Program:
    return without(program, [layer for layer in program.sublayers if layer.id in ids])


@pytest.mark.parametrize("id", ["b1.attention", "b3.mlp"])
def test_the_linear_map_beats_deletion(notes: Notes, evaluation: list[Batch], id: str) -> None:
    damage = Damage(notes.original, evaluation)
    mapped, (outcome,) = apply_pass(notes.original, read_pass("skip_sublayers{}"), [id], notes)
    deleted = cut(notes.original, [id])
    assert outcome.evidence["heldout_linear"] < outcome.evidence["heldout_deleted"]
    assert damage(mapped) < damage(deleted)
