"""Does a head copy? Measured on random tokens that come twice: A A and then anything, with A of at
most 64 tokens drawn from those of the calibration data, all different where there are enough.

At position i of the second A the next token is known from the first: it stands at j = i - |A| + 1.
`induction` is the mean weight on that key (Olsson et al. 2022, the prefix-matching score);
`retrieval` the share of positions where no key has more weight than it, which is the retrieval
score of Wu et al. 2024 (arXiv 2404.15574, section 2) in its prefill form: there the query is the
step that emits a token of the needle, and the score counts steps whose arg-max lands on that token
in the context. Random tokens leave nothing to go by but the copy; a needle task would need a model
that follows instructions. A is short because small models copy over short distances only: the score
is to tell heads apart, not to say how far they reach (`distance` and the local masses do).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from attnopt.compiler.diagnostics.some_weights import Slice
from attnopt.compiler.program import Batch, Program, inputs

SHORTEST, LONGEST = 8, 64
DRAWS = 2  # batches of drawn tokens


@dataclass(frozen=True)
class Twice:
    """A batch whose first `half` tokens come twice. `given` names the inputs that are as the data
    has them: they may hide tokens."""

    batch: Batch
    half: int
    given: frozenset[str]


class Copying:
    """Sums over the queries of the second half, per head."""

    def __init__(self, heads: int) -> None:
        self.mass = torch.zeros(heads, dtype=torch.float64)
        self.hits = torch.zeros(heads, dtype=torch.float64)
        self.queries = 0

    def add(self, part: Slice, half: int, counted: Tensor | None = None) -> None:
        """Add rows whose queries lie in the second half, the last one left out; `counted` bool
        `[R]` says which of them count."""
        target, weights = part.i - half + 1, part.weights
        if counted is not None:
            target, weights = target[counted], weights[:, counted]
        at = target[None, :, None].expand(len(weights), -1, 1)
        self.mass += weights.gather(-1, at)[..., 0].double().sum(-1)
        self.hits += (weights.argmax(-1) == target[None]).double().sum(-1)
        self.queries += len(target)


def token_input(program: Program) -> fx.Node | str:
    """The input that holds token ids: the one that an embedding reads; or why there is none."""
    found: list[fx.Node] = [
        n for n in program.graph.nodes if n.op == "placeholder" and _embedded(n)
    ]
    named = [n for n in found if "input_ids" in n.name]
    if len(named or found) == 1:
        return (named or found)[0]
    return "no input holds token ids" if not found else "several inputs are embedded"


def twice(program: Program, batches: Sequence[Batch], seed: int) -> Twice | str:
    """The longest batch with tokens A A and random ones after them; or why there is none. Every
    position counts as real; what follows A A is causally later."""
    ids = token_input(program)
    if isinstance(ids, str):
        return ids
    place = [n for n in program.graph.nodes if n.op == "placeholder"].index(ids)
    tokens = [inputs(program, batch)[place] for batch in batches]
    longest = max(range(len(batches)), key=lambda at: int(tokens[at].shape[-1]))
    shape = tokens[longest].shape
    half = min(LONGEST, int(shape[-1]) // 2)
    if len(shape) != 2 or half < SHORTEST:
        return f"sequences of {shape[-1]} tokens are too short to hold a copy"
    pool = torch.cat([_real(t, b) for t, b in zip(tokens, batches, strict=True)]).unique()
    made = torch.stack([_drawn(pool, half, seed + row) for row in range(shape[0])])
    after = int(shape[1]) - 2 * half
    rest = _drawn(pool, int(shape[0]) * after, seed - 1).reshape(shape[0], after)
    full = torch.cat((made, made, rest), dim=1)
    batch = _replaced(batches[longest], tokens[longest], full)
    holders = [n for n in program.graph.nodes if n.op == "placeholder"]
    pairs = zip(holders, inputs(program, batch), inputs(program, batches[longest]), strict=True)
    return Twice(batch, half, frozenset(n.name for n, new, old in pairs if new is old))


def sources(node: fx.Node) -> set[str]:
    """The inputs whose values a node is computed from; those of which it reads sizes alone are
    none."""
    seen, waiting = set[fx.Node](), [node]
    while waiting:
        last = waiting.pop()
        if last not in seen and not _of_sizes(last):
            seen.add(last)
            waiting += last.all_input_nodes
    return {n.name for n in seen if n.op == "placeholder"}


def _of_sizes(node: fx.Node) -> bool:
    name = str(node.target)
    return node.op == "call_function" and any(w in name for w in ("sym_size", "_like.", ".new_"))


def _embedded(node: fx.Node) -> bool:
    return any(user.target is torch.ops.aten.embedding.default for user in node.users)


def _real(tokens: Tensor, batch: Batch) -> Tensor:
    return tokens[batch.valid] if batch.valid is not None else tokens.reshape(-1)


def _drawn(pool: Tensor, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed % 2**63)
    if len(pool) >= count:
        return pool[torch.randperm(len(pool), generator=generator)[:count]]
    return pool[torch.randint(len(pool), (count,), generator=generator)]


def _replaced(batch: Batch, tokens: Tensor, full: Tensor) -> Batch:
    """The batch with other tokens, and every mask that is known to be one full."""
    valid = batch.valid

    def other(value: object) -> object:
        if value is tokens:
            return full.to(tokens.dtype)
        if isinstance(value, Tensor) and valid is not None and value.shape == valid.shape:
            if torch.equal(value.bool(), valid):
                return torch.ones_like(value)
            if torch.equal(value.bool(), ~valid):  # one that marks padding
                return torch.zeros_like(value)
        return value

    args, kwargs = pytree.tree_map(other, (batch.args, dict(batch.kwargs)))
    return Batch(args, kwargs)
