"""Measures a saved pylm on its held-out text, and writes its model card from what was measured."""

from __future__ import annotations

import math
import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from pylm_corpus import CONTEXT, HELD_OUT, SEPARATOR, encode
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SLICE_WINDOWS = 8


def token_nll(model: nn.Module, tokens: Tensor) -> Tensor:
    """Negative log-likelihood in nats of tokens[:, 1:], float32 [batch, length].

    `tokens` is int64 [batch, length + 1].
    """
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    nll = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    return nll.view(len(tokens), -1)


@torch.no_grad()
def held_out_nll(model: nn.Module, stream: Tensor, windows: int | None = None) -> Tensor:
    """Nats of every token but the first of int64 [tokens], in windows of `CONTEXT` tokens.

    Consecutive windows share one token, so that each token is predicted once, from at most
    `CONTEXT` before it in its own window; the last, shorter window counts too. `windows` limits
    it to the first few. Float32 [tokens - 1].
    """
    device = next(model.parameters()).device
    pieces = [stream[i : i + CONTEXT + 1] for i in range(0, len(stream) - 1, CONTEXT)][:windows]
    model.eval()
    nll = [token_nll(model, piece[None].to(device))[0].cpu() for piece in pieces]
    model.train()
    return torch.cat(nll)


def measure(folder: Path, progress: dict[str, Any]) -> dict[str, Any]:
    """Held-out loss of the model saved in `folder`, with what is needed to interpret it.

    The weights are read back and computed in float32. `loss_by_quarter` is the mean loss in each
    quarter of the windows: it falls where the model uses a long context.
    """
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = (folder / "eval.txt").read_text(encoding="utf-8")
    tokens = encode(PreTrainedTokenizerFast.from_pretrained(folder), text)
    nll = held_out_nll(model, tokens)
    loss = nll.mean().item()
    whole = nll[: len(nll) // CONTEXT * CONTEXT].view(-1, 4, CONTEXT // 4)
    size = len(text.replace(SEPARATOR, "").encode())
    config = model.config
    return {
        "loss_nats_per_token": round(loss, 4),
        "perplexity": round(math.exp(loss), 3),
        "bits_per_byte": round(nll.sum().item() / math.log(2) / size, 4),
        "loss_by_quarter": [round(x, 4) for x in whole.mean(dim=(0, 2)).tolist()],
        "slice_windows": SLICE_WINDOWS,
        "slice_loss_nats_per_token": round(nll[: SLICE_WINDOWS * CONTEXT].mean().item(), 4),
        "context": CONTEXT,
        "eval_tokens": len(tokens),
        "eval_bytes": size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "mlp": config.intermediate_size,
        "vocabulary": config.vocab_size,
        **progress,
        "held_out": list(HELD_OUT),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def card(m: dict[str, Any]) -> str:
    """The model card, every number of it taken from the metrics `m`."""
    modules = ", ".join(f"`{name}`" for name in m["held_out"])
    quarters = ", ".join(f"{x:.3f}" for x in m["loss_by_quarter"])
    return f"""# pylm

A small language model of Python source, trained for this project's tests and examples.

{_table(m)}

The loss is measured on the weights in this folder, computed in float32 over all of `eval.txt`
({m["eval_tokens"]:,} tokens, {m["eval_bytes"]:,} bytes) in consecutive windows of
{m["context"]:,} tokens; every token is predicted from what precedes it in its window. By the
quarter of the window it is {quarters}. `metrics.json` holds the same numbers.

## Data

The source of the standard library of Python {m["versions"]["python"]}, without its tests, its
character tables and its bundled archives. These modules are held out (neither the model nor its
tokenizer saw them): {modules}.

- `eval.txt`: the held-out modules, each after a `{SEPARATOR}`.
- `calibration.txt`: training modules, drawn at random, for passes that need activations.

Both texts are copied from Python and licensed under the PSF License Agreement, version 2
(Copyright Python Software Foundation; see `LICENSE-PSF.txt`).

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("examples/models/pylm", dtype="float32")
tokenizer = AutoTokenizer.from_pretrained("examples/models/pylm")
```

## Reproduce

    python examples/train_pylm.py --minutes {m["budget_minutes"]:g} --threads {m["threads"]} \
--seed {m["seed"]}

Sequences have 256 tokens, then 512, then {m["context"]:,}, from 0, 50 and 80% of the budget on;
a step takes {m["batch_tokens"]:,} tokens, in the first two stages half of that. Muon (float32
Newton-Schulz) updates the matrices of the blocks, AdamW the rest; the learning rate warms up,
stays, and decays linearly. The budget is wall-clock time: another machine, or the same one under
another load, takes another number of steps and ends at another loss, and another Python version
brings another text.
"""


def _table(m: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    rows = {
        "architecture": f"`LlamaForCausalLM`: {m['layers']} layers, {m['hidden']} wide, "
        f"{m['heads']} query and {m['heads']} key/value heads of width "
        f"{m['hidden'] // m['heads']} (MHA), SwiGLU {m['mlp']} wide, rotary positions, "
        "tied embeddings",
        "parameters": f"{m['parameters']:,}, float16 safetensors",
        "tokenizer": f"byte-level BPE, {m['vocabulary']:,} tokens; token 0, `{SEPARATOR}`, "
        "precedes every module",
        "context": f"{m['context']:,} tokens",
        "held-out loss": f"**{m['loss_nats_per_token']:.4f} nats per token** "
        f"(perplexity {m['perplexity']:.2f}, {m['bits_per_byte']:.4f} bits per byte)",
        "trained": f"{m['tokens_seen']:,} tokens ({m['epochs']:.1f} passes over "
        f"{m['train_tokens']:,}), {m['steps']:,} steps, {m['minutes']:.0f} minutes",
        "device": m["device"],
        "versions": versions,
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())])
