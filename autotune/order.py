"""The order in which passes run, from what each says it comes after."""

from __future__ import annotations

from collections.abc import Collection
from graphlib import TopologicalSorter

from attnopt.compiler.contract import Exactness, Pass, passes
from attnopt.compiler.plan import Plan, Step


def ordered() -> list[type[Pass]]:
    """All known passes, each after those it names in `after`, healing ones after all approximate
    ones; ties by name."""
    known = passes()
    broken = [
        name
        for name, kind in sorted(known.items())
        if kind.exactness is Exactness.APPROXIMATE and not kind.heals
    ]
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for name in sorted(known):
        sorter.add(name, *(other for other in known[name].after if other in known))
        if known[name].heals:
            sorter.add(name, *broken)
    return [known[name] for name in sorter.static_order()]


def compose(steps: list[Step], without: Collection[str] = ()) -> Plan:
    """A plan of these steps and of every exact and guarded pass that is not in `without`, all in
    the order of `ordered`."""
    names = [kind.name for kind in ordered()]
    left = {step.rewrite.partition("{")[0] for step in steps} | set(without)
    chosen = list(steps)
    chosen += [
        Step(kind().text)
        for kind in ordered()
        if kind.exactness is not Exactness.APPROXIMATE and kind.name not in left
    ]
    return Plan(tuple(sorted(chosen, key=lambda step: names.index(step.rewrite.partition("{")[0]))))


def approximate() -> list[type[Pass]]:
    """The passes that trade accuracy for speed, healing ones left out."""
    return [k for k in ordered() if k.exactness is Exactness.APPROXIMATE and not k.heals]


def healing() -> list[type[Pass]]:
    """The passes that repair what approximate ones did, as far as the search may make them."""
    return [kind for kind in ordered() if kind.heals and not kind.asked]
