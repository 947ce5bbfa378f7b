"""The host's path of dispatch on a device: what it takes beyond the launches of its kernels, and
that its calls can be captured in a CUDA graph.

The overhead is the host's time of a dispatched call less that of launching the same kernels with
the same arguments: the choice, the launcher's Python, and memory for results and parts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import KernelInterface

from attnopt.codegen.dispatch import Dispatch
from attnopt.codegen.step_ways import StepDispatch
from attnopt.codegen.target import Target
from attnopt.compiler.spec import CAUSAL, AttentionSpec

BAR = 20e-6
"""Seconds that a call may take on the host beyond its launches."""
_CALLS = 20  # queued without waiting: the device's queue holds many more
_TOKENS, _KEYS = 128, 2000  # of a prompt, and those that a step reads
_SPEC = AttentionSpec(32, 8, 128, 128, 128**-0.5, CAUSAL)
Call = Callable[[], Any]


def host_path(target: Target, device: str = "cuda", rounds: int = 50) -> dict[str, Any]:
    """Both for a prompt and a step, told line by line; `wrong` is true where a graph is wrong, or
    the overhead more than `BAR`."""
    document: dict[str, Any] = {"bar_seconds": BAR, "wrong": False}
    for name, (run, given) in calls(target, device).items():
        try:
            taken = overhead(partial(run, *given), device, rounds)
            error = graph_error(run, given)
        except Exception as failed:  # noqa: BLE001 (it is told, and what follows is still measured)
            said = (str(failed) or "no message").splitlines()[0]
            document[name] = {"failed": f"{type(failed).__name__}: {said}"}
            print(f"WRONG host path of {name}: {document[name]['failed']}", flush=True)
            document["wrong"] = True
            continue
        document[name] = {**taken, "graph_error": error}
        late, wrong = taken["overhead_seconds"] > BAR, error != 0.0
        print(
            f"host path of {name}: {taken['overhead_seconds'] * 1e6:.1f} µs beyond its "
            f"{taken['launches']:.0f} launches{', MISSED' if late else ''}; captured in a graph it "
            f"{f'differs by {error:.1e}, WRONG' if wrong else 'gives the same bits'}",
            flush=True,
        )
        document["wrong"] |= late or wrong
    return document


def calls(target: Target, device: str) -> dict[str, tuple[Call, tuple[Any, ...]]]:
    """Small dispatched calls, whose kernels are ours, and their inputs."""

    def made(heads: int, tokens: int) -> Tensor:
        return torch.randn(1, heads, tokens, _SPEC.head_dim, dtype=torch.bfloat16, device=device)

    capped = Dispatch(_SPEC.with_(softcap=30.0), target)
    step, groups = StepDispatch(_SPEC, target), _SPEC.kv_heads
    prompt = made(_SPEC.heads, _TOKENS), made(groups, _TOKENS), made(groups, _TOKENS)
    cache = made(groups, _KEYS), made(groups, _KEYS)
    return {
        "a prompt": (capped, prompt),
        "a step": (step, (made(_SPEC.heads, 1), *cache, _KEYS)),
    }


def overhead(call: Call, device: str, rounds: int) -> dict[str, float]:
    """Medians of the host's seconds of a call, of its launches alone and of their difference, taken
    in turns."""
    wait = torch.cuda.synchronize if device == "cuda" else _nothing
    call()  # chooses, and compiles
    with _noted() as launches:
        call()

    def bare() -> None:
        for launch in launches:
            launch()

    samples = []
    for _ in range(rounds + 2):
        whole, alone = (_host_seconds(run, wait) for run in (call, bare))
        samples.append((whole, alone, whole - alone))
    whole, alone, beyond = (median(found) for found in zip(*samples[2:], strict=True))
    return {
        "seconds": whole, "launch_seconds": alone, "overhead_seconds": beyond,
        "launches": float(len(launches)),
    }  # fmt: skip


def graph_error(run: Callable[..., Tensor], given: tuple[Any, ...]) -> float:
    """Capture a call that ran before, replay it on other inputs in the same memory, and compare
    with the call itself: the largest difference, infinite where there is a NaN."""
    held = [x.clone() if isinstance(x, Tensor) else x for x in given]
    out, replay = captured(partial(run, *held))
    worst = 0.0
    for _ in range(3):
        for x in held:
            if isinstance(x, Tensor):
                x.copy_(torch.randn_like(x))
        replay()
        error = float((out.float() - run(*held).float()).abs().max())
        worst = max(worst, error if error == error else float("inf"))
    return worst


def captured(call: Callable[[], Tensor]) -> tuple[Tensor, Call]:
    """What a call returns when it is captured, and what replays it into that."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # memory of its own is asked for before the capture
        call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return out, graph.replay


@contextmanager
def _noted() -> Iterator[list[Call]]:
    """The launches of kernels within, each to be made again."""
    found: list[Call] = []
    plain = KernelInterface.__getitem__

    def note(self: Any, grid: Any) -> Callable[..., Any]:
        launch = plain(self, grid)

        def run(*args: Any, **options: Any) -> Any:
            found.append(lambda: self[grid](*args, **options))
            return launch(*args, **options)

        return run

    KernelInterface.__getitem__ = note  # type: ignore[method-assign]
    try:
        yield found
    finally:
        KernelInterface.__getitem__ = plain  # type: ignore[method-assign]


def _host_seconds(call: Call, wait: Call) -> float:
    wait()
    begun = time.perf_counter()
    for _ in range(_CALLS):
        call()
    taken = time.perf_counter() - begun
    wait()
    return taken / _CALLS


def _nothing() -> None:
    """The CPU is waited for anyway."""
