"""How tracing and raising grow with depth: a small Llama in its eager spelling, at three depths."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.raising import raise_program
from attnopt.compiler.trace import trace
from benchmarks.run import Row

DEPTHS = (25, 50, 100)
SECONDS = 30.0
SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip


class _Logits(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(num_hidden_layers=depth, attn_implementation="eager", **SIZES)
        self.hf = LlamaForCausalLM(config)

    def forward(self, input_ids: Tensor) -> Tensor:
        made: Tensor = self.hf(input_ids=input_ids, use_cache=False).logits
        return made


def rows() -> list[Row]:
    """One row per depth; the deepest has to be raised in `SECONDS`."""
    return [_row(depth) for depth in DEPTHS]


def _row(depth: int) -> Row:
    inputs = {"input_ids": torch.randint(128, (2, 16))}
    loaded = Loaded(_Logits(depth).eval(), None, (), inputs, f"{depth} layers", "hf")
    begun = time.monotonic()
    traced = trace(loaded)
    between = time.monotonic()
    raised = raise_program(traced)
    ended = time.monotonic()
    numbers = {
        "layers": depth, "nodes": len(traced.graph.nodes), "raised": len(raised.sites),
        "trace_s": between - begun, "raise_s": ended - between,
    }  # fmt: skip
    whole = len(raised.sites) == depth
    met = whole and ended - between < SECONDS if depth == DEPTHS[-1] else None
    figure = f"trace {between - begun:.1f} s, raise {ended - between:.1f} s"
    bar = f"raised in under {SECONDS:.0f} s" if depth == DEPTHS[-1] else ""
    return Row(f"Llama, {depth} layers, {numbers['nodes']} nodes", figure, bar, met, numbers)
