"""A random Llama-shaped model in the eager attention spelling, 8 layers, 512 wide, 4,096 tokens:
exact rewrites."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnopt.autotune.optimize import optimize
from benchmarks.run import Row

BAR = 3.0
LENGTH = 4096


class Decoder(nn.Module):
    """A transformers Llama that takes tokens and gives its logits."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
            num_key_value_heads=8, vocab_size=2048, max_position_embeddings=LENGTH,
        )  # fmt: skip
        config._attn_implementation = "eager"
        self.hf = LlamaForCausalLM(config)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Logits for tokens [batch, seq]."""
        return {"logits": self.hf(input_ids=input_ids, use_cache=False).logits}


def rows() -> list[Row]:
    """One row: the ratio over eager, and over the faster baseline."""
    torch.manual_seed(0)
    model = Decoder().eval()
    tokens = torch.randint(0, 2048, (1, LENGTH))
    result = optimize(model, {"input_ids": tokens}, max_drop=0.0)
    assert result.speed is not None
    over = result.speed.over["eager"]
    figure = f"{over.value:.2f}x over eager ({over.low:.2f} to {over.high:.2f})"
    figure += f"; {result.speed.ratio.value:.2f}x over {result.speed.best}"
    errors = [o.error for o in result.outcomes if o.applied and o.error is not None]
    numbers = {
        "over": {k: v.value for k, v in result.speed.over.items()},
        "worst_error": max(errors, default=None),
    }
    return [
        Row(
            "Llama-shaped 8x512, 4,096 tokens, eager",
            figure,
            f"at least {BAR}x over eager",
            over.value >= BAR,
            numbers,
        )
    ]
