"""The weights of the new model: by name where they keep their shape, head by head where not."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from attnopt.compiler.checkpoint.changes import Changes, Pair, refusal
from attnopt.compiler.checkpoint.names import Names, read_names
from attnopt.compiler.checkpoint.settings import Settings
from attnopt.compiler.errors import Problem
from attnopt.compiler.program import Program
from attnopt.compiler.site import OutputPath, Path, Site, WeightLayout
from attnopt.compiler.site_weights import read_output, read_weight

_WHICH: tuple[Literal["q", "k", "v"], ...] = ("q", "k", "v")


def check_accounted(made: Changes, names: Names, read: Collection[str] = ()) -> None:
    """Raise `Problem` A521 for a weight that the plan made or changed, and that is neither one of
    the checkpoint, nor in an attention's projections, nor `read` for the checkpoint otherwise, nor
    an original in another dtype."""
    old = {name: made.original.weight(name) for name in read_names(made.original)}
    known = {name for pair in made.pairs for name in (*_inputs(pair.after), *_outputs(pair.after))}
    for name in sorted(read_names(made.program) - known - set(read)):
        value = made.program.weight(name)
        if names.whole(name) or value is old.get(name) or not value.is_floating_point():
            continue
        if not any(_copies(value, item) for item in old.values()):
            raise refusal(
                f"the plan made the weight {name}", where=name,
                why="no weight of the family has its place",
            )  # fmt: skip


def _copies(value: Tensor, other: Tensor) -> bool:
    return value.shape == other.shape and torch.equal(value.to(other.dtype), other)


def by_name(weights: Mapping[str, Tensor], made: Changes, names: Names) -> dict[str, Tensor]:
    """The original's weights by name, with what the plan wrote under the same names, in the
    original's dtype. The last projection of each sublayer that is gone is zero."""
    found = dict(weights)
    for name in read_names(made.program):
        if names.whole(name):
            plain = names(name)
            found[plain] = made.program.weight(name).detach().to(found[plain].dtype)
    for item in made.removed:
        for last in (item.last.weight, item.last.bias) if item.last else ():
            if last is not None and names(last) in found:
                found[names(last)] = torch.zeros_like(found[names(last)])
    return found


def to_move(made: Changes, names: Names) -> dict[str, set[str]]:
    """By attention, the weights of the checkpoint that have to be filled head by head: those of
    projections that the program has under names of its own."""
    found = dict[str, set[str]]()
    for pair in made.pairs:
        filled = set[str]()
        for before, after in (
            (_inputs(pair.before), _inputs(pair.after)),
            (_outputs(pair.before), _outputs(pair.after)),
        ):
            if not all(_in_place(made, names, name) for name in after):
                filled |= {names(name) for name in before}
        if filled:
            found[pair.before.id] = filled
    return found


def _in_place(made: Changes, names: Names, name: str) -> bool:
    if names.whole(name):
        return True
    known = name in names.owners
    return known and made.program.weight(name) is made.original.weight(name)


def _inputs(site: Site) -> list[str]:
    paths = [path for path in (site.q, site.k, site.v) if path is not None]
    return [name for path in paths for name in (path.weight, path.bias) if name is not None]


def _outputs(site: Site) -> list[str]:
    names = () if site.out is None else (site.out.weight, site.out.bias)
    return [name for name in names if name is not None]


def assembled(
    model: Any, named: Mapping[str, Tensor], empty: set[str], made: Settings, gone: frozenset[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All weights of the new model by name, and those among them that are still to be filled, NaN.

    These are the ones in `empty`; of a sublayer that is `gone` a weight of another shape is zero.
    Raises `Problem` A521 for any other weight that has not the shape of the new model's.
    """
    found, fresh = dict[str, Tensor](), dict[str, Tensor]()
    for name, like in model.state_dict().items():
        old = made.place(name)
        if old not in named:
            raise refusal(f"the new model has a weight {name} that the old one has not", where=name)
        dtype = named[old].dtype
        if old in empty:
            found[name] = fresh[name] = torch.full(like.shape, torch.nan, dtype=dtype)
        elif named[old].shape == like.shape:
            found[name] = named[old]
        elif old in gone:
            found[name] = torch.zeros(like.shape, dtype=dtype)
        else:
            raise refusal(
                f"{name} does not fit a model of the family", where=name,
                why=f"it is {tuple(named[old].shape)}, the new model has {tuple(like.shape)}",
            )  # fmt: skip
    return found, fresh


class Mover:
    """Writes the projections of the optimized program's attentions into the weights of the new
    model, through its program `to`; only into the `fresh` ones, which are its own."""

    def __init__(self, program: Program, to: Program, fresh: Mapping[str, Tensor]) -> None:
        self.program, self.to, self.fresh = program, to, fresh

    def move(self, pair: Pair, new: Site) -> None:
        """Write one attention's projections where the new model has them.

        Raises `Problem` A521 where sizes, biases or places do not fit.
        """
        scale = self._scale(pair, new)
        for which in _WHICH:
            source, spot = getattr(pair.after, which), getattr(new, which)
            if source is None or spot is None:
                missing = (pair.after if source is None else new).missing.get(which, "not found")
                raise _at(pair, f"the projection of {which} is not known: {missing}")
            self._project(pair, which, source, spot, scale if which == "q" else 1.0)
        if pair.after.out is not None and new.out is not None:
            self._output(pair, pair.after.out, new.out)

    def finish(self) -> None:
        """Raise `Problem` A521 for a weight that was filled in part."""
        for name, value in self.fresh.items():
            if value.isnan().any():
                raise refusal(
                    f"a part of {name} belongs to no head", where=name,
                    why="only what belongs to heads can be moved to another size",
                )  # fmt: skip

    def _scale(self, pair: Pair, new: Site) -> float:
        """By what the queries are multiplied, since a config gives heads of fewer dims another
        scale of the softmax."""
        mine, other = self.program.spec(pair.after), self.to.spec(new)
        wanted, got = pair.after.gain * mine.scale, new.gain * other.scale
        if math.isclose(wanted, got, rel_tol=1e-6):
            return 1.0
        if new.qk_norm:
            raise _at(pair, f"its logits are scaled by {wanted:.4g}, the new model's by {got:.4g}")
        return wanted / got

    def _project(self, pair: Pair, which: str, source: Path, spot: Path, scale: float) -> None:
        weight, bias = read_weight(self.program, source)
        heads = len(spot.channels)
        weight = filled(weight * scale, heads)
        bias = None if bias is None else filled(bias * scale, heads)
        if weight.shape[:2] != spot.channels.shape:
            was, now = tuple(weight.shape[:2]), tuple(spot.channels.shape)
            raise _at(pair, f"{which} has {was} heads and dims, the new model has {now}")
        self._write(pair, spot.weight, spot.channels, weight, spot.layout)
        if spot.bias is not None:
            value = torch.zeros_like(weight[..., 0]) if bias is None else bias
            self._write(pair, spot.bias, spot.channels, value, "out_in")
        elif bias is not None and bias.any():
            raise _at(pair, f"{which} has a bias, which the family has not")

    def _output(self, pair: Pair, source: OutputPath, spot: OutputPath) -> None:
        rows: WeightLayout = "in_out" if spot.layout == "out_in" else "out_in"  # heads are inputs
        whole = self.program.weight(source.weight).detach()
        whole = whole if source.layout == "in_out" else whole.T
        like = self.to.weight(spot.weight)
        if len(whole) == like.shape[1 if rows == "in_out" else 0]:
            self._write(pair, spot.weight, torch.arange(len(whole)), whole, rows)
        elif (value := filled(read_output(self.program, source), len(spot.channels))).shape[
            :2
        ] == spot.channels.shape:
            self._write(pair, spot.weight, spot.channels, value, rows)
        else:
            was, now = tuple(source.channels.shape), tuple(spot.channels.shape)
            raise _at(pair, f"the output has {was} heads and dims, the new model has {now}")
        bias = None if source.bias is None else self.program.weight(source.bias).detach()
        if spot.bias is not None:
            every = torch.arange(self.to.weight(spot.bias).numel())
            value = torch.zeros(len(every)) if bias is None else bias
            self._write(pair, spot.bias, every, value, "out_in")
        elif bias is not None and bias.any():
            raise _at(pair, "the output projection has a bias, which the family has not")

    def _write(
        self, pair: Pair, name: str, channels: Tensor, value: Tensor, layout: WeightLayout
    ) -> None:
        """Write rows (columns, for "in_out") of a weight of the new model, where it is fresh; what
        is not holds the value already, or is refused."""
        held = self.to.weight(name).detach()
        rows = held.T if layout == "in_out" else held
        if value.shape[channels.dim() :] != rows.shape[1:]:
            raise _at(pair, f"{name} is {tuple(held.shape)} in the new model")
        value, now = value.to(held.dtype), rows[channels]
        if torch.equal(now, value):
            return
        if not now.isnan().all() or not self._is_fresh(held):
            raise _at(pair, f"{name} is shared with another attention, which reads other values")
        rows[channels] = value

    def _is_fresh(self, held: Tensor) -> bool:
        at = held.data_ptr()
        return any(0 <= at - value.data_ptr() < value.nbytes for value in self.fresh.values())


def filled(heads: Tensor, count: int) -> Tensor:
    """`[heads, ...]` with heads of zeros after them, `[count, ...]` where there are fewer."""
    more = max(0, count - len(heads))
    return torch.cat((heads, heads.new_zeros(more, *heads.shape[1:])))


def _at(pair: Pair, why: str) -> Problem:
    return refusal(
        f"{pair.before.id} does not fit a model of the family", where=pair.before.module, why=why
    )
