"""What the kernels are held against: torch's fused attentions, FlexAttention, and whatever of
flash-linear-attention, FlashInfer and FlashMLA is installed. A peer that cannot run a case is left
out of it, and the table says why."""

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


def sdpa_backward(backend: str, causal: bool = True) -> Peer:
    """The gradients of `sdpa`; the forward pass of each set of inputs runs once, on its first
    call."""
    forward = sdpa(backend, causal)
    made: dict[int, tuple[Tensor, list[Tensor]]] = {}

    def run(given: dict[str, Any]) -> tuple[Tensor, ...]:
        key = given["q"].data_ptr()
        if key not in made:
            leaves = [given[name].detach().requires_grad_() for name in "qkv"]
            made[key] = forward(dict(zip("qkv", leaves, strict=True))), leaves
        out, leaves = made[key]
        return torch.autograd.grad(out, leaves, given["grad"], retain_graph=True)

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
        return planned[key].run(q[:, :, 0], pages)[:, :, None]

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


def flashinfer_latent(scale: float) -> Peer | str:
    """FlashInfer's decoding of latents (MLA, absorbed), or why it is not here. The cache is taken
    as pages of 64 tokens that lie in order."""
    if importlib.util.find_spec("flashinfer") is None:
        return "flashinfer-python is not installed"
    import flashinfer.mla

    planned: dict[int, Any] = {}

    def run(given: dict[str, Any]) -> Tensor:
        q, q_rope = given["q_latent"][:, :, 0], given["q_rope"][:, :, 0]
        latents, k_rope = (_in_pages(given[name]) for name in ("latents", "k_rope"))
        key = latents.data_ptr()
        if key not in planned:
            space = torch.empty(128 << 20, dtype=torch.int8, device=q.device)
            wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(space)
            batch, each = q.shape[0], len(latents) // q.shape[0]
            whole = torch.arange(batch * each + 1, dtype=torch.int32, device=q.device)
            wrapper.plan(
                whole[: batch + 1], whole[:: each], whole[:-1], given["lengths"], q.shape[1],
                latents.shape[2], k_rope.shape[2], latents.shape[1], False, scale, q.dtype,
                latents.dtype,
            )  # fmt: skip
            planned[key] = wrapper
        out: Tensor = planned[key].run(q, q_rope, latents, k_rope)
        return out[:, :, None]

    return run


def flash_mla(scale: float) -> Peer | str:
    """FlashMLA's decoding of latents, or why it is not here."""
    if importlib.util.find_spec("flash_mla") is None:
        return "FlashMLA is not installed"
    from flash_mla import flash_mla_with_kvcache, get_mla_metadata

    made: dict[int, Any] = {}

    def run(given: dict[str, Any]) -> Tensor:
        latents, lengths = given["latents"], given["lengths"]
        rank, key = latents.shape[2], latents.data_ptr()
        if key not in made:
            q = torch.cat((given["q_latent"], given["q_rope"]), 3).transpose(1, 2).contiguous()
            cache = _in_pages(torch.cat((latents, given["k_rope"]), 2))[:, :, None]
            table = torch.arange(len(cache), dtype=torch.int32, device=q.device)
            plan = get_mla_metadata(lengths, q.shape[2], 1)
            made[key] = q, cache, table.view(len(lengths), -1), *plan
        q, cache, table, plan, splits = made[key]
        out, _ = flash_mla_with_kvcache(q, cache, table, lengths, rank, plan, splits, scale, False)
        return out.transpose(1, 2)

    return run


def _in_pages(x: Tensor, page: int = 64) -> Tensor:
    """A cache `[batch, slots, dim]` as pages `[batch * slots / page, page, dim]`, not copied."""
    batch, slots, depth = x.shape
    return x.view(batch * slots // page, page, depth)


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
