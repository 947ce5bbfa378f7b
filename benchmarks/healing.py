"""The language model of the project with half and a quarter of its cache: held-out perplexity as
rewritten and refitted, and after eight minutes of healing.

It trains on what the model was trained on, the modules of the standard library but those that are
held out, of the Python that runs this. The time becomes a number of tokens by timing a few steps;
the row tells how many.
"""

from __future__ import annotations

import sys
import sysconfig
import tempfile
from pathlib import Path

import torch

from attnopt.autotune.data import Wanted, gather
from attnopt.autotune.heal import healed
from attnopt.autotune.request import HealBudget
from attnopt.autotune.workbench import Workbench
from attnopt.compiler.intake.source import load
from attnopt.compiler.pipeline import read
from attnopt.compiler.plan import Step
from benchmarks.pylm import LENGTH, MODEL
from benchmarks.run import Row

BUDGET = HealBudget(seconds=480.0)  # of the ten minutes that the bars allow
FORMS = {  # by name: the share of the cache's bytes, and the rise of the perplexity that is allowed
    "latent_kv{keep=0.5}": (0.5, 0.02),
    "latent_kv{keep=0.25}": (0.25, 0.05),
}


def rows() -> list[Row]:
    """The pass that loses least before healing, at half and a quarter of the bytes."""
    loaded = load(str(MODEL), text=MODEL / "eval.txt", batch=1, length=LENGTH, dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "calibration.txt")
        text.write_text(_text(), encoding="utf-8")
        wanted = Wanted(batch=1, length=LENGTH, calibration=text)
        data = gather(loaded, wanted, str(MODEL), training=True)
    assert loaded.module is not None
    bench = Workbench(loaded.module, read(loaded), data, task="causal-lm")
    return [_row(bench, name, *form) for name, form in FORMS.items()]


def _text() -> str:
    """The calibration text, on which passes are fitted first, and all modules to train on."""
    sys.path.insert(0, str(MODEL.parents[1]))
    from pylm_corpus import joined, read_corpus

    train = read_corpus(Path(sysconfig.get_path("stdlib"))).train
    return (MODEL / "calibration.txt").read_text(encoding="utf-8") + joined(train)


def _row(bench: Workbench, name: str, share: float, allowed: float) -> Row:
    steps = [Step(name), Step("refit{}")]
    before = bench.verdict(bench.build(steps))
    made = healed(bench, steps, BUDGET, before)
    after, entry = made.accuracy, made.entry
    took = entry.seconds.value if entry.seconds else 0.0
    numbers = {
        "original": before.perplexity_original, "refitted": before.perplexity,
        "healed": after.perplexity, "tokens": entry.tokens, "step": entry.rewrite,
        "seconds": took,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    figure = (
        f"perplexity {before.perplexity_original:.3f}, refitted {before.perplexity:.3f}, "
        f"healed on {entry.tokens:,} tokens in {took:.0f} s {after.perplexity:.3f} "
        f"({after.drop:+.1%})"
    )
    case = f"{name}, {share:.0%} of the bytes, 8 minutes"
    print(f"{case}: {figure}", file=sys.stderr, flush=True)
    return Row(
        case, figure, f"within {allowed:.0%} of the original", after.drop <= allowed, numbers
    )
