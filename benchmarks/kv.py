"""What a smaller cache costs: on the project's language model, held-out text at 1,024 tokens, the
perplexity by bytes of cache, for mean pooling, merging in closed form, latents and layers that
share a cache, each refitted, and healed on 50,000 tokens after it. What it brings is in `kv_steps`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

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
HEALING = HealBudget(tokens=50_000)


def forms(ids: Sequence[str]) -> list[tuple[str, tuple[Step, ...]]]:
    """The forms by name, each with a refit at its end; `ids` are those of the attentions, of which
    every third is merged to half as few heads where two factors are told."""
    light = tuple(ids[::3])
    heavy = tuple(id for id in ids if id not in light)

    def merged(method: str, factor: int, targets: tuple[str, ...] = ("*",)) -> Step:
        return Step(f"merge_kv_heads{{factor={factor} method={method}}}", targets)

    found = dict[str, tuple[Step, ...]]()
    for method in ("mean", "closed"):
        for n in (2, 4, 8):
            found[f"{method} to 1/{n}"] = (merged(method, n),)
        for n in (2, 4):
            both = merged(method, n, light), merged(method, 2 * n, heavy)
            found[f"{method} to 1/{n} and 1/{2 * n}"] = both
    for keep in (0.5, 0.33, 0.25, 0.17, 0.125):
        found[f"latent of {keep:.0%}"] = (Step(f"latent_kv{{keep={keep}}}"),)
    for span in (2, 3, 6):
        found[f"{span} layers share a cache"] = (Step(f"share_kv_layers{{span={span}}}"),)
    for n in (2, 4):
        both = merged("closed", n), Step("share_kv_layers{span=2}")
        found[f"closed to 1/{n}, 2 layers share a cache"] = both
    return [(name, (*steps, REFIT)) for name, steps in found.items()]


def rows() -> list[Row]:
    """One row per form of the cache."""
    bench = workbench(training=True)
    program = bench.build([]).program
    whole = derive(program, check=False)
    made = []
    for name, steps in forms([site.id for site in program.sites]):
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
