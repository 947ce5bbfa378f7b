"""Locks: what they hold, what counts as lost, weaker, moved and gained, and damaged files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import attnopt
from attnopt.compiler.errors import Problem
from attnopt.compiler.lock import FORMAT, Lock, Locked, lock, read_lock
from attnopt.compiler.lock_diff import Difference, difference
from attnopt.compiler.whole_file import write_whole
from tests.cli.conftest import WIDTH, encoder

FACTS: dict[str, Any] = {
    "heads": 8, "kv_heads": 2, "head_dim": 16, "v_dim": 16, "scale": 0.25, "mask": "causal",
    "mask_certainty": "proved", "position": "rotary(half, 16 dims)", "qk_norm": False,
    "spelling": "sdpa", "exactness": "exact",
}  # fmt: skip


def site(module: str, missing: dict[str, str] | None = None, **changed: Any) -> Locked:
    return Locked(module, True, {**FACTS, **changed}, missing or {})


def left_alone(module: str, reason: str = "not known") -> Locked:
    return Locked(module, False, reason=reason)


def held(*sites: Locked, **versions: str) -> Lock:
    model = {"name": "m", "inputs": "x", "parameters": 1}
    options = dict.fromkeys(("attention", "dtype", "batch", "length"))
    return Lock(model, options, {"torch": "2.12", **versions}, sites)


def kinds(told: Difference) -> list[tuple[str, str, str]]:
    return [(change.kind, change.module, change.fact) for change in told.changes]


def test_what_is_the_same_holds() -> None:
    told = difference(held(site("a"), left_alone("b")), held(site("a"), left_alone("b", "other")))
    assert told.ok and not told.changes and not told.versions and not told.notes


def test_a_site_that_is_not_found_any_more_is_lost() -> None:
    told = difference(held(site("a"), site("b", heads=4)), held(site("a")))
    assert kinds(told) == [("lost", "b", "")] and not told.ok


def test_a_site_that_is_left_alone_now_is_lost_with_the_reason() -> None:
    told = difference(held(site("a")), held(left_alone("a", "`sin` is in the way")))
    assert kinds(told) == [("lost", "a", "raised")] and not told.ok
    assert "`sin` is in the way" in told.changes[0].what


@pytest.mark.parametrize(
    ("name", "was", "now", "kind"),
    [
        ("mask_certainty", "proved", "observed", "weaker"),
        ("mask_certainty", "observed", "proved", "gained"),
        ("exactness", "exact", "guarded", "weaker"),
        ("mask", "causal", "tensor", "weaker"),
        ("mask", "tensor", "causal", "gained"),
        ("mask", "causal", "full", "different"),
        ("position", "none", "unknown", "weaker"),
        ("heads", 8, 4, "different"),
        ("scale", 0.25, 0.125, "different"),
        ("spelling", "sdpa", "eager", "different"),
    ],
)
def test_facts_are_compared_one_by_one(name: str, was: Any, now: Any, kind: str) -> None:
    told = difference(held(site("a", **{name: was})), held(site("a", **{name: now})))
    assert kinds(told) == [(kind, "a", name)]
    assert told.ok is (kind == "gained")
    assert (told.changes[0].was, told.changes[0].now) == (was, now)


def test_a_fact_that_is_not_found_any_more_is_weaker() -> None:
    less = site("a", {"k": "`cat` joins 2 projections"})
    assert kinds(difference(held(site("a")), held(less))) == [("weaker", "a", "k")]
    told = difference(held(less), held(site("a")))
    assert kinds(told) == [("gained", "a", "k")] and told.ok


def test_another_reason_is_no_change() -> None:
    first, second = site("a", {"k": "`cat_1` joins"}), site("a", {"k": "`cat_7` joins"})
    assert first.fingerprint == second.fingerprint
    assert not difference(held(first), held(second)).changes


def test_a_rename_is_told_and_holds() -> None:
    told = difference(held(site("old.0"), site("old.1")), held(site("new.0"), site("new.1")))
    assert told.ok and [c[:2] for c in kinds(told)] == [("moved", "old.0"), ("moved", "old.1")]
    worse = difference(held(site("old.0")), held(site("new.0", heads=4)))
    assert not worse.ok and ("lost", "old.0", "") in kinds(worse)


def test_what_is_new_is_a_gain() -> None:
    told = difference(held(left_alone("a")), held(site("a"), site("b"), left_alone("c")))
    assert told.ok and [change.kind for change in told.changes] == ["gained"] * 3


def test_a_module_that_is_called_twice_has_two() -> None:
    told = difference(held(site("a"), site("a", heads=4)), held(site("a")))
    assert kinds(told) == [("lost", "a", "")]


def test_versions_that_changed_are_told() -> None:
    told = difference(held(transformers="5.1"), held(transformers="5.2", einops="1.0"))
    assert told.versions == {"transformers": ("5.1", "5.2"), "einops": (None, "1.0")}


def _lock(seed: int, folder: Path) -> Lock:
    model = encoder()
    torch.manual_seed(seed)
    for weight in model.parameters():
        torch.nn.init.normal_(weight)
    here = Path.cwd()
    os.chdir(folder)
    try:
        return lock(attnopt.inspect(model, torch.randn(2, 5, WIDTH), time=False), {})
    finally:
        os.chdir(here)


def test_other_weights_and_folders_give_the_same_lock(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    first, second = _lock(1, tmp_path), _lock(2, tmp_path / "elsewhere")
    assert first.text == second.text
    assert str(tmp_path) not in first.text and ".py" not in first.text
    assert len(first.sites) == 2 and {"torch", "python", "attnopt"} <= set(first.versions)
    path = tmp_path / "attnopt.lock"
    write_whole(path, first.text)
    assert read_lock(path) == first
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["attnopt.lock"]


def _without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda told: told.pop(key)


def _edited(told: dict[str, Any]) -> None:
    told["sites"][0]["facts"]["heads"] = 9


def _wrong_format(told: dict[str, Any]) -> None:
    told["format"] = FORMAT + 1


def _wrong_option(told: dict[str, Any]) -> None:
    told["options"]["batch"] = "many"


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (_without("sites"), "`sites` is missing"),
        (_without("format"), "no lock of attnopt"),
        (_without("versions"), "`versions` is missing"),
        (_edited, "the fingerprint of a is not that of its facts"),
        (_wrong_format, "is not known"),
        (_wrong_option, "`batch` is of another kind"),
        (lambda told: told["sites"][0].pop("facts"), "`facts` is missing"),
        (lambda told: told["sites"][0]["facts"].pop("mask"), "a has no `mask`"),
        (lambda told: told.update(sites=[3]), ""),
        (lambda told: told.update(sites=None), ""),
    ],
)
def test_a_damaged_lock_is_a_problem(
    tmp_path: Path, damage: Callable[[dict[str, Any]], Any], why: str
) -> None:
    told = json.loads(held(site("a")).text)
    damage(told)
    path = tmp_path / "attnopt.lock"
    path.write_text(json.dumps(told))
    with pytest.raises(Problem) as caught:
        read_lock(path)
    assert caught.value.code == "A516" and why in caught.value.why


@pytest.mark.parametrize("text", [None, "", "{", "[]", "\x00\xff", "[" * 100_000])
def test_what_is_no_lock_is_a_problem(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "attnopt.lock"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(Problem) as caught:
        read_lock(path)
    assert caught.value.code == "A516" and caught.value.why


def test_a_file_that_cannot_be_written_is_a_problem(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none" / "attnopt.lock"):
        with pytest.raises(Problem) as caught:
            write_whole(path, "")
        assert caught.value.code == "A502"
