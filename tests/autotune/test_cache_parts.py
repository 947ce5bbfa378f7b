"""What a search under a budget of cache bytes is made of: shares, sizes per layer, comparisons."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from attnopt.autotune import wording
from attnopt.autotune.accuracy import Accuracy
from attnopt.autotune.cache_entry import CacheEntry, most_bytes
from attnopt.autotune.cache_levels import Level, allot, tail
from attnopt.autotune.cache_search import CacheSearch, Kept, best, loses_less
from attnopt.autotune.per_layer import Varied, vary
from attnopt.autotune.request import Request, parse_kv_bytes
from attnopt.compiler.contract import passes
from attnopt.compiler.errors import Problem
from attnopt.compiler.plan import Step
from tests.autotune import cache_bench as cb


def test_a_drop_that_no_demand_allows_is_not_advised() -> None:
    assert wording.allowing(0.0301) == ("--max-drop 3.1%", 0.031)
    assert wording.allowing(0.9991)[1] is None and wording.allowing(math.inf)[1] is None
    with pytest.raises(Problem):
        Request(max_drop=1.0)


def test_of_equal_losses_the_fewest_bytes_are_taken() -> None:
    latent, grouped = cb.a_plan(0.1, 60, 0.05, latent=True), cb.a_plan(0.101, 50)
    assert best([latent, grouped]) is grouped  # 0.1 is not surely less
    assert (
        best([replace(latent, accuracy=cb.a_plan(0.1, 0).accuracy), cb.a_plan(0.3, 50)]).bytes == 60
    )
    assert loses_less(cb.a_plan(0.1, 1), cb.a_plan(0.2, 1)) and not loses_less(latent, grouped)
    bare = replace(grouped, accuracy=Accuracy("mine", 0.2, 0.2, 0.2, bounded=False))
    assert loses_less(latent, bare) and not loses_less(bare, latent)
    assert math.isinf(Kept(()).loss) and not Kept(()).within(1.0)


def test_bytes_go_where_they_spare_most() -> None:
    def levels(cost: float) -> list[Level]:
        return [Level("", 8.0, 0.0), Level("half", 4.0, cost), Level("quarter", 2.0, 3 * cost)]

    sites = {"s0": levels(1.0), "s1": levels(10.0), "s2": levels(0.1)}
    chosen = allot(sites, 14.0)
    assert [chosen[site].form for site in sites] == ["half", "", "quarter"]
    assert [level.form for level in allot(sites, 24.0).values()] == ["", "", ""]
    assert allot(sites, 5.0) == {}


def test_what_a_site_loses_is_read_off_its_evidence() -> None:
    told = {"k_predicted": 0.5, "k_heldout": 0.1, "v_heldout": 0.2, "rotary_kept": 0.9}
    assert tail(told) == pytest.approx(0.4)
    assert tail({"k_predicted": 0.5}) == 0.5 and tail({"kl_before": 1.0}) is None


LEVELS = {
    site: [Level("", 6.0, 0.0), Level("half", 4.0, 1.0), Level("third", 2.0, cost)]
    for site, cost in (("s0", 1.5), ("s1", 9.0))
}


class _Search:
    """What `vary` asks of a search, on levels that are made up."""

    def __init__(self, plans: int = 9) -> None:
        self.looked: list[list[Step]] = []
        self.asked: list[str] = []
        self.untold: list[str] = []
        self.plans, self.accuracy = plans, cb.a_plan(0.1, 8).accuracy
        self.bench = self

    def look(self, steps: list[Step]) -> Kept:
        self.looked.append(steps)
        self.asked.append("plan")
        return Kept(tuple(steps), 8, accuracy=self.accuracy)

    def drop(self, steps: list[Step], sketch: bool) -> Any:
        self.asked.append("sketch" if sketch else "heldout")
        return self.accuracy

    def goes_on(self) -> bool:
        return len(self.looked) < self.plans

    def spent(self) -> str:
        return "it ran out"


def _varied(
    monkeypatch: pytest.MonkeyPatch, search: _Search, levels: Mapping[str, list[Level]] = LEVELS
) -> list[Varied]:
    monkeypatch.setattr("attnopt.autotune.per_layer._levels", lambda *asked: levels)
    return vary(cast(CacheSearch, search), Kept((Step("half"),), 8))


def test_layers_that_are_left_alone_are_sizes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    search = _Search()
    made = _varied(monkeypatch, search)
    assert [varied.by for varied in made] == ["predicted tail", "measured sensitivity"]
    assert search.looked == [[Step("third", ("s0",))]] * 2 and not search.untold
    assert search.asked == ["plan", "sketch", "sketch", "plan"]  # what costs less goes first
    assert made[0].shares == {"s0": 2 / 6, "s1": 1.0}


def test_sizes_per_layer_that_are_not_tried_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    search = _Search(plans=1)  # time lasts for the predicted plan, not for sketches
    assert [varied.by for varied in _varied(monkeypatch, search)] == ["predicted tail"]
    sketches = "sizes per layer by measured sensitivity were not tried for half: it ran out"
    assert search.untold == [sketches]
    search = _Search()
    search.accuracy = Accuracy("causal-lm", math.inf, -math.inf, math.inf, False, "NaN at token 3")
    assert len(_varied(monkeypatch, search)) == 1
    assert "s0 alone: NaN at token 3" in search.untold[0]
    search = _Search()
    assert not _varied(monkeypatch, search, {"s0": LEVELS["s0"]}) and not search.looked
    assert "there is one layer" in search.untold[0]
    assert not _varied(monkeypatch, search, {"s0": LEVELS["s0"], "s1": LEVELS["s1"][:1]})
    assert "does not say of every layer" in search.untold[1]
    even = {site: levels[:2] for site, levels in LEVELS.items()}
    assert not _varied(monkeypatch, search, even) and not search.looked
    assert "no others are predicted to lose less" in search.untold[2]


def test_whole_bytes_are_counted() -> None:
    assert 0.29 * 100 < 29 and most_bytes(0.29, 100) == 29 and most_bytes(0.299, 100) == 29
    assert CacheEntry(0.29, 100, 29).met and not CacheEntry(0.29, 100, 30).met


def test_a_latent_is_of_whole_numbers() -> None:
    def program(*heads: int) -> Any:
        spec = SimpleNamespace(head_dim=32, v_dim=32)
        return SimpleNamespace(
            sites=[SimpleNamespace(spec=spec, kv_heads=n, rotary=None) for n in heads]
        )

    (made,) = passes()["latent_kv"].caching(program(4), 0.3)
    assert made.keep == 76 / 256  # type: ignore[attr-defined]
    (made,) = passes()["latent_kv"].caching(program(4, 1), 0.3)
    for numbers in (256, 64):
        assert round(numbers * made.keep) <= 0.3 * numbers  # type: ignore[attr-defined]
    assert not passes()["latent_kv"].caching(program(4), 0.001)
    assert not passes()["latent_kv"].caching(program(), 0.5)


@pytest.mark.parametrize(("said", "meant"), [("50%", 0.5), ("0.5", 0.5), (" 12.5 % ", 0.125)])
def test_shares_are_read(said: str, meant: float) -> None:
    assert parse_kv_bytes(said) == meant


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kv_bytes": 1.0}, "no share of a cache"),
        ({"kv_bytes": 0.0}, "no share of a cache"),
        ({"kv_bytes": 50.0}, "no share of a cache"),
        ({"kv_bytes": math.nan}, "no share of a cache"),
        ({"budget": 2.0}, "at once"),
        ({"max_drop": 0.0}, "--max-drop 0"),
        ({"effort": "none"}, "--effort none"),
    ],
)
def test_demands_that_cannot_be_met_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(Problem, match=said) as caught:
        cb.request(**given)
    assert caught.value.code == "A410" and caught.value.help
    with pytest.raises(Problem, match="cannot read the share of the cache `half`") as caught:
        parse_kv_bytes("half")
    assert "--kv-bytes 50%" in caught.value.help
