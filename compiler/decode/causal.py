"""Whether a token changes only what comes after it: every operator is asked, by running two inputs
that differ from one position on side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.compiler.decode.split import Split, sample, token_axes, where_of
from attnopt.compiler.errors import Problem
from attnopt.compiler.layout import is_symbol
from attnopt.compiler.program import Program
from attnopt.compiler.verify import BOUND, RUN_ERRORS, difference


def require_causal(program: Program, split: Split) -> None:
    """Raise `Problem` A703 naming the first operator at which a later token changes an earlier
    position."""
    given = sample(program, split)
    length = given[split.tokens[0]].shape[1]
    generator = torch.Generator().manual_seed(0)
    other = {
        name: _changed(x, length // 2, generator) if name in split.tokens else x
        for name, x in given.items()
    }
    if all(torch.equal(x, other[name]) for name, x in given.items() if name in split.tokens):
        raise Problem(
            "A703", f"whether {program.name} is causal cannot be told",
            why="its example holds one token everywhere, and no table says which others there are",
            help="give an example of several tokens",
        )  # fmt: skip
    with torch.no_grad(), running(program, length):
        twins = _Twins(program, split, length // 2, list(other.values()))
        twins.run(*given.values(), enable_io_processing=False)


def _changed(tokens: Tensor, at: int, generator: torch.Generator) -> Tensor:
    """The same input with other tokens, taken from all of it, from a position on."""
    flat = tokens.flatten(0, 1)
    picked = torch.randint(0, len(flat), tokens[:, at:].shape[:2], generator=generator)
    made = tokens.clone()
    made[:, at:] = flat[picked]
    return made


def is_unset(node: fx.Node) -> bool:
    """Whether a node makes memory that is not yet written to."""
    return "empty" in str(getattr(node.target, "overloadpacket", ""))


@contextmanager
def running(program: Program, length: int) -> Iterator[None]:
    """Raise `Problem` A706 where a program does not run on so many tokens."""
    try:
        yield
    except RUN_ERRORS as error:
        raise Problem(
            "A706", f"{program.name} does not run on {length} tokens",
            why=(str(error).splitlines() or [type(error).__name__])[0],
            help="its graph holds fast how many tokens there are",
        ) from error  # fmt: skip


class _Twins(fx.Interpreter):
    """Runs two inputs and compares every value that depends on the tokens before position `at`."""

    def __init__(self, program: Program, split: Split, at: int, other: Sequence[Any]) -> None:
        super().__init__(program.module)
        self.split, self.at = split, at
        self.mixed: set[fx.Node] = set()
        self.other = fx.Interpreter(program.module)
        self.other.args_iter = iter(other)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        twin = self.other.env[n] = self.other.run_node(n)
        if is_unset(n):
            value.zero_()
            twin.zero_()
        elif n.name in self.split.moving and n.op == "call_function":
            self._compare(n, value, twin)
        for dead in self.user_to_last_uses.get(n, ()):
            self.other.env.pop(dead, None)
        return value

    def _compare(self, node: fx.Node, value: Any, twin: Any) -> None:
        fake = node.meta.get("val")
        if not isinstance(value, Tensor) or not isinstance(fake, Tensor):
            return
        if not value.is_floating_point():
            return
        axes = token_axes(node, self.split.seq)
        if len(axes) > 1:
            return
        if not axes:
            if not any(map(is_symbol, fake.shape[1:])) and not torch.equal(value, twin):
                self.mixed.add(node)  # made of all positions, which is wrong only if one reads it
            return
        error = difference(*(x.narrow(axes[0], 0, self.at) for x in (value, twin)))
        if error > BOUND.get(value.dtype, 2e-5):
            node = next((n for n in node.all_input_nodes if n in self.mixed), node)
            raise Problem(
                "A703", f"later tokens change earlier positions at `{node.name}` ({node.target})",
                where=where_of(node),
                why=f"position {self.at} and after were changed, and what comes before differs by "
                f"{error:.1e} of its rms",
                help="only a causal model can be decoded with a cache",
            )  # fmt: skip
