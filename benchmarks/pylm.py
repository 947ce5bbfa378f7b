"""The language model of the project at 1,024 tokens, on held-out modules: which way of merging,
skipping and windowing loses least.

Losses are the rise of the held-out negative log-likelihood, in nats per token.
"""

from __future__ import annotations

import math
from pathlib import Path

from attnopt.autotune.data import Wanted, gather
from attnopt.autotune.workbench import Workbench
from attnopt.compiler.intake.source import load
from attnopt.compiler.pipeline import read
from attnopt.compiler.plan import Step
from attnopt.compiler.skip_order import greedy, one_shot
from benchmarks.run import Row

MODEL = Path(__file__).parent.parent / "examples" / "models" / "pylm"
LENGTH = 1024


def rows() -> list[Row]:
    """Merging at 1/2 and 1/4 of the KV heads, skipping, and windows with and without sinks."""
    loaded = load(str(MODEL), text=MODEL / "eval.txt", batch=2, length=LENGTH, dtype="float32")
    data = gather(loaded, Wanted(batch=2, length=LENGTH), str(MODEL))
    assert loaded.module is not None
    bench = Workbench(loaded.module, read(loaded), data, task="causal-lm")
    return [*_merging(bench), *_skipping(bench), *_windows(bench)]


def loss(bench: Workbench, steps: list[Step]) -> float:
    """The rise of the loss on the evaluation data, nats per token."""
    accuracy = bench.verdict(bench.build(steps))
    assert accuracy.feasible, accuracy.reason
    return math.log1p(accuracy.drop)


def _merging(bench: Workbench) -> list[Row]:
    made = []
    for factor in (2, 4):
        found = {}
        for method in ("mean", "closed"):
            merge = Step(f"merge_kv_heads{{factor={factor} method={method}}}")
            found[method] = loss(bench, [merge])
            found[f"{method} + refit"] = loss(bench, [merge, Step("refit{}")])
        share = found["closed + refit"] / found["mean + refit"]
        figure = ", ".join(f"{name} {value:+.4f}" for name, value in found.items())
        made.append(
            Row(f"merge_kv_heads to 1/{factor}", f"{figure} nats; {share:.2f} of refitted mean",
                "closed + refit at most half of mean + refit", share <= 0.5, found)
        )  # fmt: skip
    return made


def _skipping(bench: Workbench) -> list[Row]:
    notes = bench.opened()
    program = notes.original
    candidates = [layer.id for layer in program.sublayers]
    first = [rank.id for rank in one_shot(program, notes, candidates)]
    taken = [choice.id for choice in greedy(program, notes, candidates, count=4)]
    made = []
    for count in (2, 4):
        found = {
            "one-shot": loss(bench, [Step("skip_sublayers{method=delete}", tuple(first[:count]))]),
            "greedy": loss(bench, [Step("skip_sublayers{method=delete}", tuple(taken[:count]))]),
            "greedy, linear or deleted": loss(
                bench, [Step("skip_sublayers{}", tuple(taken[:count]))]
            ),
        }
        figure = ", ".join(f"{name} {value:+.4f}" for name, value in found.items())
        better = (
            found["greedy"] <= found["one-shot"]
            and found["greedy, linear or deleted"] <= found["greedy"]
        )
        made.append(
            Row(f"skip_sublayers, {count} of {len(candidates)}", f"{figure} nats",
                "greedy beats one-shot; linear beats deletion or deletion is kept", better, found)
        )  # fmt: skip
    return made


def _windows(bench: Workbench) -> list[Row]:
    made = []
    for left in (64, 128, 256):
        found = {}
        for name, sink in (("no sink", 0), ("4 sinks", 4)):
            step = Step(f"sliding_window{{left={left} sink={sink}}}")
            found[name] = loss(bench, [step])
            found[f"{name} + refit"] = loss(bench, [step, Step("refit{}")])
        figure = ", ".join(f"{name} {value:+.4f}" for name, value in found.items())
        better = found["4 sinks"] < found["no sink"]
        made.append(
            Row(
                f"sliding_window, left {left}",
                f"{figure} nats",
                "with sinks beats without",
                better,
                found,
            )
        )
    return made
