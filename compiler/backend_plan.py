"""The backend's option `plan`: the approximate steps of a finished run, fitted to Dynamo's graph.

The run's folder holds the plan, the batches that it was fitted on and what its attentions were. The
batches are handed to the graph by the names of its inputs. Weights that the fit replaces become
constants of the compiled graph.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from attnopt.compiler.artifact import (
    REPORT,
    load_calibration,
    read_inputs,
    read_plan,
    read_report,
)
from attnopt.compiler.contract import Exactness, Notes, read_pass
from attnopt.compiler.errors import Problem
from attnopt.compiler.pipeline import apply_pass
from attnopt.compiler.plan import Outcome, Plan, require_applied
from attnopt.compiler.program import Batch, Program

_KEY = re.compile(r"L\['(\w+)'\]|.*\['kwargs'\]\['(\w+)'\]")


@dataclass(frozen=True)
class SavedPlan:
    """A plan of a finished run, read for the backend.

    `inputs` are the names of the model's inputs in the order of a call. `heads` are query heads and
    head_dim of each of its attentions, empty where no report says so;
    `idle` are the pairs of rewrite and target that changed nothing in the run.
    """

    home: Path
    plan: Plan
    calibration: tuple[Batch, ...] = ()
    heldout: tuple[Batch, ...] = ()
    inputs: tuple[str, ...] = ()
    heads: tuple[tuple[int, int], ...] = ()
    idle: frozenset[tuple[str, str]] = frozenset()
    seed: int = 0

    @staticmethod
    def read(path: str | Path) -> SavedPlan:
        """The plan in a plan.json, or in the folder that holds one. Raises `Problem` A501 or
        A505."""
        plan, described = read_plan(path), read_inputs(path)
        home = Path(path) if Path(path).is_dir() else Path(path).parent
        report = read_report(home) if (home / REPORT).is_file() else {}
        sites = [site["facts"] for site in report.get("sites", ()) if site["raised"]]
        idle = [(o["rewrite"], o["target"]) for o in report.get("outcomes", ()) if not o["applied"]]
        with torch._guards.tracing(None):  # or else torch.load makes fake tensors
            kept = load_calibration(home)
        return SavedPlan(
            home, plan, tuple(kept.get("calibration", ())), tuple(kept.get("heldout", ())),
            tuple(words.partition(" ")[0] for words in described),
            tuple((site["heads"], site["head_dim"]) for site in sites), frozenset(idle),
            int(report.get("seed", 0)),
        )  # fmt: skip

    def applied(self, program: Program, inputs: GraphInputs) -> Program:
        """The program with every approximate step of the plan; exact ones have been made before.

        Raises `Problem` A213 where the graph is not the model of the run or the plan heals it, and
        A512 where a step does not apply.
        """
        steps = [(read_pass(step.rewrite), step.targets) for step in self.plan.steps]
        if any(rewrite.asked for rewrite, _ in steps):
            raise Problem(
                "A213", "the plan heals its model, which takes minutes of training",
                where=str(self.home), why="a compilation trains nothing",
                help="load the folder's model with attnopt.load(DIR), its weights are healed",
            )  # fmt: skip
        self._same(program)
        fitted, held = (
            inputs.batches(role, self.inputs) for role in (self.calibration, self.heldout)
        )
        notes = Notes(program, fitted, held, seed=self.seed)
        outcomes: list[Outcome] = []
        made: list[str] = []
        for rewrite, targets in steps:
            if rewrite.exactness is Exactness.APPROXIMATE:
                program, done = apply_pass(program, rewrite, targets, notes, verify=False)
                outcomes += done
                made.append(rewrite.text)
        named = (pair for pair in self.plan.named() if pair[0] in made and pair not in self.idle)
        require_applied(named, outcomes, self.home)
        return program

    def _same(self, program: Program) -> None:
        """Whether the graph's attentions are those of the run."""
        found = [(s.spec.heads, s.spec.head_dim) for s in program.sites]
        known = list(self.heads)
        if known and found != known:
            raise Problem(
                "A213",
                f"the plan is of a model with {len(known)} attentions, this graph has {len(found)}"
                if len(found) != len(known)
                else "the plan is of a model with other heads than this graph has",
                where=str(self.home),
                why="a graph break splits a model into several graphs; a plan needs the whole",
                help="give the model of the run, and look for breaks with "
                "torch.compile(..., fullgraph=True)",
            )


class GraphInputs:
    """What one of Dynamo's graphs takes besides weights, and how a batch of the run becomes it.

    `values` are the inputs at hand. Inputs are found by name; sizes follow from the tensors, and
    numbers that the model holds stay what they are.
    """

    def __init__(
        self, graph: fx.GraphModule, weights: Collection[str], values: Sequence[Any]
    ) -> None:
        holders = [node for node in graph.graph.nodes if node.op == "placeholder"]
        self.own = {n: value for n, value in zip(holders, values, strict=True) if of_module(n)}
        self.holders = [node for node in holders if node.name not in weights]
        self.tensors = [
            n for n in self.holders if isinstance(_example(n), Tensor) and n not in self.own
        ]

    def batches(self, given: Sequence[Batch], names: Sequence[str]) -> list[Batch]:
        """Batches of the run as positional inputs of the graph, one row each where the graph is
        compiled for one; `names` are those of the model's inputs in the order of a call.

        Raises `Problem` A213 where an input is missing or has another size.
        """
        return [self._batch(row) for batch in given for row in self._rows(batch, names)]

    def _rows(self, batch: Batch, names: Sequence[str]) -> Iterator[Batch]:
        tensors = self._tensors(batch, names)
        rows = {x.shape[0] for x in tensors}
        single = all(_example(n).shape[:1] == (1,) for n in self.tensors)
        if not single or len(rows) != 1:
            yield replace(batch, args=tuple(tensors), kwargs={})
            return
        for i in range(rows.pop()):
            valid = None if batch.valid is None else batch.valid[i : i + 1]
            yield Batch(tuple(x[i : i + 1] for x in tensors), {}, valid)

    def _tensors(self, batch: Batch, names: Sequence[str]) -> list[Tensor]:
        """The tensors of a batch in the graph's order, which is that of their first use."""
        flat = pytree.tree_leaves((batch.args, dict(batch.kwargs)))
        known = dict(zip(names, flat, strict=True)) if len(names) == len(flat) else {}
        known |= batch.kwargs
        keys = [_key(node) for node in self.tensors]
        if all(isinstance(known.get(key), Tensor) for key in keys):
            return [known[key] for key in keys]
        if len(keys) == len(flat) == 1:
            return flat
        raise Problem(
            "A213",
            f"the plan was fitted on inputs {list(known) or len(flat)}, this graph takes {keys}",
            help="compile the model itself, and call it with the same inputs as in the run",
        )

    def _batch(self, batch: Batch) -> Batch:
        """A batch of tensors in order, completed by the sizes that the graph takes as numbers."""
        sizes = dict[str, int]()
        for node, value in zip(self.tensors, batch.args, strict=True):
            _note_sizes(node, value, sizes)
        values = {**self.own, **dict(zip(self.tensors, batch.args, strict=True))}
        named = {_key(node): value for node, value in zip(self.tensors, batch.args, strict=True)}
        made = [values[n] if n in values else _number(n, sizes, named) for n in self.holders]
        return replace(batch, args=tuple(made))


def of_module(holder: fx.Node, kind: str = "NNModuleSource") -> bool:
    """Whether an input of Dynamo's graph is held by a module, by the `kind` of its source."""
    from torch._dynamo import source as sources  # loads all of Dynamo

    source: Any = getattr(holder.meta.get("grapharg"), "source", None)
    while source is not None and not isinstance(source, getattr(sources, kind)):
        source = getattr(source, "base", None)
    return source is not None


def _example(node: fx.Node) -> Any:
    return node.meta.get("example_value")


def _key(node: fx.Node) -> str:
    """The argument's name of an input, from where Dynamo found it."""
    return _named(getattr(node.meta.get("grapharg"), "source", None)) or node.name


def _named(source: Any) -> str:
    name = getattr(source, "name", "")
    found = _KEY.fullmatch(str(name() if callable(name) else name))
    return (found[1] or found[2]) if found else ""


def _note_sizes(node: fx.Node, value: Tensor, sizes: dict[str, int]) -> None:
    """Note what the symbols stand for; a size that was compiled in has to be the batch's."""
    compiled = _example(node).shape
    for size, actual in zip(compiled, value.shape, strict=True):
        if isinstance(size, torch.SymInt):
            sizes[str(size.node.expr)] = actual
        elif size != actual:
            raise Problem(
                "A213",
                f"the graph is compiled for `{_key(node)}` of {_words(compiled)}, the plan was "
                f"fitted on {_words(value.shape)}",
                help="compile with torch.compile(..., dynamic=True)",
            )


def _words(shape: Sequence[Any]) -> str:
    return " x ".join(str(size) for size in shape)


def _number(node: fx.Node, sizes: Mapping[str, int], named: Mapping[str, Tensor]) -> int:
    """A number that the graph takes: the size of a tensor by its symbol, or what Dynamo read of a
    tensor besides (a stride, its offset in the storage)."""
    example = _example(node)
    if isinstance(example, torch.SymInt) and str(example.node.expr) in sizes:
        return sizes[str(example.node.expr)]
    source: Any = getattr(node.meta.get("grapharg"), "source", None)
    tensor, kind = named.get(_named(getattr(source, "base", None))), getattr(source, "prop", None)
    if tensor is not None and kind is not None:
        at = () if source.idx is None else (source.idx,)
        return int(getattr(tensor, kind.name.lower())(*at))
    raise Problem("A213", f"the graph takes a number `{_key(node)}` that no batch of the run tells")
