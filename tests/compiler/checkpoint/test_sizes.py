"""Sizes of attentions in the fields of configs: their names, and numbers that a config refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

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


def test_heads_that_differ_between_layers_are_refused_with_why_no_field_helps() -> None:
    spec = AttentionSpec(8, 8, head_dim=16, v_dim=16, scale=0.25)
    made = _stub(spec, spec.with_(kv_heads=4))
    other = _stub(spec, spec.with_(kv_heads=2)).pairs[0]
    with pytest.raises(Problem) as caught:
        sizes(transformers.LlamaConfig(), SimpleNamespace(**{**vars(made), "pairs": (
            made.pairs[0], other)}))  # fmt: skip
    assert "does not read per_layer_config" in caught.value.why


def test_llama_does_not_read_what_its_config_says_of_a_layer() -> None:
    """Why sizes are the same in all layers. Once this fails, checkpoints may say more."""
    small: dict[str, Any] = {
        "vocab_size": 40, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4,
    }  # fmt: skip

    def built(**more: Any) -> Any:
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, **more)).eval()

    with pytest.raises(RuntimeError, match="'num_key_value_heads' is a per-layer attribute"):
        built(per_layer_config={1: {"num_key_value_heads": 1}})
    ids = torch.arange(8)[None]
    plain, skipping = built(), built(per_layer_config={1: {"skip": ["attention"]}})
    assert torch.equal(plain(ids).logits, skipping(ids).logits)
    assert torch.equal(plain(ids).logits, built(skip=[1])(ids).logits)
