"""Modules in memory: transformers models are wrapped, and the caller's module is left as it was."""

from __future__ import annotations

import torch
from torch import nn

import attnopt
from attnopt.compiler.intake.source import from_module
from tests.cli.conftest import LENGTH, ROWS, WIDTH, encoder


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 32}
    return LlamaForCausalLM(
        LlamaConfig(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, **sizes)
    )


def test_a_transformers_model_is_read_with_its_inputs_or_with_none() -> None:
    tokens = torch.randint(0, 32, (2, 6))
    assert from_module(_llama(), {"input_ids": tokens}).task == "causal-lm"
    assert from_module(_llama(), None).kwargs["input_ids"].dim() == 2
    assert attnopt.inspect(_llama(), {"input_ids": tokens}, time=False).raised == 1


def test_the_modules_training_flags_come_back() -> None:
    model = encoder().train()
    model.layers[0].eval()
    before = [module.training for module in model.modules()]
    attnopt.inspect(model, (torch.randn(ROWS, LENGTH, WIDTH),), time=False)
    assert [module.training for module in model.modules()] == before
