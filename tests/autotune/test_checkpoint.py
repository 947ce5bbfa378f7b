"""Which steps of a plan are replayed where its healed weights are written."""

from __future__ import annotations

import pytest

from attnopt.autotune.checkpoint import _fitted
from attnopt.compiler.errors import Problem
from attnopt.compiler.plan import Plan, Step

BEFORE = (Step("fuse_attention{}"), Step("merge_kv_heads{factor=2}"), Step("refit{}"))
HEAL = Step("heal{tokens=1024}")


def test_healing_and_what_follows_it_are_left_out() -> None:
    assert _fitted(Plan((*BEFORE, HEAL, Step("unpad{}")))).steps == BEFORE


def test_nothing_may_be_fitted_to_healed_weights() -> None:
    with pytest.raises(Problem) as caught:
        _fitted(Plan((*BEFORE[:2], HEAL, Step("refit{}"))))
    assert caught.value.code == "A521" and "refit" in caught.value.what
