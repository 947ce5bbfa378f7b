"""An ONNX file's graph as plain values: nodes, inputs and constants."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

STANDARD = ""  # the domain of ONNX itself; "ai.onnx" is another name of it


@dataclass(frozen=True)
class Node:
    """One operator: `inputs` and `outputs` are names of values, "" where one is left out.

    `attributes` are Python numbers, strings, lists and tensors. `path` is the module that the
    node's exporter says it came from, with the node's own name at the end.
    """

    name: str
    operator: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    opset: int = 17
    path: str = ""

    @property
    def type(self) -> str:
        """The operator with its domain, as `com.microsoft.Attention`."""
        return f"{self.domain}.{self.operator}" if self.domain else self.operator

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute, or what it is when left out."""
        return self.attributes.get(name, default)

    def has(self, output: int) -> bool:
        """Whether somebody asks for this output."""
        return len(self.outputs) > output and bool(self.outputs[output])


@dataclass(frozen=True)
class Input:
    """One input: a size is a number, or the name of a symbol ("" where it has none)."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Graph:
    """A whole model. `constants` are the initializers, and the values of Constant nodes."""

    name: str
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    constants: dict[str, Tensor]
    opset: int

    @property
    def input_names(self) -> dict[str, str]:
        """What Python calls each input."""
        return identifiers(item.name for item in self.inputs)

    @property
    def output_names(self) -> dict[str, str]:
        """What Python calls each output."""
        return identifiers(self.outputs)

    def readers(self) -> dict[str, list[Node]]:
        """The nodes that read each value."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                found.setdefault(name, []).append(node)
        return found


def identifier(name: str) -> str:
    """A name as Python takes it for an argument: `onnx::input.1` is `onnx__input_1`, `lambda` is
    `lambda_`."""
    made = re.sub(r"\W", "_", name)
    made = made if made and not made[0].isdigit() else f"_{made}"
    if not made.isidentifier():  # such as a raised 2, which is a letter to `re` alone
        made = re.sub(r"\W", "_", made, flags=re.ASCII)
    return f"{made}_" if keyword.iskeyword(made) or made == "self" else made


def identifiers(names: Iterable[str]) -> dict[str, str]:
    """Names as Python takes them, each another: names that need no change keep theirs, of the rest
    `a.b` beside `a_b` is `a_b_2`."""
    every = list(dict.fromkeys(names))
    made = {name: name for name in every if identifier(name) == name}
    taken = set(made)
    for name in every:
        if name in made:
            continue
        chosen, count = identifier(name), 1
        while chosen in taken:
            count += 1
            chosen = f"{identifier(name)}_{count}"
        made[name] = chosen
        taken.add(chosen)
    return {name: made[name] for name in every}


def dotted(name: str) -> str:
    """A name as a path of modules: `/encoder/layer.0/MatMul` is `encoder.layer.0.MatMul`; never
    empty."""
    parts = [part for part in re.split(r"[/.]", name) if part]
    return ".".join(re.sub(r"[^\w\-]", "_", part) for part in parts) or "_"
