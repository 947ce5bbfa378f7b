"""Which implementation runs an attention among tokens on a GPU, chosen once per bucket of sizes.

The ways, best first: torch's fused attention where it needs no mask tensor (on NVIDIA's devices it
brings cuDNN's and FlashAttention's kernels, which a kernel in Triton does not beat there; see
`benchmarks/gpu.py`; `attnopt.codegen.fused` takes the faster one), the generated kernel,
FlexAttention, torch's fused attention with a mask tensor, the written-out reference. How one is
passed over is in `attnopt.codegen.ways`; the attention of new tokens to a cache is in
`attnopt.codegen.step_dispatch`. Where gradients are wanted, the choice among torch's kernels is
torch's, and the generated kernel comes with its backward kernels.

`block_sparse_prefill` is not among them: `flash_prefill` already leaves out the tiles that windows
and sink tokens do not read, without lists of blocks, and a spec knows no mask by head.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from attnopt.codegen.flex import flex, runs_on_flex
from attnopt.codegen.fused import Fused
from attnopt.codegen.kernel import Load
from attnopt.codegen.target import Target, at_hand
from attnopt.codegen.ways import Way, Ways, learning
from attnopt.compiler import attend
from attnopt.compiler.contract import Miss
from attnopt.compiler.spec import AttentionSpec

_MOST_CELLS = 2**29  # bytes of the mask that FlexAttention makes its block mask of


class Dispatch(Ways):
    """One attention spec on one target, called as `dispatch(q, k, v, *extras)` with the shapes of
    `attnopt.compiler.spec`."""

    def __init__(
        self, spec: AttentionSpec, target: Target, check: bool | None = None, device: str = ""
    ) -> None:
        super().__init__(target, check, device)
        self.spec = spec

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *extras: Tensor) -> Tensor:
        batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
        sizes = (batch.bit_length(), queries.bit_length(), keys.bit_length())
        learns = learning(q, k, v, *extras)
        bucket = (*sizes, queries == keys, q.dtype, k.dtype, v.dtype, learns)
        way = self._ways.get(bucket)
        if way is not None:
            return way(q, k, v, *extras)
        load = Load(batch, queries, keys, str(q.dtype).removeprefix("torch."))

        def wanted() -> Tensor:
            wide = [x.float() if x.is_floating_point() else x for x in extras]
            return attend.reference(q.float(), k.float(), v.float(), wide, self.spec)

        return self._first(bucket, self._listed(load, learns), (q, k, v, *extras), wanted, learns)

    def _listed(self, load: Load, learns: bool) -> list[tuple[str, Way | Miss]]:
        """All ways, best first."""
        spec = self.spec
        return [
            ("scaled_dot_product_attention", _fused(spec, load, learns)),
            ("flash_prefill", self._generated(load, learns)),
            ("FlexAttention", _flexible(spec, load)),
            ("scaled_dot_product_attention with a mask", _masked(spec)),
            ("the reference", _bound(attend.reference, spec)),
        ]

    def _generated(self, load: Load, learns: bool) -> Way | Miss:
        """`flash_prefill`, where gradients are wanted with its backward kernels."""
        launch, names = self.kernel("flash_prefill", self.spec, load), self.spec.extras
        if isinstance(launch, Miss):
            return launch
        if learns:
            from attnopt.codegen.flash_attention import differentiable  # it needs triton

            return differentiable(self.spec, self.target, load, self.device)
        if not names:
            return launch

        def run(q: Tensor, k: Tensor, v: Tensor, *extras: Tensor) -> Tensor:
            return launch(q, k, v, **dict(zip(names, extras, strict=True)))

        return run


def attention(
    q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: AttentionSpec
) -> Tensor:
    """The backend "triton": dispatched on a GPU; elsewhere what runs there."""
    if q.device.type != "cuda":
        return attend.in_torch(spec)(q, k, v, extras, spec)
    run = _dispatch(spec, q.device.index or 0)
    if q.device.index == torch.cuda.current_device():
        return run(q, k, v, *extras)
    with torch.cuda.device(q.device):  # triton launches on the current one
        return run(q, k, v, *extras)


@lru_cache(maxsize=256)
def _dispatch(spec: AttentionSpec, device: int) -> Dispatch:
    return Dispatch(spec, at_hand(device), device=torch.cuda.get_device_name(device))


def _fused(spec: AttentionSpec, load: Load, learns: bool) -> Way | Miss:
    if spec.softcap or spec.extras or spec.mask.kind == "window":
        return Miss("it would need a mask tensor")
    if spec.mask.kind == "causal" and load.queries != load.keys:
        return Miss("its causal flag is for as many queries as keys")
    return _bound(attend.sdpa, spec) if learns else Fused(spec)


def _flexible(spec: AttentionSpec, load: Load) -> Way | Miss:
    reason = runs_on_flex(spec)
    if not reason and load.queries * load.keys > _MOST_CELLS:
        reason = "its block mask is made of a mask of all queries and keys, which is too large"
    return Miss(reason) if reason else _bound(flex, spec)


def _masked(spec: AttentionSpec) -> Way | Miss:
    reason = attend.runs_on_sdpa(spec)
    return Miss(reason) if reason else _bound(attend.sdpa, spec)


def _bound(backend: attend.Backend, spec: AttentionSpec) -> Way:
    return lambda q, k, v, *extras: backend(q, k, v, extras, spec)
