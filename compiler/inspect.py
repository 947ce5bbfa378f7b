"""`inspect`: what the attentions of a model are, where they stand in its source, and what they
cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from attnopt.autotune.data import as_batch
from attnopt.autotune.diagnose import calibration
from attnopt.autotune.entries import facts
from attnopt.autotune.record import dump
from attnopt.autotune.request import Wanted
from attnopt.compiler.cost import Cost, cost
from attnopt.compiler.decode.phase_cost import Decoding, decoding_or_why
from attnopt.compiler.diagnostics.diagnose import diagnose as diagnosed
from attnopt.compiler.diagnostics.diagnosis import Diagnosis
from attnopt.compiler.intake.loaded import Loaded, describe
from attnopt.compiler.intake.source import evaluating, from_module, load
from attnopt.compiler.pipeline import read
from attnopt.compiler.profile import Profile, profile
from attnopt.compiler.program import Batch, Program
from attnopt.compiler.site import Site, Sublayer, Unraised

Progress = Callable[[str, float], None]
REPEATS = 3
_FACTS = (
    "heads", "kv_heads", "head_dim", "v_dim", "scale", "mask", "mask_certainty", "position",
    "qk_norm", "exactness", "spelling", "spec", "parameters", "flops_share", "time_share",
)  # fmt: skip


@dataclass(frozen=True)
class Inspection:
    """What a model's attentions are. `program` is the raised program that the rows were read off.

    `seconds` is the measured time of one call on the inputs, None where it was not measured.
    `decoding` is what decoding with a cache costs, or why the model cannot be decoded with one.
    """

    program: Program
    sites: tuple[dict[str, Any], ...]
    sublayers: tuple[dict[str, Any], ...]
    inputs: str
    parameters: int
    flops: float
    seconds: float | None = None
    notes: tuple[str, ...] = ()
    diagnostics: Diagnosis | None = None
    decoding: Decoding | str = ""

    @property
    def raised(self) -> int:
        """How many of the attentions were understood."""
        return sum(bool(row["raised"]) for row in self.sites)

    def as_json(self) -> dict[str, Any]:
        """The inspection as a JSON object; every row of `sites` has the same keys."""
        return {
            "model": self.program.name,
            "inputs": self.inputs,
            "sites": list(self.sites),
            "found": len(self.sites),
            "raised": self.raised,
            "sublayers": list(self.sublayers),
            "parameters": self.parameters,
            "flops": {"value": self.flops, "kind": "counted"},
            "seconds": None
            if self.seconds is None
            else {"value": self.seconds, "kind": "measured"},
            "notes": list(self.notes),
            "diagnostics": None if self.diagnostics is None else dump(self.diagnostics),
            "decoding": {"why_not": self.decoding}
            if isinstance(self.decoding, str)
            else dump(self.decoding),
        }


def inspect(
    model: str | Path | nn.Module,
    example_inputs: Any = None,
    *,
    time: bool = True,
    diagnose: bool = False,
    inputs: str | Path | None = None,
    text: str | Path | None = None,
    batch: int | None = None,
    length: int | None = None,
    allow_globals: Sequence[str] = (),
    trust: bool = False,
    attention: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Read, trace and raise a model, and say what was found. `time` measures where the time goes,
    `diagnose` what the heads do on data: the text or tensors given, or what lies beside the model.

    `model` is a file, a directory, `module:callable`, or a module with `example_inputs`. A model
    without weights is inspected too, and not timed. Raises `Problem` as reading and tracing do.
    """
    say = progress or (lambda what, share: None)
    say("reading the model", 0.0)
    with evaluating(model):
        if isinstance(model, nn.Module):
            loaded = from_module(model, example_inputs)
        else:
            loaded = load(
                str(model), inputs=_path(inputs), text=_path(text), batch=batch, length=length,
                allow_globals=allow_globals, trust=trust, attention=attention, dtype=dtype,
            )  # fmt: skip
        batches: tuple[Batch, ...] = ()
        if diagnose and isinstance(model, nn.Module):
            batches = (as_batch(loaded.args, loaded.kwargs),)
        elif diagnose:
            wanted = Wanted(_path(text), None, _path(inputs), batch, length)
            batches = calibration(loaded, wanted, str(model))
        return inspect_loaded(loaded, time=time, batches=batches, progress=say)


def inspect_loaded(
    loaded: Loaded, *, time: bool = True, batches: Sequence[Batch] = (), progress: Progress
) -> Inspection:
    """Inspect a model that was read; see `inspect`. `batches` are what to diagnose it on."""
    progress("tracing", 0.2)
    program = read(loaded)
    progress("counting", 0.6)
    counted = cost(program)
    measured = None
    if time and loaded.weights == "real":
        measured = profile(program, repeats=REPEATS, progress=progress)
    rows = [_site(site, counted, measured) for site in program.sites]
    rows += [_unraised(f"u{i}", found) for i, found in enumerate(program.unraised)]
    fixed = tuple(f"{words} in this trace" for words in program.fixed)
    return Inspection(
        program,
        tuple(rows),
        tuple(_sublayer(layer, counted, measured) for layer in program.sublayers),
        describe(loaded.args, loaded.kwargs),
        counted.params,
        counted.flops,
        measured.call_s if measured else None,
        (*loaded.notes, *fixed),
        diagnosed(program, batches, progress=progress) if batches else None,
        decoding_or_why(program),
    )


def _site(site: Site, counted: Cost, measured: Profile | None) -> dict[str, Any]:
    known = facts(site, counted, measured)
    known["parameters"] = known.pop("params", None)
    return {
        **_place(site.id, site.module, site.source, True),
        **{name: known.get(name) for name in _FACTS},
        "missing": dict(site.missing),
    }


def _unraised(id: str, found: Unraised) -> dict[str, Any]:
    return {
        **_place(id, found.module, found.source, False),
        "reason": found.reason,
        "node": found.node,
        "help": found.help,
        **dict.fromkeys(_FACTS),
        "missing": {},
    }


def _place(id: str, module: str, source: str, raised: bool) -> dict[str, Any]:
    named = {"id": id, "module": module, "source": source, "raised": raised}
    return {**named, "reason": "", "node": "", "help": ""}


def _sublayer(layer: Sublayer, counted: Cost, measured: Profile | None) -> dict[str, Any]:
    share = counted.sublayer_flops.get(layer.id, 0.0) / counted.flops if counted.flops else 0.0
    return {
        "id": layer.id,
        "kind": layer.kind,
        "block": layer.block,
        "module": layer.module,
        "sites": list(layer.sites),
        "parameters": counted.sublayer_params.get(layer.id, 0),
        "flops_share": share,
        "time_share": measured.share(layer.id) if measured else None,
    }


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value)
