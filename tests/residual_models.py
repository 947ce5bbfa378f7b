"""Random tiny models of every residual structure, traced: for tests of blocks and their passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.program import Program
from attnopt.compiler.trace import trace

WIDTH, HEADS, LAYERS, VOCABULARY = 32, 4, 2, 50


def token_inputs(batch: int = 2, seq: int = 9) -> dict[str, Tensor]:
    """Random tokens, all real."""
    ids = torch.randint(3, VOCABULARY, (batch, seq))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def image_inputs(batch: int = 2) -> dict[str, Tensor]:
    """Random images of 16 by 16."""
    return {"pixel_values": torch.randn(batch, 3, 16, 16)}


def _sized(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": 2 * WIDTH,
        "vocab_size": VOCABULARY,
        **more,
    }


def _make(family: str, head: str, settings: dict[str, Any], attention: str) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{family}Config")(**settings)
    config._attn_implementation = attention
    made: nn.Module = getattr(transformers, head)(config)
    return made.eval()


_GPT2 = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "vocab_size": VOCABULARY}
_TOKEN_END = {"bos_token_id": 1, "eos_token_id": 2}
EAGER_ONLY = ("gptj", "sandwich-norm")  # no SDPA spelling, or another function in it
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "LlamaForCausalLM", _sized(num_key_value_heads=2)),
    "neox": ("GPTNeoX", "GPTNeoXForCausalLM", _sized()),
    "neox-sequential": ("GPTNeoX", "GPTNeoXForCausalLM", _sized(use_parallel_residual=False)),
    "gptj": ("GPTJ", "GPTJForCausalLM", {**_GPT2, **_TOKEN_END, "rotary_dim": 4}),
    "gpt2": ("GPT2", "GPT2LMHeadModel", {**_GPT2, **_TOKEN_END}),
    "bert": ("Bert", "BertModel", _sized()),
    "vit": ("ViT", "ViTModel", _sized(image_size=16, patch_size=8)),
    "opt": (
        "OPT",
        "OPTForCausalLM",
        _sized(ffn_dim=2 * WIDTH, word_embed_proj_dim=WIDTH, max_position_embeddings=64),
    ),
    "t5": (
        "T5",
        "T5EncoderModel",
        {
            "d_model": WIDTH,
            "d_kv": 8,
            "d_ff": 2 * WIDTH,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "vocab_size": VOCABULARY,
        },
    ),
    "scaled": ("Granite", "GraniteForCausalLM", _sized(residual_multiplier=0.3)),
    "sandwich-norm": (
        "Gemma2",
        "Gemma2ForCausalLM",
        _sized(num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8),
    ),
}


def family(name: str, attention: str = "sdpa") -> nn.Module:
    """A random model of a family of transformers, in eval mode."""
    return _make(*FAMILIES[name], attention)


def traced_family(name: str, attention: str = "") -> tuple[nn.Module, Program]:
    """The model, called with keyword tensors and returning a dict of tensors, and its trace."""
    from attnopt.compiler.intake.hf_model import HFModel

    spelling = attention or ("eager" if name in EAGER_ONLY else "sdpa")
    model = HFModel(family(name, spelling)).eval()
    inputs = image_inputs() if name == "vit" else token_inputs()
    return model, trace(Loaded(model, None, (), inputs, name, "hf", root_prefix="hf."))


def traced(model: nn.Module, *args: Tensor) -> Program:
    """The trace of a plain module called with positional tensors."""
    return trace(Loaded(model.eval(), None, args, {}, type(model).__name__, "callable"))


class Attention(nn.Module):
    """Causal self-attention with one fused projection, as nanoGPT writes it."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__()
        self.heads = heads
        self.joint = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, width = x.shape
        q, k, v = self.joint(x).split(width, dim=2)
        q, k, v = (
            t.view(batch, seq, self.heads, width // self.heads).transpose(1, 2) for t in (q, k, v)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).contiguous().view(batch, seq, width))


class MLP(nn.Module):
    """Two projections around a spelled-out tanh GELU, which holds sums that are no residuals."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        cube = h + 0.044715 * torch.pow(h, 3.0)
        return self.down(0.5 * h * (1.0 + torch.tanh(0.79788456 * cube)))


class Block(nn.Module):
    """A pre-norm block; a test removes `attention` or `mlp` by setting it to None."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention: nn.Module | None = Attention(width)
        self.mlp: nn.Module | None = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        if self.attention is not None:
            x = x + self.attention(self.norm1(x))
        if self.mlp is not None:
            x = x + self.mlp(self.norm2(x))
        return x


class Decoder(nn.Module):
    """A small GPT: tokens `[batch, seq]` to `{"logits": [batch, seq, vocabulary]}`."""

    def __init__(self, layers: int = LAYERS, width: int = WIDTH) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(64, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        at = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.tokens(input_ids) + self.positions(at)
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(self.norm(x))}
