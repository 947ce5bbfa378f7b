"""A two-block decoder with the canonical op in it and its sites filled in by hand."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from attnopt.compiler.ops import ATTENTION
from attnopt.compiler.program import Batch, Program
from attnopt.compiler.site import OutputPath, Path, Site, Sublayer
from attnopt.compiler.spec import CAUSAL, AttentionSpec

VOCABULARY, WIDTH, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, BLOCKS = 31, 24, 4, 2, 6, 40, 2


class Block(nn.Module):
    """Pre-norm attention and MLP with residual adds; no biases."""

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.line, self.spec = spec.text, spec
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.q = nn.Linear(WIDTH, HEADS * HEAD_DIM, bias=False)
        self.k = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM, bias=False)
        self.v = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM, bias=False)
        self.out = nn.Linear(HEADS * HEAD_DIM, WIDTH, bias=False)
        self.up, self.down = (
            nn.Linear(WIDTH, HIDDEN, bias=False),
            nn.Linear(HIDDEN, WIDTH, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (
            proj(h).reshape(*h.shape[:2], -1, HEAD_DIM).transpose(1, 2)
            for proj in (self.q, self.k, self.v)
        )
        mixed = ATTENTION(q, k, v, [], self.line).transpose(1, 2).reshape(*h.shape[:2], -1)
        x = x + self.out(mixed)
        y: Tensor = x + self.down(torch.relu(self.up(self.norm2(x))))
        return y


class Decoder(nn.Module):
    """Embedding, blocks and a head."""

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(x)}


@lru_cache(maxsize=8)
def decoder(batch: int = 2, length: int = 8, meta: bool = False, backend: str = "sdpa") -> Program:
    """The decoder as a program with both dims dynamic; on the meta device it has no weights.

    It is made once per size: work on a copy.
    """
    spec = AttentionSpec(
        HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM, HEAD_DIM**-0.5, CAUSAL, backend=backend
    )
    with torch.device("meta" if meta else "cpu"):
        model = Decoder(spec).eval()
        ids = torch.zeros(batch, length, dtype=torch.int64)
    if not meta:
        ids = torch.randint(0, VOCABULARY, (batch, length))
    dims = {"input_ids": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
    exported = torch.export.export(model, (), {"input_ids": ids}, dynamic_shapes=dims, strict=False)
    module = exported.module(check_guards=False)
    assert isinstance(module, torch.fx.GraphModule)
    program = Program(
        module,
        Batch((), {"input_ids": ids}),
        name="decoder",
        dynamic={"input_ids": {0: "s0", 1: "s1"}},
    )
    program.sites = tuple(_site(program, spec, index) for index in range(BLOCKS))
    program.sublayers = tuple(_attention(program, index) for index in range(BLOCKS))
    return program


def _site(program: Program, spec: AttentionSpec, index: int) -> Site:
    node = program.attentions()[index]
    base = f"blocks.{index}"
    channels = torch.arange(HEADS * HEAD_DIM).reshape(HEADS, HEAD_DIM)

    def path(name: str) -> Path:
        projection = _product(program, f"{base}.{name}.weight")
        source = projection.all_input_nodes[0].name
        mine = channels[: HEADS if name == "q" else KV_HEADS]
        weight = f"{base}.{name}.weight"
        (split,) = projection.users  # the reshape into heads
        return Path(projection.name, source, weight, None, "out_in", mine, split.name, "bthd")

    out = _product(program, f"{base}.out.weight")
    return Site(
        f"s{index}", node.name, base, "", spec, KV_HEADS, q=path("q"), k=path("k"), v=path("v"),
        out=OutputPath(out.name, f"{base}.out.weight", None, "out_in", channels), mask="causal",
    )  # fmt: skip


def _attention(program: Program, index: int) -> Sublayer:
    """The attention sublayer of a block: what lies between the norm's input and the add."""
    site = program.site(f"s{index}")
    assert site.out is not None and site.q is not None
    branch = program.node(site.out.projection)
    norm = program.node(site.q.source)
    entry = next(n for n in norm.all_input_nodes if n.op != "get_attr")
    (exit,) = branch.users
    order = list(program.graph.nodes)
    inner = order[order.index(norm) : order.index(branch) + 1]
    return Sublayer(
        f"b{index}.attention", "attention", index, f"blocks.{index}", entry.name, branch.name,
        exit.name, tuple(n.name for n in inner if n.op == "call_function"), (site.id,),
    )  # fmt: skip


def _product(program: Program, weight: str) -> torch.fx.Node:
    (read,) = program.parameter_nodes(weight)
    (user,) = read.users
    return user
