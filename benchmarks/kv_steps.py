"""What a smaller cache brings: the time of a step by bytes of cache against the whole cache, for
the forms of `kv` on the project's language model, as it is and compiled, and on a random model with
8,192 tokens in the cache of each of four sequences."""

from __future__ import annotations

import sys
import time
from statistics import median

import torch

from attnopt.compiler.contract import Notes, read_pass
from attnopt.compiler.decode import Decoder, derive
from attnopt.compiler.decode.state import State
from attnopt.compiler.pipeline import apply_pass
from benchmarks.decode import decoder_of, random_model
from benchmarks.kv import forms, workbench
from benchmarks.pylm import LENGTH
from benchmarks.run import Row

LONG, ROWS, AHEAD = 8192, 4, 2.5
FIRST, STEPS = 3, 24  # untimed, some of which compile, and timed


def rows() -> list[Row]:
    """The long cache, then the forms on the language model."""
    return [_long(), *_pylm()]


def _pylm() -> list[Row]:
    bench = workbench()
    program = bench.build([]).program
    whole, fast = derive(program, check=False), derive(program, check=False)
    fast.compile()
    made = []
    for name, steps in [("whole", ()), *forms([site.id for site in program.sites])]:
        if name.startswith("mean"):
            continue  # of the sizes of "closed"
        decoder = derive(bench.build(list(steps[:-1])).program, check=False)
        kept = decoder.bytes_per_token() / whole.bytes_per_token()
        faster, seconds = _ratio(whole, decoder, 1, LENGTH - FIRST - STEPS - 2)
        numbers = {"share": kept, "faster": faster, "tokens_per_second": 1 / seconds}
        figure = f"{kept:.0%} of the bytes: {1 / seconds:.0f} tokens/s, a step {faster:.2f}x"
        decoder.compile()
        faster, seconds = _ratio(fast, decoder, 1, LENGTH - FIRST - STEPS - 2)
        numbers |= {"faster_compiled": faster, "tokens_per_second_compiled": 1 / seconds}
        figure += f"; compiled {1 / seconds:.0f} tokens/s, {faster:.2f}x"
        made.append(Row(f"pylm, {name}", figure, numbers=numbers))
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
    for d, state in states * FIRST:
        d.step(state, token, last=True)
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
    state = decoder.state(batch, length + FIRST + STEPS + 1)
    for cache in state.caches:
        for part in cache:
            part.normal_()
    state.length = state.reached = length
    return state
