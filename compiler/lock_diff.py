"""What became of the attentions of a lock: lost, weaker, different, moved or gained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from attnopt.compiler.lock import FACTS, OPTIONS, Lock, Locked

Kind = Literal["lost", "weaker", "different", "moved", "gained"]
_FAILS: tuple[Kind, ...] = ("lost", "weaker", "different")
# The weakest first; a value that is in no list is as strong as another.
_STRENGTH: Mapping[str, tuple[Any, ...]] = {
    "mask_certainty": ("observed", "guarded", "proved"),
    "exactness": ("guarded", "exact"),
}
_WEAKEST = {"mask": "tensor", "position": "unknown"}  # everything else is stronger


@dataclass(frozen=True)
class Change:
    """One thing that is not as the lock has it. `fact` is empty where the whole attention is
    meant."""

    kind: Kind
    module: str
    what: str
    fact: str = ""
    was: Any = None
    now: Any = None

    @property
    def fails(self) -> bool:
        """Whether the lock does not hold any more."""
        return self.kind in _FAILS

    def as_json(self) -> dict[str, Any]:
        """The change as a JSON object."""
        return {
            "kind": self.kind, "module": self.module, "what": self.what, "fact": self.fact,
            "was": self.was, "now": self.now,
        }  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """Every change from one lock to another, and what changed around them: `versions` by library,
    with None where there was none; `notes` are sentences."""

    changes: tuple[Change, ...]
    versions: Mapping[str, tuple[str | None, str | None]]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing was lost, weaker or different."""
        return not any(change.fails for change in self.changes)

    def as_json(self) -> dict[str, Any]:
        """The difference as a JSON object."""
        return {
            "ok": self.ok, "changes": [change.as_json() for change in self.changes],
            "versions": {name: {"was": a, "now": b} for name, (a, b) in self.versions.items()},
            "notes": list(self.notes),
        }  # fmt: skip


def difference(then: Lock, now: Lock) -> Difference:
    """What became of the attentions of a lock. Where a module is called more than once, its
    attentions are compared in their order."""
    before, after = _named(then.sites), _named(now.sites)
    gone = {name: site for name, site in before.items() if name not in after}
    fresh = {name: site for name, site in after.items() if name not in before}
    changes = [c for name in before if name in after for c in _changes(before[name], after[name])]
    changes += _moved(gone, fresh)
    changes += [
        Change("lost", site.module, "lost: no attention was found there any more")
        for site in gone.values()
        if site.raised
    ]
    changes += [_new(site) for site in fresh.values()]
    return Difference(tuple(changes), _versions(then, now), tuple(_notes(then, now)))


def _named(sites: Iterable[Locked]) -> dict[tuple[str, int], Locked]:
    """The attentions by their module's path, and their number among those of that path."""
    made: dict[tuple[str, int], Locked] = {}
    for site in sites:
        number = sum(module == site.module for module, _ in made)
        made[site.module, number] = site
    return made


def _changes(was: Locked, now: Locked) -> Iterator[Change]:
    """What is not the same of one attention."""
    if was.raised and not now.raised:
        what = f"no longer understood: {now.reason}"
        yield Change("lost", was.module, what, "raised", True, False)
        return
    if not was.raised:
        if now.raised:
            yield Change("gained", was.module, "understood now", "raised", False, True)
        return
    for name in FACTS:
        before, after = was.facts[name], now.facts[name]
        if before != after:
            kind = _compared(name, before, after)
            yield Change(kind, was.module, f"{name} was {before}, is {after}", name, before, after)
    for name in sorted(now.missing.keys() - was.missing.keys()):
        what = f"{name} is not found any more: {now.missing[name]}"
        yield Change("weaker", was.module, what, name, None, now.missing[name])
    for name in sorted(was.missing.keys() - now.missing.keys()):
        yield Change("gained", was.module, f"{name} is found now", name, was.missing[name], None)


def _compared(name: str, was: Any, now: Any) -> Kind:
    """Whether another value of a fact is a weaker one, a stronger one, or just another."""
    order = _STRENGTH.get(name, ())
    if was in order and now in order:
        return "weaker" if order.index(now) < order.index(was) else "gained"
    weakest = _WEAKEST.get(name)
    if weakest is not None and weakest in (was, now):
        return "weaker" if now == weakest else "gained"
    return "different"


def _moved(
    gone: dict[tuple[str, int], Locked], fresh: dict[tuple[str, int], Locked]
) -> Iterator[Change]:
    """Attentions that are there under another path with the same facts; they are taken out of both
    tables."""
    for name, site in list(gone.items()):
        same = next((n for n, new in fresh.items() if new.fingerprint == site.fingerprint), None)
        if same is not None and site.raised:
            what = f"goes by {fresh[same].module} now, with the same facts"
            yield Change("moved", site.module, what)
            del gone[name], fresh[same]


def _new(site: Locked) -> Change:
    if site.raised:
        return Change("gained", site.module, "new, and understood")
    return Change("gained", site.module, f"new, and left alone: {site.reason}")


def _versions(then: Lock, now: Lock) -> dict[str, tuple[str | None, str | None]]:
    names = dict.fromkeys((*then.versions, *now.versions))
    both = {name: (then.versions.get(name), now.versions.get(name)) for name in names}
    return {name: pair for name, pair in both.items() if pair[0] != pair[1]}


def _notes(then: Lock, now: Lock) -> Iterator[str]:
    """What else is not as it was, and may be the reason."""
    for name in ("name", "inputs", "parameters"):
        was, is_ = then.model.get(name), now.model.get(name)
        if was != is_:
            yield f"the model's {name}: {was} in the lock, {is_} now"
    for name in OPTIONS:
        was, is_ = then.options.get(name), now.options.get(name)
        if was != is_:
            yield f"--{name}: {was or 'left out'} in the lock, {is_ or 'left out'} now"
