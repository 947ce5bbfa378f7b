"""The weights of the new model: by name where they keep their shape, head by head where not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from attnopt.compiler.checkpoint.changes import Changes, Pair, read_names, refusal
from attnopt.compiler.checkpoint.settings import Settings
from attnopt.compiler.program import Program
from attnopt.compiler.site import OutputPath, Path, Site, WeightLayout
from attnopt.compiler.site_weights import read_output, read_weight

_WHICH: tuple[Literal["q", "k", "v"], ...] = ("q", "k", "v")


def moves(made: Changes) -> bool:
    """Whether some weight has to be moved head by head, since no name or shape tells its place."""
    names = read_names(made.original)
    return any(
        path is not None and (path.weight not in names or (path.bias or path.weight) not in names)
        for pair in made.pairs
        for path in (pair.after.q, pair.after.k, pair.after.v, pair.after.out)
    )


def check_accounted(made: Changes) -> None:
    """Raise `Problem` A521 for a new weight of the program that is in no attention's projections,
    nor an original one in another dtype."""
    old = {name: made.original.weight(name) for name in read_names(made.original)}
    known = {
        name
        for site in made.program.sites
        for path in (site.q, site.k, site.v, site.out) if path is not None
        for name in (path.weight, path.bias)
    }  # fmt: skip
    for name in sorted(read_names(made.program) - old.keys() - known):
        value = made.program.weight(name)
        if not value.is_floating_point() or any(_copies(value, item) for item in old.values()):
            continue
        raise refusal(
            f"the plan added the weight {name}", where=name,
            why="no weight of the family has its place",
        )  # fmt: skip


def _copies(value: Tensor, other: Tensor) -> bool:
    return value.shape == other.shape and torch.equal(value.to(other.dtype), other)


def by_name(weights: Mapping[str, Tensor], made: Changes, prefix: str) -> dict[str, Tensor]:
    """The original's weights by name, with what the plan wrote under the same names, in the
    original's dtype. `last` of each sublayer that is gone is zero."""
    found = dict(weights)
    for name in read_names(made.program):
        plain = name.removeprefix(prefix)
        if plain in found:
            found[plain] = made.program.weight(name).detach().to(found[plain].dtype)
    for item in made.removed:
        for name in (item.last.weight, item.last.bias) if item.last else ():
            plain = (name or "").removeprefix(prefix)
            if plain in found:
                found[plain] = torch.zeros_like(found[plain])
    return found


@dataclass
class Mover:
    """Fills `weights` of the new model, given by name with shape and dtype, from the attentions of
    the optimized program. `fresh` holds what is being filled, `open` which rows are still empty."""

    program: Program
    shapes: Mapping[str, Tensor]
    prefix: str
    fresh: dict[str, Tensor] = field(default_factory=dict)
    open: dict[str, Tensor] = field(default_factory=dict)

    def move(self, pair: Pair, new: Site) -> None:
        """Move one attention's projections to where the new model has them.

        Raises `Problem` A521 where sizes, biases or places do not fit.
        """
        for which in _WHICH:
            source, spot = getattr(pair.after, which), getattr(new, which)
            if source is None or spot is None:
                missing = (pair.after if source is None else new).missing.get(which, "not found")
                raise _at(pair, f"the projection of {which} is not known: {missing}")
            self._project(pair, which, source, spot)
        if pair.after.out is not None and new.out is not None:
            self._output(pair, pair.after.out, new.out)

    def finish(self) -> dict[str, Tensor]:
        """What was filled. Raises `Problem` A521 for a weight that was filled in part."""
        for name, rows in self.open.items():
            if rows.any():
                raise refusal(
                    f"{int(rows.sum())} channels of {name} belong to no head", where=name,
                    why="only what belongs to heads can be moved",
                )  # fmt: skip
        return self.fresh

    def _project(self, pair: Pair, which: str, source: Path, spot: Path) -> None:
        weight, bias = read_weight(self.program, source)
        if weight.shape[:2] != spot.channels.shape:
            was, now = tuple(weight.shape[:2]), tuple(spot.channels.shape)
            raise _at(pair, f"{which} has {was} heads and dims, the new model has {now}")
        self._fill(pair, spot.weight, spot.channels, weight, spot.layout)
        if spot.bias is not None:
            value = torch.zeros_like(weight[..., 0]) if bias is None else bias
            self._fill(pair, spot.bias, spot.channels, value, "out_in")
        elif bias is not None and bias.any():
            raise _at(pair, f"{which} has a bias, which the family has not")

    def _output(self, pair: Pair, source: OutputPath, spot: OutputPath) -> None:
        rows: WeightLayout = "in_out" if spot.layout == "out_in" else "out_in"  # heads are inputs
        whole = self.program.weight(source.weight).detach()
        whole = whole if source.layout == "in_out" else whole.T
        if len(whole) == _rows(self._shape(spot.weight), rows):
            every = torch.arange(len(whole))
            self._fill(pair, spot.weight, every, whole, rows)
        elif source.channels.shape == spot.channels.shape:
            value = read_output(self.program, source)
            self._fill(pair, spot.weight, spot.channels, value, rows)
        else:
            was, now = tuple(source.channels.shape), tuple(spot.channels.shape)
            raise _at(pair, f"the output has {was} heads and dims, the new model has {now}")
        bias = None if source.bias is None else self.program.weight(source.bias).detach()
        if spot.bias is not None:
            size = self._shape(spot.bias).numel()
            value = torch.zeros(size) if bias is None else bias
            self._fill(pair, spot.bias, torch.arange(size), value, "out_in")
        elif bias is not None and bias.any():
            raise _at(pair, "the output projection has a bias, which the family has not")

    def _fill(
        self, pair: Pair, name: str, channels: Tensor, value: Tensor, layout: WeightLayout
    ) -> None:
        """Write rows (columns, for "in_out") of a weight of the new model."""
        plain, like = name.removeprefix(self.prefix), self._shape(name)
        made = self.fresh.setdefault(plain, torch.zeros(like.shape, dtype=like.dtype))
        rows = made.T if layout == "in_out" else made
        left = self.open.setdefault(plain, torch.ones(len(rows), dtype=torch.bool))
        if value.shape[channels.dim() :] != rows.shape[1:]:
            raise _at(pair, f"{plain} is {tuple(like.shape)} in the new model")
        rows[channels] = value.to(like.dtype)
        left[channels.reshape(-1)] = False

    def _shape(self, name: str) -> Tensor:
        return self.shapes[name.removeprefix(self.prefix)]


def _rows(weight: Tensor, layout: WeightLayout) -> int:
    return weight.shape[1 if layout == "in_out" else 0]


def _at(pair: Pair, why: str) -> Exception:
    return refusal(
        f"{pair.before.id} does not fit a model of the family", where=pair.before.module, why=why
    )


def assembled(
    shapes: Mapping[str, Tensor],
    named: Mapping[str, Tensor],
    moved: Mapping[str, Tensor],
    made: Settings,
    gone: frozenset[str],
) -> dict[str, Tensor]:
    """All weights of the new model by name: what was moved, else what has the name and the shape.

    Of sublayers that are `gone` a weight of another shape is zero. Raises `Problem` A521 for a
    weight that has none of the three.
    """
    found = {}
    for name, like in shapes.items():
        old = made.place(name)
        if name in moved:
            found[name] = moved[name]
        elif old in named and named[old].shape == like.shape:
            found[name] = named[old]
        elif old in gone:
            found[name] = torch.zeros(like.shape, dtype=named[old].dtype)
        else:
            shape = tuple(named[old].shape) if old in named else "missing"
            raise refusal(
                f"{name} does not fit a model of the family", where=name,
                why=f"it is {shape}, the new model has {tuple(like.shape)}",
            )  # fmt: skip
    return found
