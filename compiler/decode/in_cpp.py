"""A decoder's phases by the operators in C++ (`attnopt.compiler.native`)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Set
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.compiler import native
from attnopt.compiler.decode.caches import Contiguous
from attnopt.compiler.decode.last import LAST, MIXES
from attnopt.compiler.decode.linear_maps import LinearMaps
from attnopt.compiler.decode.phases import GATED, Cache, Kind
from attnopt.compiler.errors import Notice
from attnopt.compiler.native import layouts
from attnopt.compiler.spec import CAUSAL, AttentionSpec


class InCpp:
    """What the phases of a decoder with these caches, of a module on a CPU, are made of; it shares
    what it keeps of the weights with another decoder's, where one is given."""

    def __init__(self, caches: Mapping[str, Cache], other: InCpp | None = None) -> None:
        self.caches, operators = caches, torch.ops.attnopt
        self._few: LinearMaps
        self._many: LinearMaps
        if other is not None:
            self._few, self._many = other._few, other._many
        else:
            self._few = LinearMaps(operators.few_rows.default, layouts.panels)
            self._many = LinearMaps(operators.many_rows.default, layouts.tiles)

    @property
    def outdated(self) -> bool:
        """Whether a weight was written to since it was read, as far as torch counts that."""
        return self._few.outdated or self._many.outdated

    def single(self, form: fx.GraphModule) -> fx.GraphModule:
        """The step of one token, to be compiled; the form is changed."""
        return self._few.through(form)

    def many(self, form: fx.GraphModule, kind: Kind) -> fx.GraphModule:
        """A phase of many tokens, run as it is; the form is changed."""
        for node in form.graph.nodes:
            cache = self.caches.get(node.meta.get(MIXES, ""))
            if cache is not None and not node.meta.get(GATED) and _plain(cache.spec):
                if kind == "prefill":
                    node.target = _among(node.target, cache.spec)
                elif isinstance(cache, Contiguous):
                    node.target = _to_cache(node.target, cache.spec)
        form.recompile()
        self._few.through(form, _reads_last)
        return self._many.through(form) if torch.ops.attnopt.matrix_units() else form


def in_cpp(
    caches: Mapping[str, Cache], dtypes: Set[torch.dtype], device: torch.device,
    other: InCpp | None,
) -> InCpp | None:  # fmt: skip
    """The phases of a decoder whose caches are of these dtypes, of operators that are built here,
    once per machine; None where they are not for it or, of which a warning (A507) tells, cannot be
    built."""
    if device.type != "cpu" or native.DTYPES.isdisjoint(dtypes):
        return None
    if why := native.ready():
        notice = Notice("A507", "the decoder runs torch's own operators",
                        why=why, help="those in C++ need a C++ compiler")  # fmt: skip
        warnings.warn(str(notice), RuntimeWarning, stacklevel=4)
        return None
    return InCpp(caches, other)


def autocast() -> bool:
    """Whether torch's own operators run, which know of it."""
    return torch.is_autocast_enabled("cpu")


def _reads_last(node: fx.Node) -> bool:
    """Whether a linear map reads the last position alone."""
    source = node.args[0]
    return isinstance(source, fx.Node) and source.meta.get(LAST, False)


def _plain(spec: AttentionSpec) -> bool:
    """Whether the operator `prompt` computes it, of float32."""
    return spec.mask == CAUSAL and not spec.extras and not spec.softcap


def _among(attention: Callable[..., Tensor], spec: AttentionSpec) -> Callable[..., Tensor]:
    """As `phases.prefilled`, of a prompt's q, k, v and more."""

    def attention_in_cpp(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        if {x.dtype for x in (q, k, v)} != {torch.float32} or q.shape[2] != k.shape[2]:
            return attention(q, k, v, *rest)
        made: Tensor = torch.ops.attnopt.prompt(q, k, v, spec.scale)
        return made

    return attention_in_cpp


def _to_cache(attention: Callable[..., Tensor], spec: AttentionSpec) -> Callable[..., Tensor]:
    """As `phases.attending`, of new tokens' q, a cache's keys and values, and where they start."""

    def attention_in_cpp(q: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
        if {x.dtype for x in (q, keys, values)} != {torch.float32}:
            return attention(q, keys, values, start)
        k, v = (x[:, :, : start + q.shape[2]] for x in (keys, values))
        made: Tensor = torch.ops.attnopt.prompt(q, k, v, spec.scale)
        return made

    return attention_in_cpp
