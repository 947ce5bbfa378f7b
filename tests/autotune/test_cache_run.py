"""A whole run under a budget of cache bytes: what it refuses, what it times, how it ends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from attnopt.autotune.cache_run import require_cache
from attnopt.autotune.optimize import optimize
from attnopt.autotune.place import Place
from attnopt.autotune.run import Run
from attnopt.autotune.step_time import _Steps, load_of, race
from attnopt.compiler.decode import derive
from attnopt.compiler.errors import Problem
from attnopt.compiler.program import Batch, Program
from attnopt.compiler.raising import raise_program
from tests.autotune import cache_bench as cb
from tests.cli.conftest import LENGTH, ROWS, WIDTH, encoder
from tests.residual_models import VOCABULARY as WORDS
from tests.residual_models import Decoder as Gpt
from tests.residual_models import traced
from tests.tolerance import assert_close


def _reading(ids: Tensor) -> Program:
    """The program with other tokens as its example."""
    made = cb.program().copy()
    made.example = Batch((), {"input_ids": ids})
    return made


def test_a_tail_of_padding_is_timed_and_constant_tokens_are_refused_at_once() -> None:
    padded = cb.text(3)
    padded[:, 8:] = 0
    program = _reading(padded)
    require_cache(program)
    made = derive(program, check=False)
    load = load_of(made)
    assert not load.after[0].any() and torch.equal(load.whole.args[0], padded)
    assert race({"a": made, "b": made}, load, 0.0).rounds == 7
    for ids, said in ((torch.zeros_like(padded), "one value only"), (padded[:, :1], "one token")):
        with pytest.raises(Problem, match=said) as caught:
            require_cache(_reading(ids))
        assert caught.value.code == "A403"
        require_cache(_reading(ids), timed=False)


def test_a_timed_sample_is_decoding_and_leaves_its_state() -> None:
    made = derive(cb.program(), check=False)
    load = load_of(made)
    assert load.prompt[0].shape == (3, 8) and load.after[0].shape == (3, 8)
    assert load.words == "3 × 8 tokens cached"
    steps = _Steps(made, load)
    whole = cb.program().module(input_ids=load.whole.args[0])["logits"]
    for _ in range(2):
        assert_close(steps(*load.whole.args), whole[:, -1:])
        assert steps.state.length == 8
    timing = race({"a": made, "b": made}, load, 0.0)
    assert timing.rounds == 7 and set(timing.samples) == {"a", "b"}


@pytest.mark.parametrize("missing", ["real", "heldout", "evaluation"])
def test_a_run_without_data_is_refused_before_anything_is_timed(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    bench, run = cb.bench(), object.__new__(Run)
    run.request, run.program, run.warnings = cb.request(), cb.program(), []
    run.place = Place()
    run.data = replace(bench.data, **{missing: False if missing == "real" else ()})
    monkeypatch.setattr(run, "_bench", lambda: bench)
    monkeypatch.setattr(run, "_pace", lambda built: pytest.fail("it was timed"))
    with pytest.raises(Problem, match="needs real data") as caught:
        run.go()
    assert caught.value.code == "A410" and "give --text FILE" in caught.value.help


@pytest.mark.parametrize("padded", [False, True])
def test_what_only_pays_on_padded_batches_is_left_out_and_told(
    monkeypatch: pytest.MonkeyPatch, padded: bool
) -> None:
    bench, run = cb.bench(), object.__new__(Run)
    valid = torch.ones(3, 16, dtype=torch.bool)
    valid[:, 12:] = not padded
    run.request, run.program, run.warnings = cb.request(), cb.program(), []
    run.place = Place()
    run.data = replace(bench.data, timing=(replace(bench.data.timing[0], valid=valid),))
    monkeypatch.setattr(bench, "without", frozenset[str]())
    run.bench = bench
    run._require_cache()
    assert bench.without == {"unpad"}
    told = ["unpad was left out: 75% of the timed positions are real, and a packed program has no"]
    assert [w.removesuffix(" cache") for w in run.warnings] == (told if padded else [])


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Gpt, Path]:
    """A GPT of one layer, and tokens for it as a file."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("cache") / "inputs.pt"
    torch.save([{"input_ids": torch.randint(0, WORDS, (4, 16))} for _ in range(6)], path)
    return Gpt(1).eval(), path


@pytest.mark.parametrize(("max_drop", "met"), [(0.9, True), (1e-9, False)])
def test_a_whole_run_is_met_or_says_what_would_do(
    spoken: tuple[Gpt, Path], monkeypatch: pytest.MonkeyPatch, max_drop: float, met: bool
) -> None:
    cb.only(monkeypatch, "merge_kv_heads")
    model, inputs = spoken
    example = {"input_ids": torch.randint(0, WORDS, (4, 16))}
    result = optimize(model, example, kv_bytes="50%", max_drop=max_drop, inputs=inputs,
                      target="a100", trials=2)  # fmt: skip
    assert result.cache is not None and result.cache.plans
    assert (result.met, result.cache.met, result.exit_code) == (met, met, 0 if met else 2)
    assert result.cache.after == result.cache.before // (2 if met else 1)
    assert (result.relaxation is None) is met
    assert any(s.rewrite.startswith("merge_kv_heads") for s in result.plan.steps) is met


def test_a_model_without_a_cache_is_refused() -> None:
    program = raise_program(traced(encoder(), torch.randn(ROWS, LENGTH, WIDTH)))
    with pytest.raises(Problem, match="has no cache to shrink") as caught:
        require_cache(program)
    assert caught.value.code.startswith("A70") and caught.value.help
    require_cache(cb.program())
