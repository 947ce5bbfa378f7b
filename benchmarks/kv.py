"""What a smaller cache costs and what it brings.

On the project's language model, held-out modules at 1,024 tokens: perplexity and decoding speed by
bytes of cache, for mean pooling, merging in closed form, latents and layers that share a cache,
each refitted, and healed on 50,000 tokens after it. On a random model with 8,192 tokens in the
cache and four sequences: a step with all of the bytes, and with an eighth.
"""

from __future__ import annotations

import sys
import time
from statistics import median

import torch

from attnopt.autotune.data import Wanted, gather
from attnopt.autotune.heal import healed
from attnopt.autotune.request import HealBudget
from attnopt.autotune.workbench import Workbench
from attnopt.compiler.contract import Notes, read_pass
from attnopt.compiler.decode import Decoder, derive
from attnopt.compiler.decode.state import State
from attnopt.compiler.intake.source import load
from attnopt.compiler.pipeline import apply_pass, read
from attnopt.compiler.plan import Step
from benchmarks.decode import decoder_of, random_model
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
LONG, ROWS, AHEAD = 8192, 4, 2.5
STEPS = 24
HEALING = HealBudget(tokens=50_000)


def rows() -> list[Row]:
    """The forms of the cache on the language model, then the long cache."""
    return [*_pylm(), _long()]


def _pylm() -> list[Row]:
    loaded = load(str(MODEL), text=MODEL / "eval.txt", batch=2, length=LENGTH, dtype="float32")
    data = gather(loaded, Wanted(batch=2, length=LENGTH), str(MODEL), training=True)
    assert loaded.module is not None
    bench = Workbench(loaded.module, read(loaded), data, task="causal-lm")
    whole = derive(bench.build([]).program, check=False)
    made = []
    for name, steps in FORMS:
        refitted = bench.build(list(steps))
        before = bench.verdict(refitted)
        assert before.feasible, before.reason
        after = healed(bench, list(steps), HEALING, before).accuracy
        decoder = derive(refitted.program, check=False)
        kept = decoder.bytes_per_token() / whole.bytes_per_token()
        faster, seconds = _ratio(whole, decoder, 1, LENGTH - STEPS - 2)
        numbers = {"share": kept, "refitted": before.drop, "healed": after.drop,
                   "faster": faster, "tokens_per_second": 1 / seconds}  # fmt: skip
        figure = (
            f"{kept:.0%} of the bytes: perplexity x{1 + before.drop:.3f}, healed "
            f"x{1 + after.drop:.3f}, {1 / seconds:.0f} tokens/s, a step {faster:.2f}x"
        )
        made.append(Row(f"pylm, {name} + refit", figure, numbers=numbers))
        print(f"{made[-1].case}: {figure}", file=sys.stderr, flush=True)
    return made


def _long() -> Row:
    whole = decoder_of(random_model(LONG + 2 * STEPS))
    merged, _ = apply_pass(
        whole.program, read_pass("merge_kv_heads{factor=0 method=mean}"), ("*",),
        Notes(whole.program),
    )  # fmt: skip
    decoder = derive(merged, check=False)
    kept = decoder.bytes_per_token() / whole.bytes_per_token()
    faster, _ = _ratio(whole, decoder, ROWS, LONG)
    figure = f"{kept:.1%} of the bytes: a step {faster:.2f}x"
    return Row(
        f"8x512, {LONG} tokens, batch {ROWS}, one key/value head", figure,
        f"at least {AHEAD}x", faster >= AHEAD, {"share": kept, "faster": faster},
    )  # fmt: skip


def _ratio(whole: Decoder, decoder: Decoder, batch: int, length: int) -> tuple[float, float]:
    """The median, over turns, of the seconds of a step of one decoder over those of the other, and
    the median seconds of the other's."""
    states = [(d, _filled(d, batch, length)) for d in (whole, decoder)]
    token = torch.ones(batch, 1, dtype=torch.long)
    ratios, others = [], []
    for _ in range(STEPS):
        taken = []
        for d, state in states:
            begun = time.perf_counter()
            d.step(state, token, last=True)
            taken.append(time.perf_counter() - begun)
        ratios.append(taken[0] / taken[1])
        others.append(taken[1])
    return median(ratios), median(others)


def _filled(decoder: Decoder, batch: int, length: int) -> State:
    """A state whose caches hold random numbers, as if a prompt had been read."""
    state = decoder.state(batch, length + STEPS + 1)
    for cache in state.caches:
        for part in cache:
            part.normal_()
    state.length = state.reached = length
    return state
