"""Which kernel computes a spec on a target: every kernel there is is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from attnopt.codegen.kernel import Kernel, Load, kernels
from attnopt.codegen.roofline import estimated
from attnopt.codegen.shipped import chosen
from attnopt.codegen.target import Target
from attnopt.compiler.contract import Miss


@dataclass(frozen=True)
class Picked:
    """A kernel at the tile sizes that are taken without tuning, for a spec, a target and a load.

    `seconds` is its estimated time, `others` are the kernels that compute the spec too.
    """

    kernel: Kernel[Any]
    spec: Any
    target: Target
    load: Load
    seconds: float
    others: tuple[str, ...] = ()


def pick(
    spec: Any, target: Target, load: Load, among: Sequence[str] = (), precision: str = "ieee"
) -> Picked | Miss:
    """The kernel with the least estimated time of those that compute the spec, by name where they
    tie; else why none of those that take specs of its kind does. `among` names the kernels to ask,
    all where it is empty. With a `precision` other than "ieee" (`precision_argument`) those are
    asked that have it.

    Raises `Problem` A405 where the target has no peak for the dtype of the load.
    """
    asked = {
        name: kernel
        for name, kernel in kernels().items()
        if _takes(kernel, spec)
        and (not among or name in among)
        and (precision == "ieee" or hasattr(kernel, "precision"))
    }
    products = load.dtype if precision == "ieee" else precision
    misses = {name: kernel.supports(spec, target) for name, kernel in asked.items()}
    fit = {
        name: estimated(kernel.work(spec, load), products, target)
        for name, kernel in asked.items()
        if misses[name] is None
    }
    if fit:
        best = min(fit, key=lambda name: (fit[name], name))
        others = tuple(name for name in fit if name != best)
        tiles = chosen(asked[best], spec, target, load)
        if precision != "ieee":
            asked_for: dict[str, Any] = {"precision": precision}
            tiles = replace(tiles, **asked_for)
        return Picked(tiles, spec, target, load, fit[best], others)
    reasons = [f"{name}: {miss.reason}" for name, miss in misses.items() if miss is not None]
    kind = type(spec).__name__
    return Miss("; ".join(reasons) or f"no kernel computes a {kind}")


def _takes(kernel: type[Kernel[Any]], spec: Any) -> bool:
    """Whether the kernel's specs are of this kind, by its examples."""
    return any(type(example) is type(spec) for example, _ in kernel.examples())
