"""One command on a machine with a GPU: every kernel is checked, then timed against its peers.

python benchmarks/gpu.py [--only dense,decode] [--check-only] [--seed 1] [--out FOLDER]
python benchmarks/gpu.py --estimate h100 [--out FOLDER]   without a GPU: what the roofline promises

Every kernel is checked on its examples at odd lengths and on random specs and sizes (the seed is
printed). Then it prints a table and writes `gpu-<target>.json` with device, versions, date and all
samples. Nothing is timed that a red check covers. At the end what `attnopt codegen` ships is run:
modules without attnopt, binaries by the driver, a package of AOTInductor. Needs torch with CUDA,
triton and networkx; flash-linear-attention, FlashInfer and FlashMLA are used where they are
installed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from datetime import date
from itertools import chain
from pathlib import Path
from random import SystemRandom
from typing import Any

ROOT = Path(__file__).parent
if not __package__:  # run as a file
    sys.path.insert(0, str(ROOT.parent))

import torch  # noqa: E402

from attnopt.autotune.environment import environment  # noqa: E402
from attnopt.codegen.kernel import kernels  # noqa: E402
from attnopt.codegen.shipped import chosen  # noqa: E402
from attnopt.codegen.target import Target, at_hand, target  # noqa: E402
from attnopt.compiler.errors import Problem  # noqa: E402
from benchmarks.gpu_case import Case, Outcome, measure  # noqa: E402
from benchmarks.gpu_cases import cases  # noqa: E402
from benchmarks.gpu_check import check_all, check_gradients, check_random  # noqa: E402
from benchmarks.gpu_estimate import lines as estimated_lines  # noqa: E402
from benchmarks.gpu_estimate import page  # noqa: E402
from benchmarks.gpu_overhead import host_path  # noqa: E402
from benchmarks.gpu_shipped import check_shipped  # noqa: E402
from benchmarks.gpu_timing import Times, cuda_clock  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1: a check is red or a bar missed; 2: no GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="lines whose name holds one of these words")
    parser.add_argument("--check-only", action="store_true", help="time nothing")
    parser.add_argument("--seed", type=int, help="of the random specs and sizes; drawn, and told")
    parser.add_argument("--draws", type=int, default=16, help="random specs for each kernel")
    parser.add_argument("--estimate", default="", metavar="TARGET", help="needs no GPU")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, help=f"folder of what is written: {ROOT.name}/results")
    asked = parser.parse_args(arguments)
    words = [word for word in asked.only.split(",") if word]
    lines = [c for c in cases() if not words or any(word in c.name for word in words)]
    if not lines:
        parser.error(f"no line holds {asked.only}")
    if asked.estimate:
        try:
            device = target(asked.estimate)
        except Problem as problem:
            parser.error(str(problem))
        if device.measured:
            parser.error("a CPU is measured; name a GPU, such as --estimate h100")
        return _estimated(lines, device, asked.out)
    if not torch.cuda.is_available():
        print("no GPU that torch can use; --estimate h100 tells what the roofline promises")
        return 2
    asked.seed = SystemRandom().randrange(10**6) if asked.seed is None else asked.seed
    asked.out = asked.out or ROOT / "results"
    return _measured(lines, at_hand(), asked)


def _estimated(lines: list[Case], device: Target, folder: Path | None) -> int:
    print("\n".join(estimated_lines(lines, device)))
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"gpu-{device.name}-estimated.md"
        path.write_text(page(lines, device), encoding="utf-8")
        print(f"written: {path}")
    return 0


def _measured(lines: list[Case], device: Target, asked: argparse.Namespace) -> int:
    only = _covered(lines) if asked.only else set(kernels())
    red, document = _checked(device, only, asked.seed, asked.draws)
    missed = bool(red)
    _write(asked.out, device, document)
    if asked.check_only:
        return int(_shipped(device, only, document, asked.out) or missed)
    if not red & {"flash_prefill", "split_decode", "merge_partials"}:
        document["host_path"] = host_path(device)
        missed |= document["host_path"]["wrong"]
    bandwidth = _copy_bandwidth()
    document |= {"copy_bandwidth": bandwidth, "rows": []}
    print(f"{device.title}: {bandwidth / 1e12:.2f} TB/s copied")
    for case in lines:
        if case.kernel in red:
            print(f"{case.name}: not timed, {case.kernel} is wrong")
            continue
        begun = time.perf_counter()
        taken, outcomes, absent = measure(case, device, bandwidth, rounds=asked.rounds)
        document["rows"].append(_row(case, device, taken, outcomes, absent))
        _write(asked.out, device, document)
        _print(case, taken, outcomes, absent, time.perf_counter() - begun)
        missed |= any(outcome.met is False for outcome in outcomes)
        torch.cuda.empty_cache()
    return int(_shipped(device, only, document, asked.out) or missed)


def _covered(lines: list[Case]) -> set[str]:
    """The kernels of these lines, those that they launch beside, and those of their gradients."""
    named = {case.kernel for case in lines} | {"flash_prefill", "split_decode", "merge_partials"}
    return named | ({f"{name}_backward" for name in named} & set(kernels()))


def _checked(
    device: Target, names: set[str], seed: int, draws: int
) -> tuple[set[str], dict[str, Any]]:
    """Which of the named kernels are wrong, and the document's head."""
    print(f"random specs and sizes by --seed {seed}", flush=True)
    red: set[str] = set()
    errors: dict[str, float] = {}
    only = tuple(names)
    gradients = check_gradients(device) if "flash_prefill_backward" in names else ()
    drawn = check_random(device, seed=seed, count=draws, names=only)
    for found in chain(check_all(device, names=only), drawn, gradients):
        if found.skipped:
            print(f"not checked: {found.kernel} {found.spec}: {found.skipped}", flush=True)
            continue
        errors[found.kernel] = max(errors.get(found.kernel, 0.0), found.error)
        if found.wrong:
            red.add(found.kernel)
            said = f"WRONG {found.kernel} {found.spec} {found.load}: {found.wrong}"
            print(said, flush=True)
    for name, error in errors.items():
        print(f"checked {name}: relative error at most {error:.1e}{' RED' if name in red else ''}")
    for name in sorted(names - set(errors)):
        print(f"NOT CHECKED {name}: nothing of it runs here")
    facts = {
        "target": device.name, "date": date.today().isoformat(), "environment": environment(),
        "seed": seed, "draws": draws,
    }  # fmt: skip
    return red, {**facts, "errors": errors, "red": sorted(red)}


def _shipped(device: Target, names: set[str], document: dict[str, Any], folder: Path) -> bool:
    """Whether something that `attnopt codegen` ships is wrong. Checked at the end: a launch by the
    driver that fails takes the process's context with it."""
    document["shipped"] = []
    for found in check_shipped(device, tuple(sorted(names))):
        document["shipped"].append(asdict(found))
        said = found.wrong or found.skipped or f"relative error {found.error:.1e}"
        state = "WRONG" if found.wrong else "not checked:" if found.skipped else "checked"
        print(f"{state} {found.kernel} {found.spec}: {said}", flush=True)
        _write(folder, device, document)
    return any(found["wrong"] for found in document["shipped"])


def _copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large copy on the device; the best of ten."""
    large = torch.randn(1 << 29, device="cuda")
    other = torch.empty_like(large)
    best = min(cuda_clock(lambda: other.copy_(large)) for _ in range(10))
    return 2 * large.nbytes / best


def _row(
    case: Case, device: Target, taken: Times, outcomes: list[Outcome], absent: dict[str, str]
) -> dict[str, Any]:
    return {
        "case": case.name, "kernel": chosen(case.cls, case.spec, device, case.load).text,
        "spec": case.spec.text, "load": asdict(case.load), "work": asdict(case.work()),
        "estimated_seconds": case.estimates(device),
        "median_seconds": {name: taken.median(name) for name in taken.samples},
        "samples": {name: list(samples) for name, samples in taken.samples.items()},
        "bars": [
            {"bar": o.bar.words, "value": o.value, "spread": o.spread, "met": o.met}
            for o in outcomes
        ],
        "absent": absent,
    }  # fmt: skip


def _write(folder: Path, device: Target, document: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"gpu-{device.name.replace(' ', '-')}.json"
    path.write_text(json.dumps(document, indent=1, default=str) + "\n", encoding="utf-8")


def _print(
    case: Case, taken: Times, outcomes: list[Outcome], absent: dict[str, str], seconds: float
) -> None:
    medians = ", ".join(f"{name} {taken.median(name) * 1e3:.3f} ms" for name in taken.samples)
    print(f"{case.name}: {medians} ({seconds:.0f} s)")
    for outcome in outcomes:
        absent_peer = "not measured" if outcome.value is None else "told, no bar"
        said = {True: "met", False: "MISSED", None: absent_peer}[outcome.met]
        value = "" if outcome.value is None else f" {outcome.value:.3g}"
        print(f"    {outcome.bar.words}:{value} {said}", flush=True)
    for name, reason in absent.items():
        print(f"    without {name}: {reason}")


if __name__ == "__main__":
    raise SystemExit(main())
