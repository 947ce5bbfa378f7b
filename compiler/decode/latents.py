"""A cache of latents: where all heads make their keys and values of one narrow vector per token,
that vector is stored instead of them (multi-head latent attention, DeepSeek-V2, section 2.1).

With s the stored vector of a token, keys are k_h = K_h s and values v_h = V_h s + b_h. So q.k_h =
(K_h^T q).s and sum_j a_j v_h = V_h (sum_j a_j s_j) + b_h: all query heads attend to the stored
vectors themselves, as if they were the one key/value head ("absorbed"). The maps K_h, V_h are not
read off a spelling but found by evaluating the graph on unit vectors, and tried on random ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor

from attnopt.compiler import attend_latent
from attnopt.compiler.decode.split import Split
from attnopt.compiler.layout import is_symbol, same_size
from attnopt.compiler.program import Program, attribute
from attnopt.compiler.raising.evaluate import LIMIT, Evaluator, Unknown
from attnopt.compiler.raising.index_probe import CASTS
from attnopt.compiler.spec import AttentionSpec, parse_spec

aten = torch.ops.aten
_PRODUCTS = (aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default)
_TRIALS = 3  # random tokens on which the maps are tried
_SLACK = 64 * torch.finfo(torch.float32).eps  # tables in a graph are often of float32


@dataclass(frozen=True)
class Latent:
    """What is stored: node `latent` `[batch, seq, rank]` and, where keys have a part that all
    heads share, node `shared` `[batch, 1, seq, dim]`, joined to one vector of `width`.

    `up_k` `[kv_heads, head_dim, width]` and `up_v` `[kv_heads, v_dim, rank]` make keys and values
    of it, `bias` `[kv_heads, v_dim]` is added to the values. `rope_at` is the first channel of the
    keys where the shared part stands as it is, -1 where there is none such.
    """

    spec: AttentionSpec
    latent: str
    shared: str | None
    up_k: Tensor
    up_v: Tensor
    bias: Tensor
    line: str = field(init=False, repr=False, compare=False)
    rope_at: int = field(init=False, repr=False, compare=False)
    reads_all: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "line", self.spec.text)
        object.__setattr__(self, "rope_at", attend_latent.rope_at(self.up_k, self.rank))

    @property
    def rank(self) -> int:
        """Width of the latent alone."""
        return int(self.up_v.shape[2])

    @property
    def widths(self) -> tuple[tuple[int, int], ...]:
        """(heads, dim) of what is stored of a token."""
        return ((1, int(self.up_k.shape[2])),)

    def slots(self, capacity: int) -> int:
        """Slots for a sequence of at most `capacity` tokens; one stays free, see `Contiguous`."""
        return capacity + 1

    def least(self, reached: int) -> int:
        """The fewest tokens that can be left of `reached` that were read."""
        return 0

    def store(self, joined: Tensor, kept: Tensor, start: Any) -> None:
        """Write the vectors of new tokens `[batch, 1, S, width]` into the cache."""
        kept[:, :, start : start + joined.shape[2]] = joined

    def attend(
        self, q: Tensor, up_k: Tensor, up_v: Tensor, bias: Tensor, kept: Tensor, start: Any,
        extras: Sequence[Tensor],
    ) -> Tensor:  # fmt: skip
        """Attend to all vectors that are there, those of the new tokens among them.

        q is `[batch, heads, S, head_dim]`; the extras are those of the new rows.
        """
        held = kept[:, :, : start + q.shape[2]]
        return attend_latent.step(
            q, held, up_k, up_v, bias, extras, self.spec, self.line, self.rope_at
        )

    def prompt(
        self, q: Tensor, k: Tensor, v: Tensor, joined: Tensor, extras: Sequence[Tensor]
    ) -> Tensor:
        """Attention among the tokens of a prompt, whose keys and values are made."""
        return attend_latent.prompt(
            q, k, v, joined, extras, self.spec, self.line, self.rank, self.rope_at
        )


def joined(latent: Tensor, shared: Tensor | None = None) -> Tensor:
    """What is stored of tokens, `[batch, 1, S, width]`."""
    made = latent[:, None]
    return made if shared is None else torch.cat((made, shared), -1)


def find(
    program: Program, parts: Split, attention: fx.Node, dtype: torch.dtype | None = None
) -> Latent | None:
    """The latent that an attention's keys and values are made of, where storing it takes less than
    storing them; None where there is none. The maps are in the keys' dtype, or in `dtype`."""
    spec = parse_spec(str(attention.args[4]))
    if spec.mask.kind == "window":
        return None
    _, k, v = cast(tuple[fx.Node, ...], attention.args[:3])
    latent = _source(v, parts)
    if latent is None:
        return None
    shared = _shared(k, latent, parts)
    found = _Reading(program, parts, latent, shared, k, v)
    wide = spec.kv_heads * (spec.head_dim + spec.v_dim)
    if found.width >= wide or not found.alone():
        return None
    try:
        maps = found.maps()
    except Unknown:
        return None
    if maps is None:
        return None
    up_k, key_bias, up_v, bias = maps
    # A bias of all keys is the same in each of a query's logits, which softmax does not see; one of
    # all values is what it was where a query's weights sum to one.
    sinks = "sinks" in spec.extras
    if ((spec.softcap or sinks) and bool(key_bias.any())) or (sinks and bool(bias.any())):
        return None
    like = dtype or k.meta["val"].dtype
    kept = [x.to(program.device, like) for x in (up_k, up_v, bias)]
    return Latent(spec, latent.name, shared.name if shared else None, *kept)


def _source(v: fx.Node, parts: Split) -> fx.Node | None:
    """The node `[batch, seq, rank]` that the projection of an operand reads, where that is itself
    made by a narrowing projection; None otherwise."""
    projection = _up(v, parts)
    if projection is None:
        return None
    node = _above(projection, parts)
    while node is not None and not _is_tokens(node, parts):
        node = _above(node, parts) if node.target not in _PRODUCTS else None
    return node if node is not None and _narrowed(node, parts) else None


def _up(node: fx.Node, parts: Split) -> fx.Node | None:
    """The first projection above a node that only moves its values about."""
    found: fx.Node | None = node
    while found is not None and found.target not in _PRODUCTS:
        found = _above(found, parts)
    return found


def _above(node: fx.Node, parts: Split) -> fx.Node | None:
    """The one value of the tokens that a node reads; None where there are several."""
    above = [n for n in node.all_input_nodes if n.name in parts.moving]
    return above[0] if len(above) == 1 else None


def _is_tokens(node: fx.Node, parts: Split) -> bool:
    fake = node.meta.get("val")
    if not isinstance(fake, Tensor) or fake.dim() != 3 or is_symbol(fake.shape[2]):
        return False
    return same_size(fake.shape[0], parts.batch) and same_size(fake.shape[1], parts.seq)


def _narrowed(node: fx.Node, parts: Split) -> bool:
    """Whether a node is a projection's result, or a norm of it: not the stream of the model, which
    every attention reads."""
    width, seen, stack = int(node.meta["val"].shape[2]), set[fx.Node](), [node]
    while stack:
        top = stack.pop()
        if top in seen or top.name not in parts.moving:
            continue
        seen.add(top)
        if top.target in _PRODUCTS:
            source = _above(top, parts)
            return source is not None and width <= int(source.meta["val"].shape[-1])
        if top.target is aten.add.Tensor and _adds_streams(top, parts):
            return False
        stack.extend(top.all_input_nodes)
    return False


def _adds_streams(node: fx.Node, parts: Split) -> bool:
    """Whether an addition joins two values of the tokens, as a residual sum does."""
    moving = [n for n in node.all_input_nodes if n.name in parts.moving]
    return len(moving) > 1


def _shared(k: fx.Node, latent: fx.Node, parts: Split) -> fx.Node | None:
    """The one part of keys `[batch, 1, seq, dim]` that is repeated for every head."""
    found: list[fx.Node] = []
    seen: set[fx.Node] = {latent}
    stack = [k]
    while stack:
        node = stack.pop()
        if node in seen or node.name not in parts.moving:
            continue
        seen.add(node)
        source = node.all_input_nodes[0] if node.all_input_nodes else node
        if node.target is aten.expand.default and _one_head(source, parts):
            found.append(source)
            continue
        stack.extend(node.all_input_nodes)
    return found[0] if len(found) == 1 else None


def _one_head(node: fx.Node, parts: Split) -> bool:
    shape = node.meta["val"].shape
    return len(shape) == 4 and shape[1] == 1 and same_size(shape[2], parts.seq)


class _Reading:
    """Keys and values as functions of what would be stored, evaluated from the graph."""

    def __init__(
        self, program: Program, parts: Split, latent: fx.Node, shared: fx.Node | None, k: fx.Node,
        v: fx.Node,
    ) -> None:  # fmt: skip
        self.program, self.parts, self.k, self.v = program, parts, k, v
        self.given = [latent] if shared is None else [latent, shared]
        self.sizes = [int(node.meta["val"].shape[-1]) for node in self.given]

    @property
    def width(self) -> int:
        """Width of what would be stored."""
        return sum(self.sizes)

    def alone(self) -> bool:
        """Whether keys and values depend on no token but through what would be stored."""
        seen, stack = set(self.given), [self.k, self.v]
        while stack:
            node = stack.pop()
            if node in seen or node.name not in self.parts.moving:
                continue
            if node.op == "placeholder":
                return False
            seen.add(node)
            stack.extend(node.all_input_nodes)
        return True

    def maps(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """K `[kv_heads, head_dim, width]` and its bias, V `[kv_heads, v_dim, rank]` and its bias;
        None where keys and values are no such maps, the same at all positions."""
        units = torch.cat((torch.zeros(1, self.width), torch.eye(self.width))).double()
        keys, values = self._at(units)  # [heads, 1 + width, dim]
        up_k, up_v = (x[:, 1:] - x[:, :1] for x in (keys, values))
        rank = self.sizes[0]
        generator = torch.Generator().manual_seed(0)
        tried = torch.randn(_TRIALS, self.width, generator=generator, dtype=torch.float64)
        sides = zip(self._at(tried), (keys, values), (up_k, up_v), strict=True)
        for made, base, maps in sides:
            off = (made - (base[:, :1] + tried @ maps)).abs().max()
            if not off <= _SLACK * (made - base[:, :1]).abs().max().clamp(min=1e-30):
                return None
        if bool(up_v[:, rank:].any()):
            return None
        return (
            up_k.transpose(1, 2).contiguous(), keys[:, 0],
            up_v[:, :rank].transpose(1, 2).contiguous(), values[:, 0],
        )  # fmt: skip

    def _at(self, tokens: Tensor) -> list[Tensor]:
        """Keys and values `[kv_heads, tokens, dim]` of stored vectors `[tokens, width]`, each token
        at another position."""
        sizes = {str(self.parts.seq): len(tokens)}
        if is_symbol(self.parts.batch):
            sizes[str(self.parts.batch)] = 1
        given: dict[fx.Node, Any] = {}
        for node, part in zip(self.given, tokens.split(self.sizes, dim=1), strict=True):
            fake = node.meta["val"]
            rows = 1 if is_symbol(fake.shape[0]) else int(fake.shape[0])
            shaped = part.view(*(1,) * (fake.dim() - 2), *part.shape)
            given[node] = shaped.expand(rows, *shaped.shape[1:])
        evaluator = _Wide(self.program, sizes, given)
        with torch.no_grad():
            return [evaluator(node)[0].double() for node in (self.k, self.v)]


class _Wide(Evaluator):
    """Evaluates in float64 whatever the dtype of the weights, so that a map is told from what only
    resembles one; weights that are not there are drawn."""

    def _run(self, node: fx.Node) -> Any:
        source = node.args[0] if node.args else None
        if node.target in CASTS and isinstance(source, fx.Node):
            value = self.values[source]
            if isinstance(value, Tensor) and value.is_floating_point():
                return value
        if node.op != "get_attr":
            return super()._run(node)
        held = attribute(self.program.module, str(node.target))
        if held.is_floating_point() and (held.is_meta or isinstance(held, FakeTensor)):
            if held.numel() > LIMIT:
                raise Unknown(f"`{node.target}` has no values")
            generator = torch.Generator().manual_seed(len(self.values))
            return torch.randn(held.shape, generator=generator, dtype=torch.float64)
        value = super()._run(node)
        return value.double() if value.is_floating_point() else value
