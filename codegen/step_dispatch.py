"""The attention of a decoder's new tokens, dispatched on a GPU: what decoders call for specs of the
backend "triton". Elsewhere it is computed in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnopt.codegen.dispatch import attention
from attnopt.codegen.latent_ways import LatentDispatch, PromptDispatch
from attnopt.codegen.step_ways import StepDispatch
from attnopt.codegen.target import Target, at_hand
from attnopt.compiler import attend_latent, attend_step
from attnopt.compiler.spec import AttentionSpec


def attention_step(
    q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: AttentionSpec, end: int,
    ring: bool,
) -> Tensor:  # fmt: skip
    """`attend_step.to_newest` or, in a `ring`, `to_ring`."""
    if not attend_step.is_gpu(q):
        if ring:
            return attend_step.ringed(q, k, v, extras, spec, end)
        return attend_step.newest(q, k, v, extras, spec)
    return _run(_step(spec, ring, q.device.index or 0), q, k, v, end, *extras)


def latent_step(
    q: Tensor, kept: Tensor, up_k: Tensor, up_v: Tensor, bias: Tensor, extras: Sequence[Tensor],
    spec: AttentionSpec, rope_at: int,
) -> Tensor:  # fmt: skip
    """`attend_latent.step`."""
    if not attend_step.is_gpu(q):
        given = q, kept, up_k, up_v, bias, extras, spec
        return attend_latent.absorbed(*given, attend_step.newest)
    run = _latent(spec, rope_at, q.device.index or 0)
    return _run(run, q, kept, up_k, up_v, bias, *extras)


def latent_prompt(
    q: Tensor, k: Tensor, v: Tensor, shared: Tensor, extras: Sequence[Tensor], spec: AttentionSpec,
    rope_at: int,
) -> Tensor:  # fmt: skip
    """`attend_latent.prompt`."""
    if not attend_step.is_gpu(q):
        return attention(q, k, v, extras, spec)
    return _run(_prompt(spec, rope_at, q.device.index or 0), q, k, v, shared, *extras)


def _run(run: Any, q: Tensor, *args: Any) -> Tensor:
    if q.device.index is None or q.device.index == torch.cuda.current_device():
        made: Tensor = run(q, *args)
        return made
    with torch.cuda.device(q.device):  # triton launches on the current one
        made = run(q, *args)
        return made


@lru_cache(maxsize=256)
def _step(spec: AttentionSpec, ring: bool, device: int) -> StepDispatch:
    target, name = _here(device)
    return StepDispatch(spec, target, ring, device=name)


@lru_cache(maxsize=256)
def _latent(spec: AttentionSpec, rope_at: int, device: int) -> LatentDispatch:
    target, name = _here(device)
    return LatentDispatch(spec, target, rope_at, device=name)


@lru_cache(maxsize=256)
def _prompt(spec: AttentionSpec, rope_at: int, device: int) -> PromptDispatch:
    target, name = _here(device)
    return PromptDispatch(spec, target, rope_at, attention, device=name)


def _here(device: int) -> tuple[Target, str]:
    return at_hand(device), torch.cuda.get_device_name(device)
