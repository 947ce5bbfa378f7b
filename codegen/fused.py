"""Torch's fused attention by the fastest of its kernels on a device.

Torch takes cuDNN's or FlashAttention's by rules that know the device and the shapes, not how long
each takes. So the first call of a bucket times them in turn, and later ones call the fastest; where
that is hardly faster than torch's own choice, the choice stays torch's, and so it does under
deterministic algorithms and autocast. What cuDNN plans for each new length is not in these times.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from statistics import median

import torch
from torch import Tensor

from attnopt.codegen.ways import FINAL, disagreement
from attnopt.compiler import attend
from attnopt.compiler.spec import AttentionSpec

_ROUNDS, _BUDGET = 7, 0.05  # how often each is timed, and seconds after which no round begins
_ROWS = 256  # of an output that are compared, about
_FASTER = 0.97  # of the time of torch's choice, at most, for another one
_DTYPES = (torch.float16, torch.bfloat16)  # that there are several kernels for
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Clock = Callable[[Callable[[], object]], float]


class Fused:
    """scaled_dot_product_attention of a spec without a mask tensor, called as `fused(q, k, v)` with
    the shapes of `attnopt.compiler.spec`. `rivals` are the kernels that it may run by, a GPU's
    where None; `clock` tells the seconds of a call."""

    def __init__(
        self, spec: AttentionSpec, rivals: Mapping[str, Attention] | None = None,
        clock: Clock | None = None,
    ) -> None:  # fmt: skip
        self.spec, self.clock = spec, clock or _on_device
        self.rivals = _rivals(spec) if rivals is None else rivals
        self.chosen = ""
        """Whose kernel was the fastest; torch's choice where empty."""
        self._run: Attention | None = None
        self._decided = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not self._decided:
            return self._first(q, k, v)
        if self._run is not None and _free():
            try:
                return self._run(q, k, v)
            except FINAL:
                raise
            except RuntimeError:  # operands that lie otherwise in memory, or it was switched off
                self.chosen, self._run = "", None
        return self._plain(q, k, v)

    def _first(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = self._plain(q, k, v)
        if not _free() or (q.is_cuda and torch.cuda.is_current_stream_capturing()):
            return out  # a later call decides
        if q.dtype in _DTYPES:
            with suppress(torch.OutOfMemoryError):  # of the trials
                self.chosen = self._fastest(q, k, v, out)
        self._run, self._decided = self.rivals.get(self.chosen), True
        return out

    def _plain(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend.sdpa(q, k, v, (), self.spec)

    def _fastest(self, q: Tensor, k: Tensor, v: Tensor, wanted: Tensor) -> str:
        runs: dict[str, Attention] = {"": self._plain}
        for name, run in self.rivals.items():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch tells why one is not for these operands
                    near = _near(run(q, k, v), wanted)
            except FINAL:
                raise
            except RuntimeError:
                continue
            if near:
                runs[name] = run
        if len(runs) == 1:
            return ""
        taken: dict[str, list[float]] = {name: [] for name in runs}
        while len(taken[""]) < _ROUNDS and sum(map(sum, taken.values())) < _BUDGET:
            for name, run in runs.items():
                taken[name].append(self.clock(partial(run, q, k, v)))
        times = {name: median(samples) for name, samples in taken.items()}
        best = min(times, key=times.__getitem__)
        return best if times[best] < _FASTER * times[""] else ""


def _rivals(spec: AttentionSpec) -> dict[str, Attention]:
    """The kernels that torch has, each as an operator of its own: a choice by context manager takes
    longer than a small attention."""
    causal, scale, aten = spec.mask.kind == "causal", spec.scale, torch.ops.aten

    def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _require(torch.backends.cuda.cudnn_sdp_enabled())
        made: Tensor = aten._scaled_dot_product_cudnn_attention.default(
            q, k, v, None, False, 0.0, causal, False, scale=scale
        )[0]
        return made

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _require(torch.backends.cuda.flash_sdp_enabled())
        made: Tensor = aten._scaled_dot_product_flash_attention.default(
            q, k, v, 0.0, causal, False, scale=scale
        )[0]
        return made

    return {"cuDNN": cudnn, "FlashAttention": flash}


def _require(enabled: bool) -> None:
    if not enabled:
        raise RuntimeError("it is switched off")


def _free() -> bool:
    """Whether time may choose, and operators see the dtypes that are given."""
    return not (torch.are_deterministic_algorithms_enabled() or torch.is_autocast_enabled("cuda"))


def _near(got: Tensor, wanted: Tensor) -> bool:
    """Whether two outputs are alike in a sample of their rows."""
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return False
    every = max(1, got.shape[2] // _ROWS)
    return not disagreement(got[:, :, ::every], wanted[:, :, ::every].float())


def _on_device(run: Callable[[], object]) -> float:
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    run()
    ended.record()
    ended.synchronize()
    return float(begun.elapsed_time(ended)) / 1e3
