"""The language model of the project with its key/value heads merged: held-out perplexity as merged
and refitted, and after ten minutes of healing.

The time becomes a number of tokens by timing a few steps; the row tells how many.
"""

from __future__ import annotations

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

BUDGET = HealBudget(seconds=600.0)
ALLOWED = {2: 0.02, 4: 0.05}  # rise of the perplexity by how many heads became one


def rows() -> list[Row]:
    """Half and a quarter of the key/value heads."""
    loaded = load(str(MODEL), text=MODEL / "eval.txt", batch=1, length=LENGTH, dtype="float32")
    data = gather(loaded, Wanted(batch=1, length=LENGTH), str(MODEL), training=True)
    assert loaded.module is not None
    bench = Workbench(loaded.module, read(loaded), data, task="causal-lm")
    return [_row(bench, factor) for factor in ALLOWED]


def _row(bench: Workbench, factor: int) -> Row:
    steps = [Step(f"merge_kv_heads{{factor={factor}}}"), Step("refit{}")]
    before = bench.verdict(bench.build(steps))
    made = healed(bench, steps, BUDGET, before)
    after, entry = made.accuracy, made.entry
    numbers = {
        "original": before.perplexity_original, "refitted": before.perplexity,
        "healed": after.perplexity, "tokens": entry.tokens, "step": entry.rewrite,
        "seconds": entry.seconds.value if entry.seconds else None,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    figure = (
        f"perplexity {before.perplexity_original:.3f}, refitted {before.perplexity:.3f}, "
        f"healed on {entry.tokens:,} tokens {after.perplexity:.3f} ({after.drop:+.1%})"
    )
    bar = f"within {ALLOWED[factor]:.0%} of the original"
    return Row(f"merge_kv_heads to 1/{factor}, 10 minutes", figure, bar,
               after.drop <= ALLOWED[factor], numbers)  # fmt: skip
