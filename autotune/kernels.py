"""Tunes kernels for a target, at the sizes of their examples: where shipped defaults come from.

    python -m attnopt.autotune.kernels --target h100 [--kernel NAME] [--write]
    python -m attnopt.autotune.kernels --target all --rows docs/kernels.json --write

On the device that the target names, tile sizes are timed, and kept in the user's cache, where
dispatch on that device finds them; elsewhere only defaults that do not fit the target are mended,
by a static score, and said to be estimated. `--write` puts what was found into
`codegen/tuned/<target>.json`: what was measured, what was mended, and a record of the defaults that
fit, with what they take of the target. The second form compiles and times nothing: it makes these
records of all targets from the rows that `python -m attnopt.codegen.table --out docs/kernels.md`
keeps fresh.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from attnopt.autotune.kernel_cache import KernelCache
from attnopt.autotune.kernel_device import Device, gpu_here
from attnopt.autotune.kernel_search import TRIALS
from attnopt.autotune.kernel_tuner import Tuned, told, tune
from attnopt.autotune.recorded import TABLE, recorded, undated
from attnopt.autotune.timing import Progress
from attnopt.codegen.kernel import Kernel, kernels
from attnopt.codegen.shipped import Entry, bucket, entries, kind, written
from attnopt.codegen.table import load_on, planned, read
from attnopt.codegen.target import Target, known, target
from attnopt.compiler.errors import Problem
from attnopt.compiler.whole_file import write_whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune as the arguments say, and print what came of it; gives the exit code."""
    asked = _parser().parse_args(arguments)
    try:
        return _run(asked)
    except Problem as problem:
        print(problem, file=sys.stderr)
        return problem.exit_code


def _run(asked: argparse.Namespace) -> int:
    if asked.rows is not None:
        return _record(asked)
    wanted = target(asked.target)
    device = None if asked.estimate else gpu_here()
    if device is not None and device.misfit(wanted):
        print(f"{device.name} is not {wanted.title}: {device.misfit(wanted)}; nothing is timed")
        device = None
    found: list[Entry] = []
    failed = 0
    for cls in _kernels(asked.kernel):
        for spec, example in cls.examples():
            load = load_on(example, wanted)
            try:
                made = tune(
                    cls, spec, load, wanted, device, trials=asked.trials, seconds=asked.seconds,
                    seed=asked.seed, progress=_progress(),
                )  # fmt: skip
            except Problem as problem:
                if problem.code != "A838":
                    raise
                print(f"{cls.name} on {wanted.name}\n{problem}", flush=True)
                failed += 1
                continue
            print("\n".join(told(made)), flush=True)
            if made.evidence == "measured" and device is not None:
                _keep(made, cls, spec, wanted, device)
            found.append(entry(made, spec))
    if asked.write and found:
        print(f"written: {write(wanted, found)}")
    return 1 if failed else 0


def _record(asked: argparse.Namespace) -> int:
    """Records of defaults, from rows that were compiled before. Gives 1 where a default does not
    fit, or where the rows are of other defaults."""
    every = [name for name in known() if not target(name).measured]
    names = every if asked.target == "all" else [target(asked.target).name]
    chosen = [cls.name for cls in _kernels(asked.kernel)]
    made = [row for row in read(asked.rows) if row.kernel in chosen and row.target in names]
    wanted = {row.place: (row.digest, row.tiles) for row in planned(chosen, names)}
    if {row.place: (row.digest, row.tiles) for row in made} != wanted:
        print(f"{asked.rows} is not of the kernels as they are: run first {TABLE}")
        return 1
    for row in made:
        if row.bad:
            print(f"{row.kernel}, example {row.example + 1}, {row.target}: {row.bad}; mend it by "
                  f"--target {row.target} --kernel {row.kernel} --write")  # fmt: skip
    for name in names:
        found = recorded(row for row in made if row.target == name)
        print(f"{name}: {len(found)} defaults, estimated")
        if asked.write:
            write(target(name), found, afresh=tuple(chosen))
    return int(any(row.bad for row in made))


def _keep(made: Tuned, cls: type[Kernel[Any]], spec: Any, wanted: Target, device: Device) -> None:
    """Into the user's cache; where that cannot be written, the result is still worth having."""
    try:
        KernelCache().put(made, cls, spec, wanted, device)
    except Problem as problem:
        print(problem, flush=True)


def entry(tuned: Tuned, spec: Any) -> Entry:
    """What is committed of a result."""
    ratio = None
    if tuned.ratio is not None:
        interval = tuned.ratio.interval
        ratio = {
            "value": interval.value, "low": interval.low, "high": interval.high,
            "rounds": tuned.ratio.rounds,
        }  # fmt: skip
    obtained = {
        "command": f"python -m attnopt.autotune.kernels --target {tuned.target} "
        f"--kernel {tuned.kernel} --seed {tuned.seed}",
        "date": tuned.date, "device": tuned.device, "driver": tuned.driver, **tuned.versions,
        "tried": tuned.tried, "default": dict(tuned.default), "over_default": ratio,
        "took": [{k: t[k] for k in ("registers", "spills", "shared")} for t in tuned.took],
    }  # fmt: skip
    return Entry(
        tuned.kernel, dict(tuned.tiles), tuned.spec, kind(spec), tuned.load, tuned.evidence,
        tuned.why, {k: v for k, v in obtained.items() if v not in ("", None)},
        taken=tuned.evidence == "measured" or tuned.changed,
    )  # fmt: skip


def write(wanted: Target, found: Sequence[Entry], afresh: Sequence[str] = ()) -> Path:
    """Put entries into the target's file in place of those for the same kernel, kind of spec and
    bucket, and of all records of the kernels that are `afresh`. What was measured is replaced only
    by what is measured, and what differs in its date alone stays."""
    path = Path(str(files("attnopt.codegen.tuned") / f"{wanted.name}.json"))
    before = {_place(old): old for old in entries(wanted.name)}
    kept = {k: old for k, old in before.items() if old.taken or old.kernel not in afresh}
    for new in found:
        old = before.get(_place(new))
        if old is not None and undated(old) == undated(new):
            kept[_place(new)] = old
        elif old is None or new.evidence == "measured" or old.evidence != "measured":
            kept[_place(new)] = new
    write_whole(path, written(wanted.name, tuple(kept.values())))
    entries.cache_clear()
    return path


def _place(item: Entry) -> tuple[Any, ...]:
    return item.kernel, item.kind, bucket(item.load)


def _kernels(name: str | None) -> list[type[Kernel[Any]]]:
    there = kernels()
    if name is None:
        return list(there.values())
    if name not in there:
        raise Problem("A802", f"unknown kernel `{name}`", help=f"known: {', '.join(sorted(there))}")
    return [there[name]]


def _progress() -> Progress | None:
    """Tells progress on a terminal, in one line."""
    if not sys.stderr.isatty():
        return None

    def show(what: str, share: float) -> None:
        print(f"\r{what} {share:.0%}\x1b[K", end="", file=sys.stderr, flush=True)

    return show


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        "python -m attnopt.autotune.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--target", required=True, help="a known GPU or a TOML file; all, with --rows"
    )
    made.add_argument("--rows", type=Path, help="record defaults by this file of the table's rows")
    made.add_argument("--kernel", help="one kernel; all where none is named")
    made.add_argument("--trials", type=int, default=TRIALS, help="tile sizes to compile, at most")
    made.add_argument("--seconds", type=float, default=300.0, help="time for each example")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--estimate", action="store_true", help="time nothing, even on the device")
    made.add_argument("--write", action="store_true", help="write codegen/tuned/TARGET.json")
    return made


if __name__ == "__main__":
    sys.exit(main())
