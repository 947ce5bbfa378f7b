"""Which implementation runs an attention on a GPU, chosen once per bucket of sizes.

The ways, best first: torch's fused attention where it needs no mask tensor (on NVIDIA's devices it
brings cuDNN's and FlashAttention's kernels, which a kernel in Triton does not beat there; see
`benchmarks/gpu.py`), the generated kernel, FlexAttention, torch's fused attention with a mask
tensor, the written-out reference. One that misses the spec is passed over; one that fails on the
device is too, with one warning. Once a bucket has had its first call nothing waits for the device,
so later calls may be captured in a graph. Running out of memory is never taken for a failure.

Where gradients are wanted, only ways that give them are taken: the generated kernel with its
backward kernels, or what torch differentiates. Each is then tried forward and backward.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from attnopt.codegen.flex import flex, runs_on_flex
from attnopt.codegen.kernel import Kernel, Load, kernels
from attnopt.codegen.shipped import chosen
from attnopt.codegen.target import Target, at_hand
from attnopt.compiler import attend
from attnopt.compiler.contract import Miss
from attnopt.compiler.spec import AttentionSpec

CHECK = "ATTNOPT_CHECK_KERNELS"
"""Set to 1: the first call of each bucket is compared with the reference in float32."""

_ALLOWED = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}  # norms of error
Way = Callable[..., Tensor]


class Dispatch:
    """One attention spec on one target, called as `dispatch(q, k, v, *extras)` with the shapes of
    `attnopt.compiler.spec`. `passed` tells why each way before the chosen one was passed over, by
    bucket. `check` compares first calls; None asks the environment variable `CHECK`."""

    def __init__(self, spec: AttentionSpec, target: Target, check: bool | None = None) -> None:
        self.spec, self.target = spec, target
        self.check = os.environ.get(CHECK) == "1" if check is None else check
        self.passed: dict[tuple[Any, ...], list[str]] = {}
        self._ways: dict[tuple[Any, ...], Way] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *extras: Tensor) -> Tensor:
        batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
        sizes = (batch.bit_length(), queries.bit_length(), keys.bit_length())
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *extras))
        bucket = (*sizes, queries == keys, q.dtype, learns)
        way = self._ways.get(bucket)
        if way is not None:
            return way(q, k, v, *extras)
        return self._first(bucket, q, k, v, extras)

    def _first(
        self, bucket: tuple[Any, ...], q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor]
    ) -> Tensor:
        """Try the ways in turn on the bucket's first inputs, and keep the first that works."""
        load = Load(q.shape[0], q.shape[2], k.shape[2], str(q.dtype).removeprefix("torch."))
        passed = self.passed[bucket] = []
        learns: bool = bucket[-1]
        for name, way in _ways(self.spec, self.target, load, learns):
            if isinstance(way, Miss):
                passed.append(f"{name}: {way.reason}")
                continue
            try:
                if learns and not _gives_gradients(way, q, k, v, *extras):
                    passed.append(f"{name}: it gives no gradients")
                    continue
                out = way(q, k, v, *extras)
            except failures() as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                passed.append(f"{name}: {reason}")
                _warn(f"{name} failed on {self.target.title} and is passed over: {reason}")
                continue
            wrong = self._wrong(out, q, k, v, extras) if self.check else ""
            if wrong:
                passed.append(f"{name}: {wrong}")
                _warn(f"{name} is wrong on {self.target.title} and is passed over: {wrong}")
                continue
            self._ways[bucket] = way
            return out
        raise AssertionError("the reference runs every spec")

    def _wrong(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor]) -> str:
        wide = [x.float() if x.is_floating_point() else x for x in extras]
        want = attend.reference(q.float(), k.float(), v.float(), wide, self.spec)
        error = float((out.float() - want).norm() / want.norm().clamp_min(1e-30))
        allowed = _ALLOWED.get(q.dtype, 1e-3)
        return "" if error <= allowed else f"an error of {error:.1e}, where {allowed:g} is allowed"


def attention(
    q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: AttentionSpec
) -> Tensor:
    """The backend "triton": dispatched on a GPU; elsewhere what runs there."""
    if q.device.type != "cuda":
        return _fallback(spec)(q, k, v, extras, spec)
    run = _dispatch(spec, q.device.index or 0)
    if q.device.index == torch.cuda.current_device():
        return run(q, k, v, *extras)
    with torch.cuda.device(q.device):  # triton launches on the current one
        return run(q, k, v, *extras)


def failures() -> tuple[type[Exception], ...]:
    """What a kernel raises that does not fit or does not compile on a device."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import TritonError

    return (CompilationError, TritonError, InductorError, TorchDynamoException)


@lru_cache(maxsize=256)
def _dispatch(spec: AttentionSpec, device: int) -> Dispatch:
    return Dispatch(spec, at_hand(device))


def _gives_gradients(way: Way, *tensors: Tensor) -> bool:
    """Whether a way does, found out on copies, of which the caller's graph knows nothing."""
    given = [x.detach().requires_grad_(x.requires_grad) for x in tensors]
    with saved_tensors_hooks(lambda x: x, lambda x: x):  # not those of a checkpoint around it
        out = way(*given)
        if out.requires_grad:
            towards = [x for x in given if x.requires_grad]
            torch.autograd.grad(out, towards, torch.zeros_like(out), allow_unused=True)
    return out.requires_grad


def _ways(
    spec: AttentionSpec, target: Target, load: Load, learns: bool = False
) -> list[tuple[str, Way | Miss]]:
    return [
        ("scaled_dot_product_attention", _fused(spec, load)),
        *(
            (name, _learning(spec, target, load) if learns else _generated(cls, spec, target, load))
            for name, cls in _prefill_kernels()
        ),
        ("FlexAttention", _flexible(spec)),
        ("scaled_dot_product_attention with a mask", _masked(spec)),
        ("the reference", _bound(attend.reference, spec)),
    ]


def _fused(spec: AttentionSpec, load: Load) -> Way | Miss:
    if spec.softcap or spec.extras or spec.mask.kind == "window":
        return Miss("it would need a mask tensor")
    if spec.mask.kind == "causal" and load.queries != load.keys:
        return Miss("its causal flag is for as many queries as keys")
    return _bound(attend.sdpa, spec)


def _generated(cls: type[Kernel[Any]], spec: AttentionSpec, target: Target, load: Load) -> Any:
    missed = cls.supports(spec, target)
    if missed is not None:
        return missed
    constants = chosen(cls, spec, target, load).constants(spec)
    launcher, names = cls.launcher, spec.extras

    def run(q: Tensor, k: Tensor, v: Tensor, *extras: Tensor) -> Any:
        return launcher(q, k, v, **dict(zip(names, extras, strict=True)), **constants)

    return run


def _learning(spec: AttentionSpec, target: Target, load: Load) -> Any:
    from attnopt.codegen.flash_attention import differentiable  # it needs triton

    return differentiable(spec, target, load)


def _flexible(spec: AttentionSpec) -> Way | Miss:
    reason = runs_on_flex(spec)
    return Miss(reason) if reason else _bound(flex, spec)


def _masked(spec: AttentionSpec) -> Way | Miss:
    reason = attend.runs_on_sdpa(spec)
    return Miss(reason) if reason else _bound(attend.sdpa, spec)


def _bound(backend: attend.Backend, spec: AttentionSpec) -> Way:
    return lambda q, k, v, *extras: backend(q, k, v, extras, spec)


def _fallback(spec: AttentionSpec) -> attend.Backend:
    return attend.reference if attend.runs_on_sdpa(spec) else attend.sdpa


@lru_cache(maxsize=1)
def _prefill_kernels() -> tuple[tuple[str, type[Kernel[Any]]], ...]:
    return tuple((name, cls) for name, cls in kernels().items() if name == "flash_prefill")


@lru_cache(maxsize=64)
def _warn(message: str) -> None:
    """Once per message."""
    warnings.warn(message, stacklevel=4)
