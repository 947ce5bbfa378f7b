"""Which weight of a checkpoint each name of a program stands for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from attnopt.compiler.program import Program

_NUMBER = re.compile(r"^(.*?)\.(\d+)(\.|$)")


@dataclass(frozen=True)
class Names:
    """The names of an original program's weights, and the ones they have in the checkpoint.

    Most differ by a prefix alone. Where a model reads a view of a weight (a transpose), the trace
    has given the view a name of its own; it stands for the weight whose memory it shares.
    """

    prefix: str
    owners: Mapping[str, str]

    @staticmethod
    def read(program: Program, weights: Mapping[str, Tensor], prefix: str) -> Names:
        """Of a program as it was traced, and its model's weights by their names in the
        checkpoint."""
        names = read_names(program)
        plain = {name: name.removeprefix(prefix) for name in names}
        found = {name: other for name, other in plain.items() if other in weights}
        for name in names - found.keys():
            at = program.weight(name).data_ptr()
            owner = next((n for n, w in weights.items() if 0 <= at - w.data_ptr() < w.nbytes), None)
            if owner is not None:
                found[name] = owner
        return Names(prefix, found)

    def __call__(self, name: str) -> str:
        """The name in the checkpoint; an unknown name loses its prefix."""
        return self.owners.get(name, name.removeprefix(self.prefix))

    def whole(self, name: str) -> bool:
        """Whether a name of the program is that of a weight as the checkpoint has it."""
        return self.owners.get(name) == name.removeprefix(self.prefix)


def layer_of(name: str) -> tuple[str, int] | None:
    """The list of layers that a weight or module lies in, by its path, and its place there."""
    found = _NUMBER.match(name)
    return (found[1], int(found[2])) if found else None


def read_names(program: Program) -> set[str]:
    """The names of the parameters and buffers that a program reads."""
    return {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
