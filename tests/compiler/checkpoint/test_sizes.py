"""Sizes of attentions in the fields of configs: their names, and numbers that a config refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from attnopt.compiler.checkpoint.changes import Pair
from attnopt.compiler.checkpoint.sizes import sizes
from attnopt.compiler.errors import Problem
from attnopt.compiler.site import Site
from attnopt.compiler.spec import AttentionSpec

transformers = pytest.importorskip("transformers")


def _stub(before: AttentionSpec, after: AttentionSpec) -> Any:
    """One attention with these specs, as far as sizes are concerned."""
    both = (
        Site("s0", "attention", "layers.0", "", spec, spec.kv_heads) for spec in (before, after)
    )
    return SimpleNamespace(
        pairs=(Pair(*both),), original=SimpleNamespace(spec=lambda _: before),
        program=SimpleNamespace(spec=lambda _: after),
    )  # fmt: skip


def test_fields_have_the_names_of_their_family() -> None:
    config = transformers.T5Config(d_kv=16, num_heads=4)
    before = AttentionSpec(4, 4, head_dim=16, v_dim=16, scale=1.0)
    smaller, fewer = before.with_(head_dim=8, v_dim=8), before.with_(heads=2, kv_heads=2)
    assert sizes(config, _stub(before, smaller)) == {"d_kv": (16, 8)}
    assert sizes(config, _stub(before, fewer)) == {"num_heads": (4, 2)}
    assert sizes(config, _stub(before, before)) == {}


def test_values_of_other_dims_than_keys_are_refused() -> None:
    before = AttentionSpec(4, 4, head_dim=16, v_dim=16, scale=0.25)
    with pytest.raises(Problem) as caught:
        sizes(transformers.LlamaConfig(), _stub(before, before.with_(v_dim=8)))
    assert caught.value.code == "A521" and "one dim for all of them" in caught.value.why


@pytest.mark.parametrize(("left", "written"), [(4, 4), (5, 6), (7, 0)])
def test_a_number_of_heads_that_the_config_takes(left: int, written: int) -> None:
    """The width of a Llama, 96, has to be a multiple of their number, which 5 and 7 do not
    divide."""
    own = {"hidden_size": 96, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 16}
    config = transformers.LlamaConfig(**own)
    made = _stub(*(AttentionSpec(n, n, head_dim=16, v_dim=16, scale=0.25) for n in (8, left)))
    if written:
        told = dict.fromkeys(("num_attention_heads", "num_key_value_heads"), (8, written))
        assert sizes(config, made) == told
        return
    with pytest.raises(Problem) as caught:
        sizes(config, made)
    assert caught.value.where == "layers.0" and "96) is not a multiple" in caught.value.why
