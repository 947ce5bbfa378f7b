"""What a program computes: operations, bytes and parameters, by node, site and sublayer.

The graph is run once on fake tensors of the wanted size, so neither weights nor time are needed.
A multiply-add counts as two operations. Attention counts 2 * pairs * (head_dim + v_dim) per query
head, where pairs are the (query, key) pairs that the mask keeps; an attention spelled out in matrix
products counts all pairs, because all are computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from attnopt.compiler.ops import ATTENTION
from attnopt.compiler.program import Batch, Program, _ordered, attribute
from attnopt.compiler.regions import site_parts, sublayer_nodes
from attnopt.compiler.spec import Mask, parse_spec

_CPU = torch.device("cpu")
_SDPA = torch.ops.aten.scaled_dot_product_attention.default
_SCORE_PASSES = 4  # scores written, read by the softmax, weights written, read by the product


@dataclass(frozen=True)
class Workload:
    """The size of one call; None keeps the example's. `length` is in tokens."""

    batch: int | None = None
    length: int | None = None


@dataclass(frozen=True)
class NodeCost:
    """One node: operations, bytes read and written with no cache or fusion, dtype of its output."""

    flops: float = 0.0
    bytes: float = 0.0
    dtype: torch.dtype | None = None
    attention: bool = False


@dataclass(frozen=True)
class Cost:
    """Operations (`flops`), bytes and parameters of one call. Counted, not measured."""

    load: Workload
    flops: float
    params: int
    param_bytes: int
    nodes: Mapping[str, NodeCost]
    site_flops: Mapping[str, float]
    site_core_flops: Mapping[str, float]
    site_params: Mapping[str, int]
    sublayer_flops: Mapping[str, float]
    sublayer_params: Mapping[str, int]

    def share(self, site: str) -> float:
        """The site's share of all operations, projections included (0 to 1)."""
        return self.site_flops.get(site, 0.0) / self.flops if self.flops else 0.0

    def core_share(self, site: str) -> float:
        """The share of all operations that the site's scores and weighted sums take (0 to 1)."""
        return self.site_core_flops.get(site, 0.0) / self.flops if self.flops else 0.0


def cost(program: Program, load: Workload | None = None) -> Cost:
    """Count a program at a size. Weights may be real, fake or on the meta device."""
    load = load or Workload()
    nodes = _count(program, load)
    weights = _weights(program)
    parts = {site.id: site_parts(program, site) for site in program.sites}
    inner = {sub.id: sublayer_nodes(program, sub) for sub in program.sublayers}
    unique = {key: size for found in weights.values() for key, size in found.items()}
    return Cost(
        load,
        sum(node.flops for node in nodes.values()),
        sum(count for count, _ in unique.values()),
        sum(bytes for _, bytes in unique.values()),
        nodes,
        {id: _flops(nodes, found) for id, found in parts.items()},
        {id: _flops(nodes, _core(found)) for id, found in parts.items()},
        {id: _params(program, weights, found) for id, found in parts.items()},
        {id: _flops(nodes, found) for id, found in inner.items()},
        {id: _params(program, weights, found) for id, found in inner.items()},
    )  # fmt: skip


def attention_flops(q: Any, k: Any, v: Any, spec: str) -> float:
    """Operations of one canonical attention, from the shapes of q, k and v and the spec's text."""
    per_pair = 2.0 * (q[-1] + v[-1])
    return float(q[0] * q[1] * per_pair * parse_spec(spec).mask.pairs(q[2], k[2]))


@register_flop_formula(torch.ops.attnopt.attention)  # so that torch's FlopCounterMode counts it too
def _formula(q: Any, k: Any, v: Any, extras: Any, spec: str, *args: Any, **kwargs: Any) -> int:
    return round(attention_flops(q, k, v, spec))


class _Counter(fx.Interpreter):
    """Runs a graph on fake tensors and notes what each node costs."""

    def __init__(
        self, module: fx.GraphModule, mode: FakeTensorMode, flops: FlopCounterMode
    ) -> None:
        super().__init__(module)
        self.mode, self.counter, self.nodes = mode, flops, dict[str, NodeCost]()
        self.fakes: dict[int, Tensor] = {}

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self._fake(value) if isinstance(value, Tensor) else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        # Every fake is on the CPU, wherever the graph's weights are: costs do not depend on it.
        args, kwargs = pytree.tree_map_only(torch.device, lambda _: _CPU, (args, dict(kwargs)))
        return super().call_function(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        inputs = [self.env[node] for node in n.all_input_nodes]
        inputs = [value for value in inputs if isinstance(value, Tensor)]
        before = self.counter.get_total_flops()
        result = super().run_node(n)
        flops = float(self.counter.get_total_flops() - before)
        outputs = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        if n.target is _SDPA:
            flops = _sdpa_flops(*self.fetch_args_kwargs_from_env(n))
        moved = _moved(inputs, outputs) + self._score_bytes(n)
        dtype = outputs[0].dtype if outputs else None
        self.nodes[n.name] = NodeCost(flops, moved, dtype, n.target in (_SDPA, ATTENTION))
        return result

    def _score_bytes(self, n: fx.Node) -> float:
        """The score matrix goes through memory in the reference backend alone."""
        if n.target is not ATTENTION or parse_spec(str(n.args[4])).backend != "reference":
            return 0.0
        q, k = (self.env[node] for node in n.args[:2])  # type: ignore[index]
        scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
        return float(_SCORE_PASSES * scores * q.element_size())

    def _fake(self, value: Tensor) -> Tensor:
        if id(value) not in self.fakes:
            self.fakes[id(value)] = _fake_like(value, self.mode)
        return self.fakes[id(value)]


def _count(program: Program, load: Workload) -> dict[str, NodeCost]:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    inputs = [_sized(program, name, value, load) for name, value in _inputs(program)]
    with torch.no_grad(), mode, FlopCounterMode(display=False) as counter:
        runner = _Counter(program.module, mode, counter)
        runner.run(*[_fake_input(v, shape) for v, shape in inputs], enable_io_processing=False)
    return runner.nodes


def _inputs(program: Program) -> list[tuple[str, Any]]:
    """The example's inputs in the order of the graph's placeholders, with their names."""
    batch: Batch = program.example
    flat, _ = pytree.tree_flatten((batch.args, dict(batch.kwargs)))
    names = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    return list(zip(names, _ordered(program, batch, flat), strict=True))


def _sized(program: Program, name: str, value: Any, load: Workload) -> tuple[Any, tuple[int, ...]]:
    """An input and the shape it is to have: dims 0 and 1 change where they may vary."""
    if not isinstance(value, Tensor):
        return value, ()
    shape = list(value.shape)
    for dim in program.dynamic.get(name, {}):
        wanted = {0: load.batch, 1: load.length}.get(dim)
        shape[dim] = shape[dim] if wanted is None else wanted
    return value, tuple(shape)


def _fake_input(value: Any, shape: tuple[int, ...]) -> Any:
    return torch.empty(shape, dtype=value.dtype) if isinstance(value, Tensor) else value


def _fake_like(value: Tensor, mode: FakeTensorMode) -> Tensor:
    """A fake tensor of this mode; the values of small real constants stay known to it."""
    if isinstance(value, FakeTensor) or value.device != _CPU:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    return mode.from_tensor(value, static_shapes=True)


def _sdpa_flops(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    q, k, v = args[:3]
    causal = bool(kwargs.get("is_causal", args[5] if len(args) > 5 else False))
    kept = Mask("causal" if causal else "full").pairs(q.shape[-2], k.shape[-2])
    heads = q.shape[:-2].numel()
    return float(heads * 2.0 * (q.shape[-1] + v.shape[-1]) * kept)


def _moved(inputs: list[Tensor], outputs: list[Tensor]) -> float:
    """Bytes in and out; a view of an input moves none."""
    held = {tensor.untyped_storage()._cdata for tensor in inputs}
    made = [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in held]
    if not made:
        return 0.0
    return float(sum(tensor.numel() * tensor.element_size() for tensor in [*inputs, *made]))


_Weights = dict[str, dict[int, tuple[int, int]]]


def _weights(program: Program) -> _Weights:
    """For each get_attr node its parameter: identity -> (elements, bytes); tied ones share one."""
    found: _Weights = {}
    for node in program.graph.nodes:
        value = attribute(program.module, str(node.target)) if node.op == "get_attr" else None
        if isinstance(value, torch.nn.Parameter):
            size = (value.numel(), value.numel() * value.element_size())
            found[node.name] = {value.untyped_storage()._cdata: size}
    return found


def _params(program: Program, weights: _Weights, names: Any) -> int:
    """Parameters that the named nodes read, each counted once."""
    wanted = set(names)
    read: dict[int, tuple[int, int]] = {}
    for node in program.graph.nodes:
        if node.name in weights and (node.name in wanted or wanted & {u.name for u in node.users}):
            read |= weights[node.name]
    return sum(count for count, _ in read.values())


def _core(parts: Mapping[str, str]) -> list[str]:
    return [name for name, part in parts.items() if part == "core"]


def _flops(nodes: Mapping[str, NodeCost], names: Any) -> float:
    return sum(nodes[name].flops for name in names if name in nodes)
