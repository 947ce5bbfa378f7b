"""A bench for a budget of cache bytes: a decoder with a cache of which a part is for nothing."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from attnopt.autotune.accuracy import Accuracy
from attnopt.autotune.cache_run import CacheRun, Settled
from attnopt.autotune.cache_search import Kept
from attnopt.autotune.data import Data
from attnopt.autotune.request import Request
from attnopt.autotune.step_time import Load
from attnopt.autotune.timing import Timing
from attnopt.autotune.workbench import Workbench
from attnopt.compiler.contract import passes
from attnopt.compiler.decode import Decoder
from attnopt.compiler.plan import Step
from attnopt.compiler.program import Batch, Program
from tests.decoder import BLOCKS, HEAD_DIM, KV_HEADS, VOCABULARY, decoder

SHARE = 0.75


WHOLE = BLOCKS * KV_HEADS * 2 * HEAD_DIM * 4  # bytes per token in float32


@lru_cache(maxsize=1)
def program() -> Program:
    """A decoder whose first layer has one key/value head twice: half of its cache is for nothing,
    while all of the second layer's counts."""
    made = decoder(3, 16).copy()
    for name in ("k", "v"):
        weight = made.weight(f"blocks.0.{name}.weight").detach().clone()
        weight[HEAD_DIM:] = weight[:HEAD_DIM]
        made.set_weight(f"blocks.0.{name}.weight", weight)
    for block in range(BLOCKS):
        for name in ("q", "k", "out"):
            key = f"blocks.{block}.{name}.weight"
            made.set_weight(key, 3 * made.weight(key).detach())
    made.module.recompile()
    return made


def text(rows: int) -> Tensor:
    """Sequences of 16 tokens that the model itself would write, so that changes make it worse."""
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(0, VOCABULARY, (rows, 2), generator=draw)
    while ids.shape[1] < 16:
        likely = program().module(input_ids=ids)["logits"][:, -1].softmax(-1).detach()
        ids = torch.cat((ids, torch.multinomial(likely, 1, generator=draw)), 1)
    return ids


@lru_cache(maxsize=1)
def bench() -> Workbench:
    """Made once: plans that several tests ask for are built and measured once."""
    batches = [Batch((), {"input_ids": ids}) for ids in text(36).split(3)]
    data = Data(
        tuple(batches[:1]), tuple(batches[:6]), tuple(batches[6:9]), tuple(batches[9:]), True
    )
    return Workbench(program().module, program(), data, task="causal-lm")


def request(**more: Any) -> Request:
    """What is asked for: a cache of `SHARE`, with a bound that most plans keep."""
    return Request(**{"kv_bytes": SHARE, "max_drop": 0.9, **more})


def faster(monkeypatch: pytest.MonkeyPatch, latent: float) -> list[int]:
    """Let steps with latents take `latent` times as fast as others; answers with the calls."""
    asked: list[int] = []
    found = bench().journal.found
    timed = {key for key in found if key.startswith("step ")}
    monkeypatch.setattr(bench().journal, "found", {key: found[key] for key in found.keys() - timed})

    def told(decoders: Mapping[str, Decoder], load: Load, *more: Any) -> Timing:
        asked.append(len(decoders))
        kinds = {name: type(next(iter(d.caches.values()))) for name, d in decoders.items()}
        speeds = {n: latent if "Latent" in kind.__name__ else 1.0 for n, kind in kinds.items()}
        return Timing({name: (1.0 / by, 1.0 / by, 1.01 / by) for name, by in speeds.items()})

    monkeypatch.setattr("attnopt.autotune.cache_offer.race", told)
    return asked


def settled(bench: Workbench, **more: Any) -> tuple[CacheRun, Settled]:
    """A run and what it comes to."""
    run = CacheRun(bench, bench.build([]), request(**more))
    return run, run.settle()


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let a search know these passes alone."""
    kinds = [passes()[name] for name in names]
    monkeypatch.setattr("attnopt.autotune.cache_search.approximate", lambda: kinds)


def a_plan(loss: float, bytes: int, spread: float = 0.0, latent: bool = False) -> Kept:
    """A plan as if it was measured, on sequences that lose so much, give or take `spread`."""
    each = tuple(loss + spread * (i % 3 - 1) for i in range(12))
    found = {"tokens": (1.0,) * 12, "kl": each}
    accuracy = Accuracy(
        "causal-lm", loss, loss, loss, worst=loss, kl=loss, sequences=12, per_sequence=found
    )
    return Kept((Step(f"latent_kv{{keep={loss}}}"),), bytes, latent, accuracy)
