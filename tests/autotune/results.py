"""Results made up for tests of what is said about them; no figure here was measured."""

from __future__ import annotations

from attnopt.autotune.result import (
    AccuracyEntry,
    Ceiling,
    Number,
    Refit,
    Relaxation,
    Result,
    Sensitivity,
    SiteEntry,
    Speed,
    SublayerEntry,
    Timed,
    Trial,
    Workload,
)
from attnopt.compiler.decode.phase_cost import Decoding, Phase, SitePhases
from attnopt.compiler.diagnostics.diagnosis import Diagnosis, SiteDiagnosis, SublayerDiagnosis
from attnopt.compiler.plan import Outcome, Plan, Step

NASTY = "<script>alert('x')</script> & | ` \"quoted\""
_LAYERS = 6


def number(value: float, around: float = 0.0, unit: str = "") -> Number:
    """A measured number, with an interval of plus or minus `around` of it."""
    ends = (value - abs(value) * around, value + abs(value) * around) if around else (None, None)
    return Number(value, "measured", *ends, unit=unit)


def least() -> Result:
    """A result with nothing but what it must have."""
    return Result("model", Workload(1, 16), "cpu", None, 0.0, True, Plan())


def full(text: str = "pylm", *, met: bool = False) -> Result:
    """A result that has something in every field; `text` stands wherever the user's text can."""
    windows = Outcome("sliding_window{left=64}", "s0", "approximate", True, note="kept 64 keys")
    misses = [
        Outcome("fold_repeated_kv{}", f"s{i}", "exact", False, text, "view_3", "nothing to mend")
        for i in range(_LAYERS)
    ]
    return Result(
        model=text,
        workload=Workload(4, 1024, 0.35, text),
        target="cpu",
        budget=2.0,
        max_drop=0.01,
        met=met,
        plan=Plan(
            (
                Step("fuse_attention{}"),
                Step("merge_kv_heads{kv_heads=2}", tuple(f"s{i}" for i in range(4))),
                Step("skip_sublayers{}", ("b2.attention", "b5.mlp")),
            )
        ),
        environment={"cpu": text, "threads": 2, "isa": ["avx2", "avx512f"], "torch": "2.13.0"},
        baselines=(
            Timed("eager", "measured", number(0.412, 0.03, "s"), 31),
            Timed("torch.compile", "measured", number(0.365, 0.04, "s"), 31),
        ),
        optimized=Timed("optimized", "measured", number(0.231, 0.02, "s"), 31),
        speed=Speed(
            {"eager": number(1.78, 0.03), "torch.compile": number(1.58, 0.04)},
            "torch.compile",
            "faster",
        ),
        accuracy=AccuracyEntry(
            "perplexity",
            Number(0.0042, "measured", 0.0031, 0.0056),
            0.01,
            "pass",
            "near-lossless",
            number(3.912),
            number(3.928),
            {"KL divergence": number(0.0061, unit="nats/token"), "top-1 agreement": number(0.985)},
            120,
            122_880,
            text,
        ),
        ceiling=Ceiling("attention", number(0.41, 0.05), number(1.69, 0.05)),
        ceilings=(Ceiling("unpad", number(0.65), number(2.86), text),),
        sites=(
            *(
                SiteEntry(
                    f"s{i}",
                    f"model.layers.{i}.self_attn",
                    "modeling_llama.py:257",
                    True,
                    facts={
                        "heads": 8,
                        "kv_heads": 8,
                        "head_dim": 32,
                        "scale": 0.1768,
                        "mask": "causal",
                        "position": "rotary",
                    },
                    applied=("fuse_attention{}", "merge_kv_heads{kv_heads=2}")[: 1 + (i < 4)],
                    refused=(misses[i],),
                )
                for i in range(_LAYERS)
            ),
            SiteEntry("u0", text, text, False, f"not understood: {text}", "softmax_7", "see help"),
        ),
        sublayers=(SublayerEntry("b2.attention", "attention", 2, text, ("skip_sublayers{}",)),),
        outcomes=(windows, *misses),
        sensitivities=tuple(
            Sensitivity(
                rewrite,
                f"{kind}{i}{part}",
                number(0.0004 * (1 + (7 * i) % 5) * size, 0.2),
            )
            for rewrite, kind, part, size in (
                ("merge_kv_heads{kv_heads=2}", "s", "", 1),
                ("sliding_window{left=64 sink=4}", "s", "", 4),
                ("skip_sublayers{}", "b", ".attention", 6),
                ("skip_sublayers{}", "b", ".mlp", 11),
            )
            for i in range(_LAYERS)
        ),
        trials=tuple(
            Trial(
                i,
                f"merge_kv_heads{{kv_heads={8 - i % 7}}} {text}",
                i % 5 != 4,
                number(1.0 + 0.06 * i),
                number(0.0007 * i * (1 + (i * 5) % 3)),
                "fast",
                front=i in (0, 3, 6, 9),
                chosen=i == 9,
            )
            for i in range(14)
        ),
        relaxation=None if met else Relaxation(f"--budget 1.55x, {text}", budget=1.55),
        refits=(Refit("s0.out", 0.081, 0.034, True), Refit(text, 0.052, 0.055, False)),
        diagnostics=Diagnosis(
            (
                SiteDiagnosis(
                    "s0",
                    text,
                    2,
                    1,
                    8,
                    40,
                    {"entropy": (0.25, 1.5), "kv_rank": (3.0,)},
                    {"qk": ((0.8, 0.6), (1.0, 0.0))},
                    {"maps": ((1.0, 0.5), (0.5, 1.0))},
                    {"kv_rank": 3.5},
                    {"retrieval": text},
                ),
            ),
            (SublayerDiagnosis("b0.mlp", "mlp", 0, text, None, 0, text),),
            (4, 8),
            notes=(text,),
        ),
        decoding={"before": _decoding(1), "after": _decoding(4)},
        warnings=(text,),
        data={"evaluation": text},
        command=f"optimize {text} --target cpu --budget 2x --max-drop 1%",
        seed=3,
        seconds=412.0,
        model_sha256="0" * 64,
    )


def _decoding(share: int) -> Decoding:
    """What decoding costs with one part in `share` of the cache."""
    step = Phase(8e6, 1e7 / share)
    site = SitePhases("s0", Phase(8e9, 2e7), step, 2048 // share, (2 << 20) // share)
    return Decoding(4, 1024, 1024, (site,), 12_000_000, (8 << 20) // share)
