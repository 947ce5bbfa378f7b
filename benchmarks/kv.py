"""What a smaller cache costs: on the project's language model, held-out text at 1,024 tokens, the
perplexity by bytes of cache, for mean pooling, merging in closed form, latents and layers that
share a cache, each refitted, and healed on 50,000 tokens after it. What it brings is in `kv_steps`.
"""

from __future__ import annotations

import sys

from attnopt.autotune.data import Wanted, gather
from attnopt.autotune.heal import healed
from attnopt.autotune.request import HealBudget
from attnopt.autotune.workbench import Workbench
from attnopt.compiler.decode import derive
from attnopt.compiler.intake.source import load
from attnopt.compiler.pipeline import read
from attnopt.compiler.plan import Step
from benchmarks.pylm import LENGTH, MODEL
from benchmarks.run import Row

REFIT = Step("refit{}")
FORMS: tuple[tuple[str, tuple[Step, ...]], ...] = (
    *(
        (f"{method} to 1/{factor}",
         (Step(f"merge_kv_heads{{factor={factor} method={method}}}"), REFIT))
        for factor in (2, 4, 8) for method in ("mean", "closed")
    ),
    *(
        (f"latent of {keep:.0%}", (Step(f"latent_kv{{keep={keep}}}"), REFIT))
        for keep in (0.5, 0.33, 0.25, 0.17, 0.125)
    ),
    *(
        (f"{span} layers share a cache", (Step(f"share_kv_layers{{span={span}}}"), REFIT))
        for span in (2, 3)
    ),
)  # fmt: skip
HEALING = HealBudget(tokens=50_000)


def rows() -> list[Row]:
    """One row per form of the cache."""
    bench = workbench(training=True)
    whole = derive(bench.build([]).program, check=False)
    made = []
    for name, steps in FORMS:
        refitted = bench.build(list(steps))
        before = bench.verdict(refitted)
        assert before.feasible, before.reason
        after = healed(bench, list(steps), HEALING, before).accuracy
        decoder = derive(refitted.program, check=False)
        kept = decoder.bytes_per_token() / whole.bytes_per_token()
        numbers = {"share": kept, "refitted": before.drop, "healed": after.drop}
        figure = (
            f"{kept:.0%} of the bytes: perplexity x{1 + before.drop:.3f}, healed "
            f"x{1 + after.drop:.3f}"
        )
        made.append(Row(f"pylm, {name} + refit", figure, numbers=numbers))
        print(f"{made[-1].case}: {figure}", file=sys.stderr, flush=True)
    return made


def workbench(training: bool = False) -> Workbench:
    """The project's language model on its held-out text, two sequences at a time."""
    loaded = load(str(MODEL), text=MODEL / "eval.txt", batch=2, length=LENGTH, dtype="float32")
    data = gather(loaded, Wanted(batch=2, length=LENGTH), str(MODEL), training=training)
    assert loaded.module is not None
    return Workbench(loaded.module, read(loaded), data, task="causal-lm")
