"""What the kernels are held against: torch's fused attentions, FlexAttention, and whatever of
flash-linear-attention and FlashInfer is installed. A peer that cannot run a case is left out of it,
and the table says why."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Peer = Callable[[dict[str, Any]], Any]


def sdpa(backend: str, causal: bool = True) -> Peer:
    """scaled_dot_product_attention held to one backend: "CUDNN_ATTENTION", "FLASH_ATTENTION"."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run(given: dict[str, Any]) -> Tensor:
        q, k, v = given["q"], given["k"], given["v"]
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
            )

    return run


def flex(mask_mod: Callable[..., Tensor], queries: int, keys: int, device: str = "cuda") -> Peer:
    """FlexAttention, compiled, with the mask as blocks."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    blocks = create_block_mask(mask_mod, None, None, queries, keys, device=device, _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(given: dict[str, Any]) -> Any:
        q, k, v = given["q"], given["k"], given["v"]
        return compiled(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])

    return run


def flashinfer_decode() -> Peer | str:
    """FlashInfer's decoding over a paged cache, or why it is not here."""
    if importlib.util.find_spec("flashinfer") is None:
        return "flashinfer-python is not installed"
    import flashinfer

    planned: dict[int, Any] = {}

    def run(given: dict[str, Any]) -> Any:
        q, pages, table = given["q"], given["pages"], given["table"]
        key = table.data_ptr()
        if key not in planned:
            planned[key] = _planned(flashinfer, q, pages, table)
        return planned[key].run(q[:, :, 0], pages)

    return run


def _planned(flashinfer: Any, q: Tensor, pages: Tensor, table: Tensor) -> Any:
    batch, each = table.shape
    space = torch.zeros(256 << 20, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "NHD", use_tensor_cores=True)
    starts = torch.arange(0, batch * each + 1, each, dtype=torch.int32, device=q.device)
    last = torch.full((batch,), pages.shape[2], dtype=torch.int32, device=q.device)
    wrapper.plan(
        starts, table.flatten().int(), last, q.shape[1], pages.shape[3], q.shape[3],
        pages.shape[2], q_data_type=q.dtype, kv_data_type=pages.dtype,
    )  # fmt: skip
    return wrapper


def fla_linear(name: str) -> Peer | str:
    """A chunked linear attention of flash-linear-attention ("chunk_retention"), or why it is not
    here."""
    if importlib.util.find_spec("fla") is None:
        return "flash-linear-attention is not installed"
    import fla.ops

    chunked = getattr(fla.ops, name)

    def run(given: dict[str, Any]) -> Any:
        q, k, v = (given[x].transpose(1, 2) for x in "qkv")
        return chunked(q, k, v)

    return run
