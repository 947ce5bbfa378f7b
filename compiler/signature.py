"""`Signature`: which inputs an exported program takes, in words, and how a call is fitted to
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from attnopt.compiler.errors import Problem

_UNBOUNDED = 2**31
_OPTIONAL = "attention_mask"  # all ones where it is left out
_NO_EFFECT = "token_type_ids"  # all zeros is what leaving it out means to every model that has it


@dataclass(frozen=True)
class Size:
    """One dimension: `name` is the symbol it shares with others ("" when fixed), from `low` to
    `high`.
    """

    name: str
    low: int
    high: int

    def __str__(self) -> str:
        if not self.name:
            return str(self.low)
        if self.high >= _UNBOUNDED:
            return self.name
        return f"{self.name}<={self.high}"


@dataclass(frozen=True)
class Input:
    """One input tensor: its name, dtype and sizes. `dtype` is None for an input that is no
    tensor.
    """

    name: str
    dtype: torch.dtype | None
    shape: tuple[Size, ...] = ()

    def __str__(self) -> str:
        if self.dtype is None:
            return self.name
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.name} {kind} [{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Signature:
    """The inputs of a program: `positional` are passed in order, `named` by name; nested ones
    flat.
    """

    positional: tuple[str, ...]
    named: tuple[str, ...]
    leaves: tuple[Input, ...]

    def __str__(self) -> str:
        return ", ".join(map(str, self.leaves)) or "no inputs"

    def as_json(self) -> list[str]:
        """The inputs in words, one per tensor."""
        return [str(leaf) for leaf in self.leaves]

    @staticmethod
    def of(exported: torch.export.ExportedProgram) -> Signature:
        """The signature of an exported program, with the sizes that its dimensions may take."""
        users = [s for s in exported.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
        names = [str(getattr(spec.arg, "name", "")) for spec in users]
        values = {n.name: n.meta.get("val") for n in exported.graph.nodes if n.op == "placeholder"}
        ranges = {str(symbol): bounds for symbol, bounds in exported.range_constraints.items()}
        letters: dict[str, str] = {}
        leaves = tuple(_input(name, values.get(name), ranges, letters) for name in names)
        spec = exported.call_spec.in_spec
        assert spec is not None
        args, kwargs = spec.children()
        positional = _argument_names(exported, len(args.children()), leaves)
        return Signature(positional, tuple(kwargs.context or ()), leaves)

    def fit(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A call's arguments as the program takes them, checked. Raises `Problem` A506.

        Inputs may be given by name or in order. A missing attention mask is filled with ones, and
        whole numbers are converted to the whole-number type that the program was traced with.
        """
        names = (*self.positional, *self.named)
        if len(args) > len(names):
            raise self._problem(f"{len(args)} inputs were given in order")
        given = dict(zip(names, args, strict=False))
        for name, value in kwargs.items():
            if value is None or _without_effect(name, value, names):
                continue
            if name not in names or name in given:
                raise self._problem(
                    f"`{name}` " + ("is given twice" if name in given else "is unknown")
                )
            given[name] = value
        self._fill(given)
        missing = [name for name in names if name not in given]
        if missing:
            raise self._problem(f"`{missing[0]}` is missing")
        made = tuple(given[name] for name in self.positional)
        named = {name: given[name] for name in self.named}
        return self._checked(made, named)

    def _fill(self, given: dict[str, Any]) -> None:
        if _OPTIONAL in given or _OPTIONAL not in (*self.positional, *self.named):
            return
        mask = next((leaf for leaf in self.leaves if leaf.name == _OPTIONAL), None)
        like = next((leaf for leaf in self.leaves if leaf.name in given and mask
                     and leaf.shape[:2] == mask.shape), None)  # fmt: skip
        if mask is None or like is None or not isinstance(given[like.name], Tensor):
            return
        tokens = given[like.name]
        given[_OPTIONAL] = torch.ones(tokens.shape[:2], dtype=mask.dtype, device=tokens.device)

    def _checked(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        sizes: dict[str, int] = {}
        values = [*args, *kwargs.values()]
        if len(values) == len(self.leaves):  # none is nested, so one that is can be named
            pairs = zip(values, self.leaves, strict=True)
            made = [self._leaf(value, leaf, sizes) for value, leaf in pairs]
            return tuple(made[: len(args)]), dict(zip(kwargs, made[len(args) :], strict=True))
        flat, spec = pytree.tree_flatten((args, kwargs))
        if len(flat) != len(self.leaves):
            raise self._problem(f"{len(flat)} tensors were given, not {len(self.leaves)}")
        nested = [self._leaf(*pair, sizes) for pair in zip(flat, self.leaves, strict=True)]
        fitted: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(nested, spec)
        return fitted

    def _leaf(self, value: Any, leaf: Input, sizes: dict[str, int]) -> Any:
        if leaf.dtype is None:
            return value
        if not isinstance(value, Tensor):
            raise self._problem(f"`{leaf.name}` is {type(value).__name__}, not a tensor")
        if value.dtype != leaf.dtype:
            if value.dtype.is_floating_point or leaf.dtype.is_floating_point:
                raise self._problem(f"`{leaf.name}` is {_kind(value)}")
            value = value.to(leaf.dtype)
        if value.dim() != len(leaf.shape):
            raise self._problem(f"`{leaf.name}` has shape {list(value.shape)}")
        for actual, size in zip(value.shape, leaf.shape, strict=True):
            agreed = sizes.setdefault(size.name, actual) if size.name else actual
            if actual != agreed or not size.low <= actual <= size.high:
                raise self._problem(f"`{leaf.name}` has shape {list(value.shape)}")
        return value

    def _problem(self, why: str) -> Problem:
        return Problem(
            "A506",
            "the optimized model does not take these inputs",
            why=why,
            help=f"it takes {self}",
        )


def _input(name: str, value: Any, ranges: Mapping[str, Any], letters: dict[str, str]) -> Input:
    if not isinstance(value, Tensor):
        return Input(name, None)
    return Input(
        name,
        value.dtype,
        tuple(_size(size, at, ranges, letters) for at, size in enumerate(value.shape)),
    )


def _size(size: Any, at: int, ranges: Mapping[str, Any], letters: dict[str, str]) -> Size:
    if isinstance(size, int):
        return Size("", size, size)
    symbol = str(size)
    bounds = ranges.get(symbol)
    if bounds is None:  # an expression of other symbols: the program's own guards judge it
        return Size(f"{symbol}@{len(letters)}", 0, _UNBOUNDED)
    if symbol not in letters:
        wanted = ("batch", "length")[at] if at < 2 else "size"
        taken = sum(name.rstrip("0123456789") == wanted for name in letters.values())
        letters[symbol] = wanted + (str(taken + 1) if taken else "")
    low = _bound(bounds.lower, 0)
    # torch writes 2 for whatever it did not specialise to 0 or 1: the program's guards judge a 1.
    return Size(letters[symbol], 1 if low == 2 else low, _bound(bounds.upper, _UNBOUNDED))


def _bound(value: Any, otherwise: int) -> int:
    """An end of a range of sizes; torch's infinity is no whole number."""
    return int(value) if getattr(value, "is_Integer", isinstance(value, int)) else otherwise


def _argument_names(
    exported: torch.export.ExportedProgram, count: int, leaves: Sequence[Input]
) -> tuple[str, ...]:
    entry = exported.module_call_graph[0].signature
    names = getattr(entry, "forward_arg_names", None) or [leaf.name for leaf in leaves]
    listed = [*names[:count], *(f"input{i}" for i in range(len(names), count))]
    return tuple(map(str, listed))


def _without_effect(name: str, value: Any, names: Sequence[str]) -> bool:
    return (
        name == _NO_EFFECT and name not in names and isinstance(value, Tensor) and not value.any()
    )


def _kind(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
