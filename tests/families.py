"""Random tiny models of the families that have to raise fully, with the facts that raising has to
find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 100
_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """How to build a model and what raising has to say of each of its attentions."""

    name: str
    build: Callable[[str], nn.Module]
    inputs: Callable[[int, int], Inputs]
    kv_heads: int
    mask: str
    position: str
    spellings: tuple[str, ...] = ("sdpa", "eager")
    gain: float = 1.0
    qk_norm: bool = False


class Wrapped(nn.Module):
    """A transformers model that takes tensors and gives one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.hf = model

    def _tensor(self, **inputs: Any) -> Tensor:
        made = self.hf(**inputs)
        found: Tensor = made.logits if hasattr(made, "logits") else made.last_hidden_state
        return found


class Decoder(Wrapped):
    def forward(self, input_ids: Tensor) -> Tensor:
        return self._tensor(input_ids=input_ids, use_cache=False)


class Encoder(Wrapped):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self._tensor(input_ids=input_ids, attention_mask=attention_mask)


class Vision(Wrapped):
    def forward(self, pixel_values: Tensor) -> Tensor:
        return self._tensor(pixel_values=pixel_values)


def _hf(
    head: str, config: str, wrapper: type[Wrapped], **settings: Any
) -> Callable[[str], nn.Module]:
    def build(spelling: str) -> nn.Module:
        transformers = pytest.importorskip("transformers")
        made = getattr(transformers, config)(**settings)
        made._attn_implementation = spelling
        torch.manual_seed(0)
        return wrapper(getattr(transformers, head)(made)).eval()

    return build


def ids(batch: int, length: int) -> Inputs:
    """Random tokens."""
    return {"input_ids": torch.randint(3, VOCABULARY, (batch, length))}


def masked(batch: int, length: int) -> Inputs:
    """Random tokens, the rows of different real lengths."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(batch):
        mask[row, length - row :] = 0
    return {**ids(batch, length), "attention_mask": mask}


def pixels(batch: int, length: int) -> Inputs:
    """Random images; their size is the model's."""
    return {"pixel_values": torch.randn(batch, 3, 32, 32)}


def floats(batch: int, length: int) -> Inputs:
    """Random embeddings."""
    return {"x": torch.randn(batch, length, 64)}


class Block(nn.Module):
    """A plain pre-norm block with fused qkv, a tril buffer and masked_fill."""

    bias: Tensor

    def __init__(self, width: int = 64, heads: int = 4, longest: int = 128) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        square = torch.ones(1, 1, longest, longest)
        self.register_buffer("bias", square.tril())

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm(x)).split(width, dim=2)
        )
        scores = (q @ k.transpose(-2, -1)) * (1.0 / k.size(-1) ** 0.5)
        scores = scores.masked_fill(self.bias[:, :, :length, :length] == 0, float("-inf"))
        mixed = (
            (F.softmax(scores, dim=-1) @ v).transpose(1, 2).contiguous().view(batch, length, width)
        )
        x = x + self.proj(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Nano(nn.Module):
    def __init__(self, longest: int = 128) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(longest=longest), Block(longest=longest))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.blocks(x)
        return made


class TorchEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layers(x)
        return made


class Cross(nn.Module):
    """Cross-attention by nn.MultiheadAttention; with weights asked for it is the eager spelling."""

    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.attention, self.weights = nn.MultiheadAttention(64, 4, batch_first=True), weights

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        made: Tensor = x + self.attention(x, memory, memory, need_weights=self.weights)[0]
        return made


def _plain(kind: Callable[[], nn.Module]) -> Callable[[str], nn.Module]:
    def build(spelling: str) -> nn.Module:
        torch.manual_seed(0)
        return kind().eval()

    return build


FAMILIES = (
    Family("llama", _hf("LlamaForCausalLM", "LlamaConfig", Decoder, num_key_value_heads=2,
                        **_SIZES),
           ids, 2, "causal", "rotary(half, 16 dims)"),
    Family("mistral", _hf("MistralForCausalLM", "MistralConfig", Decoder, num_key_value_heads=2,
                          sliding_window=6, **_SIZES),
           ids, 2, "window(left=6)", "rotary(half, 16 dims)"),
    Family("qwen3", _hf("Qwen3ForCausalLM", "Qwen3Config", Decoder, num_key_value_heads=2,
                        head_dim=16, **_SIZES),
           ids, 2, "causal", "rotary(half, 16 dims)", qk_norm=True),
    Family("phi3", _hf("Phi3ForCausalLM", "Phi3Config", Decoder, num_key_value_heads=2, **_SIZES),
           ids, 2, "causal", "rotary(half, 16 dims)"),
    Family("gpt2", _hf("GPT2LMHeadModel", "GPT2Config", Decoder, n_embd=64, n_layer=2, n_head=4,
                       n_positions=128, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2),
           ids, 4, "causal", "learned"),
    Family("gpt_neox", _hf("GPTNeoXForCausalLM", "GPTNeoXConfig", Decoder, rotary_pct=0.25,
                           **_SIZES),
           ids, 4, "causal", "rotary(half, 4 dims)"),
    Family("opt", _hf("OPTForCausalLM", "OPTConfig", Decoder, hidden_size=64, ffn_dim=96,
                      num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY,
                      max_position_embeddings=128, word_embed_proj_dim=64),
           ids, 4, "causal", "learned", gain=0.25),
    Family("bert", _hf("BertModel", "BertConfig", Encoder, **_SIZES),
           masked, 4, "padding", "learned"),
    Family("vit", _hf("ViTModel", "ViTConfig", Vision, hidden_size=64, intermediate_size=96,
                      num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8),
           pixels, 4, "full", "learned"),
    Family("t5_encoder", _hf("T5EncoderModel", "T5Config", Encoder, d_model=64, d_kv=16, d_ff=96,
                             num_layers=2, num_heads=4, vocab_size=VOCABULARY),
           masked, 4, "padding+relative-bias", "relative-bias"),
    Family("nn.TransformerEncoder", _plain(TorchEncoder), floats, 4, "full", "none", ("plain",)),
    Family("nano", _plain(Nano), floats, 4, "causal", "none", ("plain",)),
    Family("nn.MultiheadAttention", _plain(lambda: Cross(False)),
           lambda b, t: {**floats(b, t), "memory": torch.randn(b, t + 4, 64)},
           4, "full", "none", ("plain",)),
    Family("nn.MultiheadAttention weights", _plain(lambda: Cross(True)),
           lambda b, t: {**floats(b, t), "memory": torch.randn(b, t + 4, 64)},
           4, "full", "none", ("plain",)),
)  # fmt: skip
CASES = tuple((family, spelling) for family in FAMILIES for spelling in family.spellings)
