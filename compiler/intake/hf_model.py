"""`HFModel`: a transformers model with plain tensors on both sides, so that its traced form needs
no class to load.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.checkpoint import first_line

DTYPES = ("float32", "bfloat16", "float16", "float64")
BACKENDS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")


class HFModel(nn.Module):
    """A transformers model as `hf`: tensors go in, a plain dict of tensors comes out, no cache.

    Inputs: ids, masks and positions are int64 `[batch, seq]`, `pixel_values` is `[batch, channels,
    height, width]`. Outputs, where the model has them: `logits`, `last_hidden_state`,
    `pooler_output`, and the other tensors of the model's result by their names.
    """

    hf: Any

    def __init__(self, hf: nn.Module) -> None:
        super().__init__()
        self.hf = hf
        takes = inspect.signature(hf.forward).parameters
        open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes.values())
        self._fixed: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
        if "return_dict" in takes or open_ended:
            self._fixed["return_dict"] = True

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_features: Tensor | None = None,
        input_values: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Run the model; see the class for shapes."""
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "pixel_values": pixel_values,
            "input_features": input_features,
            "input_values": input_values,
        }
        inputs = {name: value for name, value in given.items() if value is not None}
        outputs = self.hf(**inputs, **self._fixed)
        return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}


def is_hf(module: nn.Module) -> bool:
    """Whether a module is a model of transformers, told by its base class and without importing the
    library.
    """
    return any(
        base.__name__ == "PreTrainedModel" and base.__module__.startswith("transformers.")
        for base in type(module).__mro__
    )


def check_attention(attention: str | None) -> None:
    """Raise `Problem` A114 for a spelling of attention that transformers does not have."""
    if attention is not None and attention not in BACKENDS:
        raise Problem(
            "A114",
            f"unknown attention implementation {attention!r}",
            help=f"known: {', '.join(BACKENDS)}",
        )


def named_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype of a name (float32, bfloat16, float16, float64). Raises `Problem` A114."""
    if name is None or isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise Problem("A114", f"unknown dtype {name!r}", help=f"known: {', '.join(DTYPES)}")
    found: torch.dtype = getattr(torch, name)
    return found


def set_attention(hf: Any, attention: str | None) -> None:
    """Choose the model's attention spelling.

    Without a choice, one that is not transformers' own (a kernel to be fetched) becomes eager.
    Raises `Problem` A114 for one that the model does not have.
    """
    current = getattr(hf.config, "_attn_implementation", None)
    wanted = attention or (current if current in BACKENDS else "eager")
    if wanted == current:
        return
    try:
        hf.set_attn_implementation(wanted)
    except (ValueError, ImportError) as error:
        raise Problem(
            "A114", f"{type(hf).__name__} has no {wanted} attention", why=first_line(error)
        ) from error
