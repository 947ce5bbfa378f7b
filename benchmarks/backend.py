"""`torch.compile(model, backend="attnopt")` against `torch.compile` with Inductor alone: twelve
architectures in the eager spelling, at 512 and at 1,024 tokens, random weights, float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from attnopt.autotune.baselines import differs
from attnopt.autotune.timing import Contender, compare
from attnopt.compiler.program import Batch
from benchmarks.run import Row

LENGTHS = (512, 1024)
NOISE = 0.97  # a ratio of two runs of one program was seen as low as this
BAR = 1.5
_SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8,
    "vocab_size": 1024, "max_position_embeddings": 1024, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_GPT = {"n_embd": 256, "n_layer": 2, "n_head": 8, "n_positions": 1024, "vocab_size": 1024,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
MODELS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("Llama", "LlamaForCausalLM", "LlamaConfig", _GROUPED),
    ("Mistral, window of 256", "MistralForCausalLM", "MistralConfig",
     {**_GROUPED, "sliding_window": 256}),
    ("Qwen3", "Qwen3ForCausalLM", "Qwen3Config", {**_GROUPED, "head_dim": 32}),
    ("Gemma", "GemmaForCausalLM", "GemmaConfig", {**_GROUPED, "head_dim": 32}),
    ("Phi-3", "Phi3ForCausalLM", "Phi3Config", _GROUPED),
    ("GPT-NeoX", "GPTNeoXForCausalLM", "GPTNeoXConfig", _SIZES),
    ("GPT-2", "GPT2LMHeadModel", "GPT2Config", _GPT),
    ("GPT-Neo", "GPTNeoForCausalLM", "GPTNeoConfig",
     {"hidden_size": 256, "num_layers": 2, "num_heads": 8, "intermediate_size": 512,
      "max_position_embeddings": 1024, "window_size": 256, "vocab_size": 1024,
      "attention_types": [[["global", "local"], 1]], "bos_token_id": 1, "eos_token_id": 2}),
    ("BLOOM", "BloomForCausalLM", "BloomConfig",
     {"hidden_size": 256, "n_layer": 2, "n_head": 8, "vocab_size": 1024, "pad_token_id": 0,
      "bos_token_id": 1, "eos_token_id": 2}),
    ("OPT", "OPTForCausalLM", "OPTConfig",
     {"hidden_size": 256, "ffn_dim": 512, "num_hidden_layers": 2, "num_attention_heads": 8,
      "vocab_size": 1024, "max_position_embeddings": 1024, "word_embed_proj_dim": 256}),
    ("BERT", "BertModel", "BertConfig", _SIZES),
    ("T5 encoder", "T5EncoderModel", "T5Config",
     {"d_model": 256, "d_kv": 32, "d_ff": 512, "num_layers": 2, "num_heads": 8,
      "vocab_size": 1024}),
)  # fmt: skip


class Tokens(nn.Module):
    """A transformers model that takes tokens and gives one tensor."""

    def __init__(self, name: str, head: str, config: str, settings: dict[str, Any]) -> None:
        super().__init__()
        import transformers

        made = getattr(transformers, config)(**settings)
        made._attn_implementation = "eager"
        torch.manual_seed(0)
        self.hf = getattr(transformers, head)(made)
        self.decodes = "CausalLM" in head or "LMHead" in head

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits or hidden states for tokens [batch, seq]."""
        made = self.hf(input_ids=input_ids, **({"use_cache": False} if self.decodes else {}))
        found: Tensor = made.logits if hasattr(made, "logits") else made.last_hidden_state
        return found


def rows() -> list[Row]:
    """One row per architecture and length."""
    return [_row(model, length) for model in MODELS for length in LENGTHS]


def _row(model: tuple[str, str, str, dict[str, Any]], length: int) -> Row:
    torch._dynamo.reset()
    counters.clear()
    fused = False
    eager = Tokens(*model).eval()
    batch = Batch((), {"input_ids": torch.randint(3, 1024, (1, length))})
    with torch.no_grad():
        forms = {name: torch.compile(eager, backend=name) for name in ("inductor", "attnopt")}
        for name, form in forms.items():
            wrong = differs(form, eager, [batch])
            fused |= name == "inductor" and counters["inductor"]["fuse_attention"] > 0
            if wrong:
                return Row(f"{model[0]}, {length} tokens", f"{name}: {wrong}", met=False)
        contenders = [Contender("eager", eager), *(Contender(*item) for item in forms.items())]
        timing = compare(contenders, [batch], seconds=4.0, rounds=9)
    over = timing.ratio("attnopt", "inductor")
    matched = timing.ratio("inductor", "eager").value
    short = length == min(LENGTHS)
    bar = NOISE if short else BAR
    said = f"{over.value:.2f}x over Inductor ({over.interval.low:.2f} to {over.interval.high:.2f})"
    said += f"; {timing.ratio('attnopt', 'eager').value:.2f}x over eager, Inductor {matched:.2f}x"
    numbers = {"over_inductor": over.as_json(), "inductor_over_eager": matched, "fused": fused}
    case = f"{model[0]}, {length} tokens"
    if fused and not short:
        return Row(case, said, "none: Inductor fuses its attention itself", None, numbers)
    what = "never slower" if short else "where Inductor does not fuse it"
    return Row(case, said, f"at least {bar}x, {what}", over.value >= bar, numbers)
