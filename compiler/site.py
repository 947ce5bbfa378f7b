"""What is known of one attention (`Site`) and of one residual sublayer (`Sublayer`), as values that
name graph nodes.

Nodes are named, not held, so a site stays valid in every copy of its program whose rewrites keep
the named nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from attnopt.compiler.spec import AttentionSpec

WeightLayout = Literal[
    "out_in", "in_out"
]  # nn.Linear keeps [out, in]; GPT-2's Conv1D keeps [in, out]
Certainty = Literal["proved", "guarded", "observed"]


@dataclass(frozen=True)
class Path:
    """How q, k or v comes out of a projection.

    `projection` is the node of the matrix product, `source` its input node `[batch, seq, width]`,
    `weight` and `bias` the names of its parameters in the program's module. `channels` int64
    `[heads, head_dim]`: the projection's output channel that feeds (head, dim), taken before any
    rotation or norm. `split` is the earliest node downstream of the projection that is an index map
    of it, times one number at most, with one axis per head, in `order` "bthd" or "bhtd"; where no
    node holds each key/value head once, one that holds them as often as query heads read them.
    Everything between `split` and the attention's operand acts on each head alike.
    """

    projection: str
    source: str
    weight: str
    bias: str | None
    layout: WeightLayout
    channels: Tensor
    split: str
    order: Literal["bthd", "bhtd"]


@dataclass(frozen=True)
class OutputPath:
    """The output projection: `channels` int64 `[heads, v_dim]` is its input column that (head, dim)
    feeds, `[0, 0]` where a factor before it mixes them."""

    projection: str
    weight: str
    bias: str | None
    layout: WeightLayout
    channels: Tensor


@dataclass(frozen=True)
class Rotary:
    """Rotary position encoding as probed: at position p the pair (a, b) of a head turns by p *
    frequency radians.

    `pairs` int64 `[pairs, 2]` are dims of one head, `frequencies` float64 `[pairs]` in radians per
    position (with two `axes`, rows and columns of an image, the angles at the first position that
    turns), `gain` the factor on the rotated dims (1.0 unless a scaling such as YaRN's is folded
    in). Dims in no pair pass unrotated.
    """

    pairs: Tensor
    frequencies: Tensor
    gain: float = 1.0
    spelling: Literal["half", "interleaved", "other"] = "other"
    axes: int = 1

    def __str__(self) -> str:
        more = f", {self.axes}-D" if self.axes > 1 else ""
        return f"rotary({self.spelling}, {self.dims} dims{more})"

    @property
    def dims(self) -> int:
        """How many dims of a head are rotated."""
        return 2 * len(self.pairs)


@dataclass(frozen=True)
class Site:
    """One softmax attention of the model, raised to `attnopt::attention`.

    `gain` is the one factor that q and k carry on their way from the projections (a scale applied
    to q beforehand), so the logits are `gain * spec.scale` times the product of the projections.
    `kv_heads` counts distinct key/value heads as the projections make them (the spec may still see
    them repeated). `missing` says, per fact that could not be found ("q", "k", "v", "out",
    "rotary", "mask"), why, naming the node.
    """

    id: str
    node: str
    module: str
    source: str
    spec: AttentionSpec
    kv_heads: int
    q: Path | None = None
    k: Path | None = None
    v: Path | None = None
    out: OutputPath | None = None
    rotary: Rotary | None = None
    qk_norm: bool = False
    gain: float = 1.0
    position: str = "none"
    mask: str = "full"
    mask_certainty: Certainty = "proved"
    spelling: Literal["sdpa", "eager"] = "sdpa"
    missing: dict[str, str] = field(default_factory=dict)

    def unsplit(self, which: Literal["q", "k", "v"]) -> str:
        """Why no node holds an operand as its projection makes it with one axis per head, in
        words."""
        if self.qk_norm and which != "v":
            return f"one norm over all heads of {which} stands between them and their projection"
        return f"no node holds {which} with one axis per head, as its projection makes it"


@dataclass(frozen=True)
class Unraised:
    """A softmax that was met and not raised: why, and at which node of the user's graph.

    `passed` are the nodes of it that were understood before, the softmax first.
    """

    module: str
    source: str
    node: str
    reason: str
    help: str = ""
    passed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sublayer:
    """One residual branch: `exit` = `entry` + f(`entry`), where f's last node is `branch`.

    `id` is like "b3.attention". `entry`, `branch` and `exit` are node names of
    `[batch, seq, width]` tensors; `exit` is the add that reads `branch`. Removing the sublayer
    replaces `exit` by the add's other operand: the entry, or, where several branches are added in
    one sum (parallel attention and MLP), what is left of it; see `compiler.removal`. A norm after
    the add stays, as post-norm models need. `inner` are the node names that only this branch uses;
    `sites` the ids of the attention sites among them.
    """

    id: str
    kind: Literal["attention", "mlp", "other"]
    block: int
    module: str
    entry: str
    branch: str
    exit: str
    inner: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
