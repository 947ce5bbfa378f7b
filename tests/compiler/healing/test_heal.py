"""Healing: lowers the held-out loss of what was touched, touches nothing else, and goes on after an
interruption as if there had been none."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path as Place

import pytest
import torch
from torch import Tensor

from attnopt.compiler.contract import Miss, Notes, read_pass
from attnopt.compiler.errors import Problem
from attnopt.compiler.healing import pace
from attnopt.compiler.healing.checkpoint import Checkpoint, key_of
from attnopt.compiler.healing.draw import Draw, tokens
from attnopt.compiler.healing.factors import Factors
from attnopt.compiler.healing.heal import Healed, heal, start
from attnopt.compiler.healing.loss import distance
from attnopt.compiler.healing.schedule import share
from attnopt.compiler.healing.settings import Settings
from attnopt.compiler.healing.touched import touched
from attnopt.compiler.healing.working import Region
from attnopt.compiler.pipeline import apply_pass
from attnopt.compiler.program import Batch, Program
from attnopt.compiler.spec import Mask
from tests.decoder import VOCABULARY, decoder
from tests.tolerance import assert_close

LENGTH, ROWS = 16, 4
QUICK = Settings(tokens=30 * ROWS * LENGTH, local=12 * ROWS * LENGTH, rate=0.02)


def text(seed: int) -> Batch:
    made = torch.Generator().manual_seed(seed)
    return Batch((), {"input_ids": torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=made)})


TRAINING, HELDOUT = [text(seed) for seed in range(6)], [text(90), text(91)]


@lru_cache(maxsize=1)
def merged() -> Program:
    """The decoder with one key/value head at its first site, by plain averaging."""
    original = decoder()
    rewrite = read_pass("merge_kv_heads{factor=2 method=mean}")
    made, (outcome,) = apply_pass(original, rewrite, ("s0",), Notes(original))
    assert outcome.applied
    return made


def healed(settings: Settings = QUICK, checkpoint: Checkpoint | None = None) -> Healed:
    made = heal(merged(), decoder(), TRAINING, HELDOUT, settings, checkpoint)
    assert isinstance(made, Healed), made
    return made


@lru_cache(maxsize=1)
def plain() -> Healed:
    return healed()


def with_weights(program: Program, weights: dict[str, Tensor]) -> Program:
    made = program.copy()
    for name, value in weights.items():
        made.set_weight(name, value)
    return made


def divergence(program: Program) -> float:
    """KL per token on held-out text, written out."""
    total, rows = 0.0, 0
    for batch in HELDOUT:
        log_p = decoder().run(batch)["logits"].double().log_softmax(-1)
        log_q = program.run(batch)["logits"].double().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
        rows += log_p.shape[0] * log_p.shape[1]
    return total / rows


def test_the_held_out_loss_falls_and_is_the_one_that_is_told() -> None:
    done = plain()
    assert done.accepted and done.unit == "nats/token"
    assert done.before == pytest.approx(divergence(merged()), rel=1e-4)
    mended = with_weights(merged(), dict(done.weights))
    assert done.after == pytest.approx(divergence(mended), rel=1e-4)
    assert done.after < 0.7 * done.before
    assert done.tokens == QUICK.tokens + QUICK.local and done.sites == 1


def test_only_parameters_of_the_touched_site_are_trained() -> None:
    names = touched(merged(), decoder()).names
    assert list(names) == ["s0"] and set(plain().weights) == set(names["s0"])
    site = merged().site("s0")
    assert site.q and site.k and site.v and site.out
    assert {path.weight for path in (site.q, site.k, site.v, site.out)} == set(names["s0"])
    for name, value in plain().weights.items():
        before = merged().weight(name)
        assert value.dtype == before.dtype and value.shape == before.shape
        assert not torch.equal(value, before)


def test_factors_on_the_way_into_a_site_are_trained_with_it() -> None:
    rewrite = read_pass("low_rank_projections{keep=0.5}")
    thin, (outcome,) = apply_pass(decoder(), rewrite, ("s0",), Notes(decoder(), TRAINING, HELDOUT))
    assert outcome.applied
    known = dict(decoder().module.named_parameters())
    new = {n for n, _ in thin.module.named_parameters() if n not in known}
    assert {f"blocks.0.{part}.weight_down0" for part in "qkv"} <= new
    assert touched(thin, decoder()).names.keys() == {"s0"}
    assert set(touched(thin, decoder()).names["s0"]) == new
    region = Region.of(thin, thin.site("s0"), decoder())
    assert region.parameters == new
    assert region.inputs[0] == decoder().site("s0").q.source  # type: ignore[union-attr]


def test_the_programs_given_stay_as_they_are() -> None:
    before = {n: p.clone() for n, p in merged().module.named_parameters()}
    healed(replace(QUICK, tokens=ROWS * LENGTH, local=ROWS * LENGTH))
    for name, value in merged().module.named_parameters():
        assert torch.equal(value, before[name])
        assert value.grad is None


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    again, other = healed(), healed(replace(QUICK, seed=1))
    for name, value in plain().weights.items():
        assert torch.equal(value, again.weights[name])
    assert any(not torch.equal(v, other.weights[n]) for n, v in plain().weights.items())


class _Stopped(Exception):
    """The machine goes down."""


@pytest.mark.parametrize("stage", ["healing site by site", "healing end to end"])
def test_an_interrupted_healing_ends_as_if_it_had_not_been(tmp_path: Place, stage: str) -> None:
    both = windowed(decoder())
    whole = heal(both, decoder(), TRAINING, HELDOUT, QUICK)
    assert isinstance(whole, Healed)
    path = tmp_path / "healing.pt"

    def stop(what: str, share: float) -> None:
        if what == stage and share >= 0.4:
            raise _Stopped

    with pytest.raises(_Stopped):
        heal(both, decoder(), TRAINING, HELDOUT, QUICK, Checkpoint(path, seconds=0.0), stop)
    assert path.is_file()
    shares = list[tuple[str, float]]()
    resumed = heal(
        both, decoder(), TRAINING, HELDOUT, QUICK, Checkpoint(path, seconds=0.0),
        lambda what, share: shares.append((what, share)),
    )  # fmt: skip
    assert isinstance(resumed, Healed)
    assert shares[0] == (stage, pytest.approx(0.4, abs=0.11)), "it began anew"
    assert dict(resumed.stages) == dict(whole.stages) and resumed.fitted == whole.fitted
    for name, value in whole.weights.items():
        assert torch.equal(value, resumed.weights[name])
    assert not path.exists()


def test_a_checkpoint_of_another_healing_is_not_gone_on_with(tmp_path: Place) -> None:
    path = tmp_path / "healing.pt"
    torch.save({"key": "another", "stage": 1, "at": 29}, path)
    done = healed(QUICK, Checkpoint(path))
    for name, value in plain().weights.items():
        assert torch.equal(value, done.weights[name])
    path.write_bytes(b"torn")
    assert Checkpoint(path, "another").load() is None


def test_a_disk_that_refuses_a_checkpoint_stops_no_healing(
    tmp_path: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    Checkpoint(tmp_path / "none" / "healing.pt").save({"at": 1})
    kept = Checkpoint(tmp_path / "healing.pt", "key")
    kept.save({"at": 1})

    def refuse(source: Place, to: Place) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", refuse)
    kept.save({"at": 2})
    assert kept.load() == {"at": 1, "key": "key"}
    assert [path.name for path in tmp_path.iterdir()] == ["healing.pt"]


def test_the_key_of_a_checkpoint_is_of_specs_weights_and_the_original() -> None:
    one, two = windowed(decoder()), windowed(decoder(), left=8)
    other = decoder().copy()
    other.set_weight("blocks.0.q.weight", 2 * other.weight("blocks.0.q.weight"))
    keys = [key_of(QUICK, *pair, HELDOUT) for pair in (
        (one, decoder()), (two, decoder()), (one, one), (one, other), (other, decoder()),
    )]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert keys[0] == key_of(QUICK, windowed(decoder()), decoder(), HELDOUT)


def test_what_does_not_help_is_thrown_away() -> None:
    """A rate this large drives the weights apart: no check is below the start."""
    done = healed(Settings(tokens=20 * ROWS * LENGTH, local=0, rate=0.99))
    assert not done.accepted and not done.weights
    assert done.after == done.before < min(v for k, v in done.stages.items() if k != "start")


def test_low_rank_changes_have_their_rank_and_help() -> None:
    done = healed(replace(QUICK, rank=2))
    assert done.accepted and done.numbers < plain().numbers
    for name, value in done.weights.items():
        change = (value - merged().weight(name)).double()
        assert int(torch.linalg.matrix_rank(change, rtol=1e-4)) == 2, name


def windowed(program: Program, backend: str = "sdpa", left: int = 3) -> Program:
    """The program with a narrow window at every site."""
    made = program.copy()
    for site in made.sites:
        spec = made.spec(site).with_(mask=Mask("window", left=left), backend=backend)
        made.node(site.node).update_arg(4, spec.text)
    made.clean()
    return made


def test_sites_whose_spec_alone_changed_are_touched() -> None:
    assert list(touched(windowed(decoder()), decoder()).names) == ["s0", "s1"]


@pytest.mark.parametrize("backend", ["reference", "sdpa", "chunked"])
def test_gradients_flow_through_every_backend(backend: str) -> None:
    few = replace(QUICK, tokens=QUICK.tokens // 3, local=ROWS * LENGTH)
    done = heal(windowed(decoder(), backend), decoder(), TRAINING, HELDOUT, few)
    assert isinstance(done, Healed) and done.after < done.before


def test_nothing_to_heal_is_said() -> None:
    miss = heal(decoder(), decoder(), TRAINING, HELDOUT, QUICK)
    assert isinstance(miss, Miss) and "no site differs" in miss.reason
    miss = heal(merged(), decoder(), TRAINING, [], QUICK)
    assert isinstance(miss, Miss) and "held-out data" in miss.reason


def test_the_loss_counts_real_tokens_only() -> None:
    valid = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    valid[:, 9:] = False
    first, other = torch.randn(2, ROWS, LENGTH, 7, dtype=torch.float64).unbind()
    cut = distance({"logits": first[:, :9]}, {"logits": other[:, :9]}, Batch())
    other = other.clone()
    other[:, 9:] = 50.0
    padded = distance({"logits": first}, {"logits": other}, Batch(valid=valid))
    assert_close(padded, cut)
    hidden = distance((first,), (first * 1.5,), Batch())  # no logits: |0.5 x|^2 / |x|^2
    assert float(hidden) == pytest.approx(0.25, rel=1e-5)


def test_crops_are_of_the_text_and_depend_on_seed_stage_and_step_alone() -> None:
    draw = Draw.of(TRAINING, seed=3)
    stream = torch.cat([batch.kwargs["input_ids"].reshape(-1) for batch in TRAINING]).tolist()
    seen = set()
    for step in range(4):
        batch = draw(step, 1)
        assert torch.equal(
            batch.kwargs["input_ids"], Draw.of(TRAINING, 3)(step, 1).kwargs["input_ids"]
        )
        for row in batch.kwargs["input_ids"].tolist():
            seen.add(tuple(row))
            at = next(i for i in range(len(stream)) if stream[i : i + LENGTH] == row)
            assert at >= 0
    assert len(seen) > ROWS
    assert not torch.equal(draw(0, 1).kwargs["input_ids"], draw(0, 2).kwargs["input_ids"])


def test_padded_data_is_drawn_batch_by_batch() -> None:
    valid = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    valid[1:, 5:] = False
    batches = [replace(batch, valid=valid) for batch in TRAINING]
    draw = Draw.of(batches, 0)
    assert draw.stream is None and all(
        any(draw(step) is batch for batch in batches) for step in range(5)
    )
    assert tokens(batches[0]) == LENGTH + (ROWS - 1) * 5
    assert tokens(Batch((torch.zeros(3, 8, 32),))) == 24  # a sequence of vectors
    assert tokens(Batch((torch.zeros(3, 3, 32, 32),))) == 3  # images


def test_factors_start_at_the_weights_and_keep_small_ones_whole() -> None:
    weights = {
        "w": torch.randn(9, 7, dtype=torch.float16),
        "b": torch.randn(9),
        "s": torch.ones(2, 5),
    }
    made = Factors(weights, Settings(rank=2))
    assert set(made.held) == {"w:a", "w:b", "b", "s"}
    for name, value in made.merged().items():
        assert torch.equal(value, weights[name]) and value.dtype == weights[name].dtype


def test_the_rate_warms_up_and_ends_near_zero() -> None:
    rates = [share(step, 100) for step in range(100)]
    assert max(rates) == 1.0 and rates.index(1.0) == 5
    assert rates[:6] == sorted(rates[:6]) and rates[5:] == sorted(rates[5:], reverse=True)
    assert 0 < rates[0] < 0.2 and 0 < rates[-1] < 0.01
    assert share(0, 1) == 0.5


@pytest.mark.parametrize(
    ("options", "said"),
    [({"tokens": -1}, "tokens"), ({"rate": 0.0}, "rate"), ({"tokens": 0, "local": 0}, "to train")],
)
def test_settings_that_mean_nothing_are_refused(options: dict[str, float], said: str) -> None:
    with pytest.raises(Problem, match=said) as caught:
        Settings(**options)  # type: ignore[arg-type]
    assert caught.value.code == "A304"


def test_a_stall_while_timing_leaves_time_to_heal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of everything that is timed takes a minute, as if the machine had stood still."""
    begun = start(merged(), decoder(), TRAINING, HELDOUT, QUICK)
    assert not isinstance(begun, Miss)
    before = begun.factors.state()
    clock = {"now": 0.0, "calls": 0.0}

    def now() -> float:
        clock["calls"] += 1
        clock["now"] += 60.0 if clock["calls"] % 4 == 2 else 0.1
        return clock["now"]

    monkeypatch.setattr(pace.time, "perf_counter", now)
    found = pace.by_time(begun, 60.0)
    # 60 s less six checks of 0.1 s, in steps of 0.1 s: some hundred batches
    assert found.tokens > 100 * ROWS * LENGTH and found.local > 0
    for name, value in begun.factors.state().items():
        assert torch.equal(value, before[name])
