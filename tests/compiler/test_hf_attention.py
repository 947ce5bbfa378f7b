"""`attn_implementation="attnopt"` in transformers' own models: the same logits, the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

import attnopt  # noqa: E402
from attnopt.compiler import attend_window, hf_attention  # noqa: E402
from attnopt.compiler.errors import Problem  # noqa: E402
from tests.tolerance import assert_close  # noqa: E402

SMALL: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 16},
    "Gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 20.0},
    "GptOss": {"sliding_window": 16, "num_local_experts": 2, "num_experts_per_tok": 1},
    "Qwen3": {},
    "Llama4": {
        "attention_chunk_size": 16,
        "intermediate_size_mlp": 96,
        "num_local_experts": 2,
        "interleave_moe_layer_step": 2,
    },
}


def _models(kind: str, **settings: Any) -> tuple[Any, Any]:
    """A random model with eager attention, and the same with attnopt's."""
    attnopt.register_hf()
    made = []
    for implementation in ("eager", "attnopt"):
        torch.manual_seed(0)
        name = "Llama4TextConfig" if kind == "Llama4" else f"{kind}Config"
        config = getattr(transformers, name)(**SMALL, **KINDS[kind], **settings)
        config._attn_implementation = implementation
        made.append(getattr(transformers, f"{kind}ForCausalLM")(config).eval())
    assert [m.config._attn_implementation for m in made] == ["eager", "attnopt"]
    return made[0], made[1]


def _ids(rows: int, length: int) -> Tensor:
    return torch.randint(3, 101, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_logits_of_whole_and_padded_prompts(kind: str, side: str) -> None:
    eager, ours = _models(kind)
    ids, mask = _ids(2, 80), torch.ones(2, 80, dtype=torch.long)
    if side != "none":
        mask[1, slice(0, 30) if side == "left" else slice(50, None)] = 0
    with torch.no_grad():
        expected, actual = (m(input_ids=ids, attention_mask=mask).logits for m in (eager, ours))
    assert_close(actual[mask.bool()], expected[mask.bool()], kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_gives_the_same_tokens(kind: str, cache: str) -> None:
    eager, ours = _models(kind)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :9] = 0
    made = [
        m.generate(_ids(2, 40), attention_mask=mask, max_new_tokens=24, do_sample=False,
                   cache_implementation=cache, disable_compile=True)
        for m in (eager, ours)
    ]  # fmt: skip
    assert made[0].shape[1] > 40
    assert torch.equal(*made)


def test_windows_of_a_prefill_run_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    eager, ours = _models("Mistral")
    lengths: list[int] = []

    def counted(q: Tensor, *rest: Any) -> Tensor:
        lengths.append(q.shape[2])
        return attend_window.chunked(q, *rest)

    monkeypatch.setattr(hf_attention, "chunked", counted)
    with torch.no_grad():
        for length, blocks in ((200, 2), (20, 0)):
            lengths.clear()
            ids = _ids(2, length)
            assert_close(ours(ids).logits, eager(ids).logits, f"{length} tokens")
            assert len(lengths) == blocks


def test_it_compiles_in_one_graph() -> None:
    eager, ours = _models("Llama")
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(_ids(2, 30)).logits, eager(_ids(2, 30)).logits, "compiled")


def test_attention_weights_when_asked_for() -> None:
    eager, ours = _models("Gemma2")
    with torch.no_grad():
        expected, actual = (m(_ids(2, 30), output_attentions=True) for m in (eager, ours))
    assert len(actual.attentions) == 2
    for mine, theirs in zip(actual.attentions, expected.attentions, strict=True):
        assert_close(mine, theirs, "weights")


def test_training_with_dropout_has_gradients() -> None:
    _, ours = _models("Llama", attention_dropout=0.3)
    ours.train()
    ours(_ids(2, 30), labels=_ids(2, 30)).loss.backward()
    assert all(p.grad is not None for p in ours.model.layers.parameters())
    with torch.no_grad():
        assert not torch.equal(ours(_ids(2, 30)).logits, ours(_ids(2, 30)).logits)


def test_a_paged_cache_is_refused() -> None:
    q = torch.randn(1, 4, 3, 16)
    with pytest.raises(Problem, match="paged cache"):
        hf_attention.forward(torch.nn.Identity(), q, q, q, None, cache=object())
