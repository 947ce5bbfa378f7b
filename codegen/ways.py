"""The first of several ways to compute something that works on a device, chosen once per bucket of
sizes.

One that misses what is wanted is passed over; one that fails on the device is too, with one
warning. Once a bucket has had its first call outside of a capture, nothing waits for the device, so
later calls may be captured in a graph. Running out of memory is never taken for a failure. Where
gradients are wanted, only ways that give them are taken, and each is tried forward and backward.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from attnopt.codegen.kernel import Kernel, Load, kernels
from attnopt.codegen.shipped import chosen
from attnopt.codegen.target import Target
from attnopt.compiler.contract import Miss

CHECK = "ATTNOPT_CHECK_KERNELS"
"""Set to 1: the first call of each bucket is compared with the reference in float32."""

ALLOWED = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}  # norms of error
_DTYPES = ("float32", "float16", "bfloat16")
MOST_BATCH = 65535  # where the second and third axis of a grid end
# What no other way would mend, and what is the same error in the next.
FINAL = (torch.OutOfMemoryError, torch.AcceleratorError)
Way = Callable[..., Tensor]
Bucket = tuple[Any, ...]


class Ways:
    """What was chosen for one target. `passed` tells why each way before the chosen one was passed
    over, by bucket. `check` compares first calls; None asks the environment variable `CHECK`.
    `device` is the name of the device, by which the user's own tile sizes are found."""

    def __init__(self, target: Target, check: bool | None = None, device: str = "") -> None:
        self.target, self.device = target, device
        self.check = os.environ.get(CHECK) == "1" if check is None else check
        self.passed: dict[Bucket, list[str]] = {}
        self._ways: dict[Bucket, Way] = {}

    def _first(
        self, bucket: Bucket, ways: Sequence[tuple[str, Way | Miss]], args: Sequence[Any],
        wanted: Callable[[], Tensor], learns: bool = False,
    ) -> Tensor:  # fmt: skip
        """Try the ways in turn on the bucket's first arguments, and keep the first that works.
        `wanted` is what comes out in float32; `learns` asks for gradients of the arguments, which
        are tensors then."""
        passed = self.passed[bucket] = []
        last = ways[-1][0]
        for name, way in ways:
            if isinstance(way, Miss):
                passed.append(f"{name}: {way.reason}")
                continue
            try:
                if learns and not _gives_gradients(way, *args):
                    passed.append(f"{name}: it gives no gradients")
                    continue
                out = way(*args)
            except failures() as error:
                if name == last or isinstance(error, FINAL):
                    raise
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                passed.append(f"{name}: {reason}")
                warn(f"{name} failed on {self.target.title} and is passed over: {reason}")
                continue
            wrong = disagreement(out, wanted()) if self.check else ""
            if wrong:
                passed.append(f"{name}: {wrong}")
                warn(f"{name} is wrong on {self.target.title} and is passed over: {wrong}")
                continue
            self._ways[bucket] = way
            return out
        raise AssertionError("the last way runs every spec")

    def kernel(self, name: str, spec: Any, load: Load) -> Way | Miss:
        """The launcher of a kernel with the tile sizes to take, or why it is not for a spec."""
        if find_spec("triton") is None:
            return Miss("triton is not installed", help="pip install 'attnopt[gpu]'")
        cls = kernels()[name]
        missed = misses(cls, spec, self.target, load)
        if missed is not None:
            return missed
        constants = chosen(cls, spec, self.target, load, self.device).constants(spec)
        launch: Way = partial(cls.launcher, **constants)  # type: ignore[assignment]
        return launch


def misses(cls: type[Kernel[Any]], spec: Any, target: Target, load: Load) -> Miss | None:
    """Why a kernel is not for a spec, or not in the dtype of a load; None where it is."""
    if load.dtype not in _DTYPES:
        return Miss(f"kernels do not compute in {load.dtype}")
    if load.batch > MOST_BATCH:
        return Miss(f"a batch of {load.batch} is more than {MOST_BATCH}")
    return cls.supports(spec, target)


def failures() -> tuple[type[Exception], ...]:
    """What a kernel raises that does not fit, does not compile or does not launch on a device: the
    passes of triton's compiler and its launches raise a plain `RuntimeError`."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    found = (RuntimeError, InductorError, TorchDynamoException)
    if find_spec("triton") is None:
        return found
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import TritonError

    return (*found, CompilationError, TritonError)


def learning(*tensors: Tensor) -> bool:
    """Whether gradients of any of these are wanted."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x.requires_grad:
                return True
    return False


def _gives_gradients(way: Way, *tensors: Tensor) -> bool:
    """Whether a way does, found out on copies, of which the caller's graph knows nothing."""
    given = [x.detach().requires_grad_(x.requires_grad) for x in tensors]
    with saved_tensors_hooks(lambda x: x, lambda x: x):  # not those of a checkpoint around it
        out = way(*given)
        if out.requires_grad:
            towards = [x for x in given if x.requires_grad]
            torch.autograd.grad(out, towards, torch.zeros_like(out), allow_unused=True)
    return out.requires_grad


def disagreement(out: Tensor, want: Tensor) -> str:
    """What is wrong with an output, in words; empty where it is near enough to what is wanted."""
    error = float((out.float() - want).norm() / want.norm().clamp_min(1e-30))
    allowed = ALLOWED.get(out.dtype, 1e-3)
    return "" if error <= allowed else f"an error of {error:.1e}, where {allowed:g} is allowed"


@lru_cache(maxsize=64)
def warn(message: str) -> None:
    """Once per message."""
    warnings.warn(message, stacklevel=5)
