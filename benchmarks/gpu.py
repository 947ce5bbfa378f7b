"""One command on a machine with a GPU: every kernel is checked, then timed against its peers.

python benchmarks/gpu.py [--only dense,decode] [--check-only] [--rounds 30] [--out FOLDER]
python benchmarks/gpu.py --estimate h100        without a GPU: what the roofline promises

Prints a table and writes `gpu-<target>.json` with device, versions, date and all samples. Nothing
is timed that a red check covers. Needs torch with CUDA, triton and networkx; flash-linear-attention
and FlashInfer are used where they are installed.
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
from typing import Any

ROOT = Path(__file__).parent
if not __package__:  # run as a file
    sys.path.insert(0, str(ROOT.parent))

import torch  # noqa: E402

from attnopt.autotune.environment import environment  # noqa: E402
from attnopt.codegen.kernel import kernels  # noqa: E402
from attnopt.codegen.shipped import chosen  # noqa: E402
from attnopt.codegen.target import Target, at_hand, target  # noqa: E402
from benchmarks.gpu_case import Case, Outcome, measure  # noqa: E402
from benchmarks.gpu_cases import cases  # noqa: E402
from benchmarks.gpu_check import check_all, check_gradients  # noqa: E402
from benchmarks.gpu_overhead import host_path  # noqa: E402
from benchmarks.gpu_timing import Times, cuda_clock  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1: a check is red or a bar missed; 2: no GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="lines whose name holds one of these words")
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--estimate", default="", metavar="TARGET")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    chosen = parser.parse_args(arguments)
    words = [word for word in chosen.only.split(",") if word]
    lines = [c for c in cases() if not words or any(word in c.name for word in words)]
    if not lines:
        parser.error(f"no line holds {chosen.only}")
    if chosen.estimate:
        return _estimated(lines, target(chosen.estimate))
    if not torch.cuda.is_available():
        print("no GPU that torch can use; --estimate h100 tells what the roofline promises")
        return 2
    return _measured(lines, at_hand(), chosen)


def _estimated(lines: list[Case], device: Target) -> int:
    print(f"estimated by the roofline of {device.title}, not measured")
    for case in lines:
        work, seconds = case.estimate(device)
        if seconds is None:
            print(f"  {case.name:45} {device.title} has no peaks to estimate by")
            continue
        rates = f"{work.flops / seconds / 1e12:7.1f} TFLOP/s {work.bytes / seconds / 1e9:7.0f} GB/s"
        print(f"  {case.name:45} {seconds * 1e3:9.3f} ms {rates}  estimated")
    return 0


def _measured(lines: list[Case], device: Target, chosen: argparse.Namespace) -> int:
    red, document = _checked(device, tuple({case.kernel for case in lines}))
    document["host_path"] = host_path(device)
    missed = bool(red) or document["host_path"]["wrong"]
    _write(chosen.out, device, document)
    if chosen.check_only:
        return int(missed)
    bandwidth = _copy_bandwidth()
    document |= {"copy_bandwidth": bandwidth, "rows": []}
    print(f"{device.title}: {bandwidth / 1e12:.2f} TB/s copied")
    for case in lines:
        if case.kernel in red:
            print(f"{case.name}: not timed, {case.kernel} is wrong")
            continue
        begun = time.perf_counter()
        taken, outcomes, absent = measure(case, device, bandwidth, rounds=chosen.rounds)
        document["rows"].append(_row(case, device, taken, outcomes, absent))
        _write(chosen.out, device, document)
        _print(case, taken, outcomes, absent, time.perf_counter() - begun)
        missed |= any(outcome.met is False for outcome in outcomes)
        torch.cuda.empty_cache()
    return int(missed)


def _checked(device: Target, names: tuple[str, ...]) -> tuple[set[str], dict[str, Any]]:
    """Which of the named kernels (and of those that they launch, and of their gradients') are
    wrong, and the document's head."""
    red: set[str] = set()
    errors: dict[str, float] = {}
    named = {*names, "flash_prefill", "split_decode"}
    named |= {f"{name}_backward" for name in named} & set(kernels())
    for found in chain(check_all(device, names=tuple(named)), check_gradients(device)):
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
    facts = {"target": device.name, "date": date.today().isoformat(), "environment": environment()}
    return red, {**facts, "errors": errors, "red": sorted(red)}


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
        "estimated_seconds": case.estimate(device)[1],
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
        said = {True: "met", False: "MISSED", None: "not measured"}[outcome.met]
        value = "" if outcome.value is None else f" {outcome.value:.3g}"
        print(f"    {outcome.bar.words}:{value} {said}", flush=True)
    for name, reason in absent.items():
        print(f"    without {name}: {reason}")


if __name__ == "__main__":
    raise SystemExit(main())
