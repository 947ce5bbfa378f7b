"""Second moments of activations, streamed in float64: all that the closed forms need, never the
activations themselves.

For rows x `[width]` (one per real token) with a constant 1 appended, C = sum x x^T. Whatever is
linear in x follows from it: keys x W have the Gram W^T C W, a least squares target y needs C and
sum x y^T besides. Padded positions are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx

from attnopt.compiler.contract import Notes
from attnopt.compiler.layout import same_size
from attnopt.compiler.program import Batch, Program, inputs, peek
from attnopt.compiler.site import Site

_KEEP_BYTES = (
    1 << 30
)  # Grams of one program kept for later sites and trials; above it one site at a time is made


@dataclass
class Gram:
    """Sums over tokens.

    `xx` `[p, p]`, `xy` `[p, r]` and `yy` (a sum of squares), all float64; `rows` tokens were added.
    """

    xx: Tensor
    xy: Tensor
    yy: float = 0.0
    rows: int = 0

    @staticmethod
    def empty(width: int, targets: int = 0) -> Gram:
        """Nothing added yet; `width` counts the constant column where there is one."""
        return Gram(
            torch.zeros(width, width, dtype=torch.float64),
            torch.zeros(width, targets, dtype=torch.float64),
        )

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Add rows x `[rows, p]` with targets y `[rows, r]`, in any floating dtype; they are
        multiplied where they lie."""
        wide = x.double()
        _add_product(self.xx, wide, wide)
        self.rows += len(x)
        if y is not None:
            target = y.double()
            _add_product(self.xy, wide, target)
            self.yy += float(target.square().sum())

    def error(self, weight: Tensor) -> float:
        """Sum of squares of x W - y over all rows added, for W `[p, r]` float64."""
        fitted = torch.einsum("pr,pq,qr->", weight, self.xx, weight)
        return max(0.0, self.yy - 2 * float((weight * self.xy).sum()) + float(fitted))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a^T b to a sum on the CPU."""
    if a.device == total.device:
        total.addmm_(a.T, b)
    else:
        total += (a.T @ b).cpu()


def with_one(x: Tensor) -> Tensor:
    """Rows with a constant 1 appended: `[rows, p]` to `[rows, p + 1]`."""
    return torch.cat((x, torch.ones_like(x[:, :1])), dim=1)


def real(
    program: Program, name: str, batch: Batch, axes: tuple[int, int] = (0, 1)
) -> Tensor | None:
    """Which tokens of a node are real: the batch's `valid`, or None, all of them, where the node
    runs over another sequence than the mask does (a decoder's, where the mask is the encoder's).

    `axes` are the node's batch and sequence, in either order; a matrix has them in one.
    """
    shape, mask = program.node(name).meta["val"].shape, _mask(program, batch)
    if mask is None:
        return batch.valid
    rows, length = mask.meta["val"].shape
    if len(shape) == 2:
        return batch.valid if same_size(shape[0], rows * length) else None
    orders = (axes, axes[::-1])
    same = any(same_size(shape[a], rows) and same_size(shape[b], length) for a, b in orders)
    return batch.valid if same else None


def _mask(program: Program, batch: Batch) -> fx.Node | None:
    """The input that holds the batch's `valid`, where one does."""
    if batch.valid is None:
        return None
    holders: list[fx.Node] = [node for node in program.graph.nodes if node.op == "placeholder"]
    valid = batch.valid
    for node, value in zip(holders, inputs(program, batch), strict=False):
        if isinstance(value, Tensor) and torch.equal(value.bool(), valid.to(value.device)):
            return node
    return None


def rows(value: Tensor, valid: Tensor | None) -> Tensor:
    """The real tokens of an activation as `[tokens, width]`.

    `value` is `[batch, seq, width]`, `[seq, batch, width]` or flat already; `valid` is bool
    `[batch, seq]`. Raises ValueError where the two do not fit together.
    """
    flat = value.reshape(-1, value.shape[-1])
    if valid is None:
        return flat
    if value.dim() == 3 and value.shape[:2] != valid.shape and value.shape[:2] == valid.T.shape:
        valid = valid.T
    if valid.numel() != len(flat):
        raise ValueError(f"{tuple(value.shape)} does not match a mask of {tuple(valid.shape)}")
    return flat[valid.reshape(-1).to(flat.device)]


def moments(program: Program, names: Sequence[str], batches: Sequence[Batch]) -> dict[str, Gram]:
    """The Gram of each named node's value with a constant column, over the real tokens."""
    found: dict[str, Gram] = {}
    for batch in batches:
        values = peek(program, names, batch, there=True)
        for name in names:
            x = with_one(rows(values[name].double(), real(program, name, batch)))
            found.setdefault(name, Gram.empty(x.shape[1])).add(x)
    return found


_Store = WeakKeyDictionary[fx.GraphModule, list[tuple[Sequence[Batch], dict[str, Gram]]]]
_kept: _Store = WeakKeyDictionary()  # of originals
_latest: _Store = WeakKeyDictionary()  # of one program


def input_moments(notes: Notes, names: Sequence[str], heldout: bool = False) -> dict[str, Gram]:
    """Grams of what named nodes of the original program hold, on calibration or held-out data.

    The inputs of all sites are gathered in one pass over the data and kept for as long as the
    original lives, so that a search over many options calibrates once.
    """
    batches = notes.heldout if heldout else notes.calibration
    kept = _entry(notes.original, batches, _kept)
    missing = [name for name in dict.fromkeys(names) if name not in kept]
    if not missing:
        return {name: kept[name] for name in names}
    all_names = list(dict.fromkeys([*missing, *_site_inputs(notes.original)]))
    if _bytes(notes.original, all_names) > _KEEP_BYTES:
        return moments(notes.original, list(dict.fromkeys(names)), batches)
    kept.update(moments(notes.original, [n for n in all_names if n not in kept], batches))
    return {name: kept[name] for name in names}


def source_moments(
    program: Program, site: Site, notes: Notes, heldout: bool = False
) -> dict[str, Gram] | None:
    """Grams of what a site's projections of q, k and v read, by node: of the original where the
    same site reads the same nodes there. None where there is no such data."""
    batches = notes.heldout if heldout else notes.calibration
    if not batches:
        return None
    names = _sources(site)
    teacher = next((s for s in notes.original.sites if s.id == site.id), None)
    if teacher is not None and _sources(teacher) == names:
        return input_moments(notes, names, heldout)
    return latest_moments(program, names, batches)


def latest_moments(
    program: Program, names: Sequence[str], batches: Sequence[Batch]
) -> dict[str, Gram]:
    """As `moments`, which are kept until another program's are asked for: what is tried at one site
    of a program shares them."""
    if program.module not in _latest:
        _latest.clear()
    kept = _entry(program, batches, _latest)
    missing = [name for name in dict.fromkeys(names) if name not in kept]
    made = moments(program, missing, batches) if missing else {}
    if _bytes(program, [*kept, *made]) <= _KEEP_BYTES:
        kept.update(made)
    return {name: made[name] if name in made else kept[name] for name in names}


def _sources(site: Site) -> list[str]:
    return [path.source for path in (site.q, site.k, site.v) if path is not None]


def _entry(program: Program, batches: Sequence[Batch], store: _Store) -> dict[str, Gram]:
    entries = store.setdefault(program.module, [])
    for known, grams in entries:
        if known is batches:
            return grams
    entries.append((batches, {}))
    return entries[-1][1]


def _site_inputs(program: Program) -> Iterator[str]:
    for site in program.sites:
        for path in (site.q, site.k, site.v):
            if path is not None:
                yield path.source


def _bytes(program: Program, names: Sequence[str]) -> int:
    widths = [program.node(name).meta["val"].shape[-1] + 1 for name in names]
    return sum(8 * int(width) ** 2 for width in widths)
