"""Tile sizes that ship: all of them are possible, and which are taken where."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from attnopt.autotune import kernels as command
from attnopt.autotune import recorded
from attnopt.autotune.kernel_tuner import Tuned, spec_text, tiles_of
from attnopt.autotune.recorded import COMMAND, TABLE, stale
from attnopt.autotune.statistics import Interval
from attnopt.autotune.timing import Ratio
from attnopt.codegen import shipped
from attnopt.codegen.kernel import Load, kernels
from attnopt.codegen.kernels.flash_prefill import FlashPrefill
from attnopt.codegen.shipped import Entry, bucket, chosen, entries, kind, nearest, read, written
from attnopt.codegen.target import known, target
from attnopt.compiler.errors import Problem
from attnopt.compiler.spec import CAUSAL, AttentionSpec, Mask
from tests.tree import ROOT

H100 = target("h100")
SPEC, LOAD = AttentionSpec(32, 8, 128, 128, 128**-0.5, CAUSAL), Load(1, 8192, 8192)
TILES = {
    "block_m": 64, "block_n": 32, "packed": True, "warps": 8, "stages": 3, "waves": 0, "maxnreg": 0,
    "waves_per_eu": 0, "matrix_instr_nonkdim": 0,
}  # fmt: skip
_WHOLE = {"evidence", "why", "obtained", "load", "kind", "spec", "tiles", "kernel", "taken"}


def _entry(load: Load = LOAD, **changes: Any) -> Entry:
    given = {"evidence": "estimated", **changes}
    return Entry("flash_prefill", TILES, SPEC.text, kind(SPEC), load, why="a test", **given)


def _wrong(entry: Entry, on: str) -> str:
    """Why an entry should not ship, empty where it may."""
    if entry.kernel not in kernels():
        return f"there is no kernel {entry.kernel}"
    cls = kernels()[entry.kernel]
    if set(entry.tiles) != set(cls.space()):
        return f"its fields are {', '.join(entry.tiles)}"
    for name, value in entry.tiles.items():
        if value not in cls.space()[name]:
            return f"{name} cannot be {value!r}"
    specs = {spec_text(spec): spec for spec, _ in cls.examples()}
    if entry.spec not in specs:
        return f"{entry.spec} is not among the kernel's examples"
    missed = cls.supports(specs[entry.spec], target(on))
    if missed is not None:
        return missed.reason
    if entry.kind != kind(specs[entry.spec]):
        return f"its kind is {kind(specs[entry.spec])}"
    if not {"triton", "torch", "date", "command"} <= set(entry.obtained):
        return "it does not say how it was obtained"
    measured = entry.evidence == "measured"
    return "it names no device" if measured and "device" not in entry.obtained else ""


@pytest.mark.parametrize("name", known())
def test_what_ships_is_possible(name: str) -> None:
    for entry in entries(name):
        assert not _wrong(entry, name), f"{name}: {entry}"
        assert entry.why
    places = [(e.kernel, e.kind, bucket(e.load)) for e in entries(name)]
    assert len(set(places)) == len(places), f"{name} has two entries for one place"


def test_every_file_is_of_a_known_target_and_as_it_is_written() -> None:
    for file in files("attnopt.codegen.tuned").iterdir():
        if file.name.endswith(".json"):
            name = file.name.removesuffix(".json")
            assert name in known(), f"there is no target {name}"
            assert file.read_text(encoding="utf-8") == written(name, entries(name))


def test_what_is_not_possible_is_seen() -> None:
    obtained = {"triton": "3", "torch": "2", "date": "2026", "command": "python"}
    good = _entry(obtained=obtained)
    assert not _wrong(good, "h100")
    for changes, why in (
        ({"kernel": "flash_postfill"}, "no kernel"),
        ({"tiles": {**TILES, "block_m": 48}}, "block_m cannot be 48"),
        ({"tiles": {"block_m": 64}}, "fields are block_m"),
        ({"spec": SPEC.with_(heads=64).text}, "not among"),
        ({"kind": "attn{}"}, "kind is"),
        ({"obtained": {}}, "how it was obtained"),
        ({"evidence": "measured"}, "no device"),
    ):
        assert why in _wrong(replace(good, **changes), "h100")


def _given(monkeypatch: pytest.MonkeyPatch, *given: Entry) -> None:
    monkeypatch.setattr(shipped, "entries", lambda name: given if name == "h100" else ())


GPUS = tuple(name for name in known() if not target(name).measured)


@pytest.mark.parametrize("name", GPUS)
def test_records_of_defaults_ship_and_are_fresh(name: str) -> None:
    records = [entry for entry in entries(name) if not entry.taken]
    how = f"run {TABLE} && {COMMAND}"
    assert records, how
    for entry in records:
        assert entry.evidence == "estimated" and "nothing timed" in entry.why
        took = entry.obtained["took"]
        assert took and all(each["shared"] <= target(name).shared_per_block for each in took)
        said = stale(entry, name)
        assert not said, f"{name}, {entry.kernel}: {said}; {how}"
    for kernel, cls in kernels().items():
        wanted = {
            spec_text(spec)
            for spec, _ in cls.examples()
            if cls.supports(spec, target(name)) is None
        }
        assert wanted == {entry.spec for entry in records if entry.kernel == kernel}, how


def test_a_stale_record_is_told() -> None:
    record = next(e for e in entries("h100") if e.kernel == "flash_prefill" and not e.taken)
    assert not stale(record, "h100")
    for changes, why in (
        ({"kernel": "flash_postfill"}, "no kernel"),
        ({"spec": "attn{}"}, "none of the kernel's examples"),
        ({"obtained": {**record.obtained, "source": "0"}}, "another text"),
        ({"tiles": {**record.tiles, "block_m": 16}}, "the default is"),
    ):
        assert why in stale(replace(record, **changes), "h100")


def test_a_record_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    _given(monkeypatch, _entry(taken=False))
    assert chosen(FlashPrefill, SPEC, H100, LOAD) == FlashPrefill.default(SPEC, H100, LOAD)
    _given(monkeypatch, _entry(taken=False), _entry(Load(1, 4096, 4096)))
    assert chosen(FlashPrefill, SPEC, H100, LOAD) == FlashPrefill(**TILES)


def test_records_are_made_of_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is compiled, what differs in its date alone stays, and old rows are refused."""
    monkeypatch.setattr(command, "files", lambda package: tmp_path)
    monkeypatch.setattr(shipped, "files", lambda package: tmp_path)
    entries.cache_clear()
    path, of = tmp_path / "t4.json", ["--kernel", "merge_partials", "--target", "t4", "--rows"]
    try:
        asked = [*of, str(ROOT / "docs/kernels.json")]
        assert command.main(asked) == 0 and not path.exists()
        assert command.main([*asked, "--write"]) == 0
        first = path.read_text(encoding="utf-8")
        assert len(entries("t4")) == 4 and not any(entry.taken for entry in entries("t4"))
        assert {entry.load.dtype for entry in entries("t4")} == {"float16"}
        monkeypatch.setattr(recorded, "environment", lambda: {"date": "another"})
        assert command.main([*asked, "--write"]) == 0 and path.read_text(encoding="utf-8") == first
        monkeypatch.setattr(recorded, "versions", lambda: {"triton": "4", "torch": "3"})
        assert command.main([*asked, "--write"]) == 0
        assert all(entry.obtained["date"] == "another" for entry in entries("t4"))
        rows = json.loads((ROOT / "docs/kernels.json").read_text(encoding="utf-8"))
        for row in rows:
            row["tiles"] = row["tiles"].replace("merge_partials{", "merge_partials{warps=8 ")
        (tmp_path / "old.json").write_text(json.dumps(rows), encoding="utf-8")
        assert command.main([*of, str(tmp_path / "old.json")]) == 1
        assert TABLE in capsys.readouterr().out
        assert command.main([*of, str(tmp_path / "none.json")]) == 1
    finally:
        entries.cache_clear()


def test_the_entry_of_a_bucket_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    _given(monkeypatch, _entry())
    for load in (LOAD, Load(1, 16383, 9000)):
        assert chosen(FlashPrefill, SPEC, H100, load) == FlashPrefill(**TILES)


def test_the_default_is_taken_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    _given(monkeypatch, _entry())
    for spec, on, load in (
        (SPEC, target("h200"), LOAD),
        (SPEC, H100, replace(LOAD, dtype="float16")),
        (SPEC, H100, Load(1, 512, 512)),  # four doublings away
        (SPEC, H100, Load(16, 8192, 8192)),
        (SPEC.with_(mask=Mask("window", left=1024)), H100, LOAD),
        (SPEC.with_(head_dim=64), H100, LOAD),
        (SPEC.with_(kv_heads=32), H100, LOAD),
        (SPEC.with_(softcap=30.0), H100, LOAD),
    ):
        assert chosen(FlashPrefill, spec, on, load) == FlashPrefill.default(spec, on, load)


def test_specs_of_one_kind_share_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    _given(monkeypatch, _entry())
    for spec in (SPEC.with_(heads=64, kv_heads=16), SPEC.with_(scale=1.0, backend="triton")):
        assert chosen(FlashPrefill, spec, H100, LOAD) == FlashPrefill(**TILES)
    assert kind(2.0) == "2.0"


def test_the_nearest_entry_is_taken() -> None:
    small, large = _entry(Load(1, 1024, 1024)), _entry(Load(1, 8192, 8192))
    known_entries = (small, large)

    def found(load: Load) -> Entry | None:
        return nearest(known_entries, "flash_prefill", kind(SPEC), load)

    assert found(Load(1, 2048, 2048)) is small
    assert found(Load(1, 4096, 4096)) is large
    assert found(Load(2, 65535, 65535)) is large
    assert found(Load(1, 131072, 131072)) is None
    assert nearest((), "flash_prefill", kind(SPEC), LOAD) is None
    assert nearest(known_entries, "other", kind(SPEC), LOAD) is None


def test_few_queries_take_no_entry_of_another_number() -> None:
    few = _entry(Load(8, 16, 8192))

    def found(queries: int) -> Entry | None:
        return nearest((few,), "flash_prefill", kind(SPEC), Load(8, queries, 8192))

    assert found(16) is found(31) is few
    assert found(8) is None and found(32) is None


def test_what_was_measured_goes_before_what_was_estimated() -> None:
    mended, timed = _entry(Load(1, 4096, 4096)), _entry(LOAD, evidence="measured")
    assert nearest((mended, timed), "flash_prefill", kind(SPEC), Load(1, 8192, 4096)) is timed


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "JSONDecodeError"),
        ('{"format": 2, "entries": []}', "its format is 2"),
        ('{"format": 1}', "KeyError"),
        ('{"format": 1, "entries": [{"load": {}}]}', "TypeError"),
        ('{"format": 1, "entries": [{"load": {"tokens": 1}}]}', "TypeError"),
        (written("h100", (_entry(evidence="guessed"),)), "not 'guessed'"),
    ],
)
def test_a_file_that_is_not_in_order_is_a_problem(content: str, why: str) -> None:
    with pytest.raises(Problem, match="not in order") as caught:
        read(content, "h100.json")
    assert caught.value.code == "A837" and why in caught.value.why


def test_a_file_reads_back() -> None:
    given = (_entry(), _entry(Load(1, 16, 16), evidence="measured", obtained={"device": "X"}))
    content = written("h100", given)
    assert read(content, "h100.json") == given[::-1]  # sorted by sizes
    assert content == written("h100", read(content, "")) and content.endswith("]}\n")
    assert len(content.splitlines()) == 4  # an entry in a line
    assert set(json.loads(content)["entries"][0]) == _WHOLE


def _result(**changes: Any) -> Tuned:
    default = tiles_of(FlashPrefill.default(SPEC, H100, LOAD))
    made = Tuned(
        "flash_prefill", TILES, default, SPEC.text, LOAD, "h100", "estimated", "a test", 9,
        {"spills": 3}, ({"kernel": "_k", "registers": 90, "spills": 0, "shared": 1, "warps": 8},),
        versions={"triton": "3.9", "torch": "2.13"}, date="2026-11-22",
    )  # fmt: skip
    return replace(made, **changes)


def test_the_command_writes_what_was_mended_and_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "files", lambda package: tmp_path)
    monkeypatch.setattr(shipped, "files", lambda package: tmp_path)
    monkeypatch.setattr(command, "gpu_here", lambda: None)
    entries.cache_clear()
    path, arguments = tmp_path / "h100.json", ["--target", "h100", "--kernel", "flash_prefill"]

    def runs(*results: Tuned | Problem) -> int:
        left = [*results, *[_result(tiles=_result().default)] * 3]

        def tune(*given: Any, **options: Any) -> Tuned:
            made = left.pop(0)
            if isinstance(made, Problem):
                raise made
            return made

        monkeypatch.setattr(command, "tune", tune)
        return command.main([*arguments, "--write"])

    try:
        assert runs(_result(tiles=_result().default)) == 0
        assert len(entries("h100")) == 4 and not any(entry.taken for entry in entries("h100"))
        path.unlink()
        entries.cache_clear()
        assert runs(_result()) == 0
        (mended,) = (entry for entry in entries("h100") if entry.taken)
        assert mended.tiles == TILES and not _wrong(replace(mended, kind=kind(SPEC)), "h100")
        ratio = Ratio("b", "a", Interval(1.2, 1.1, 1.3, 1.12, 1.28), 25)
        timed = {"evidence": "measured", "ratio": ratio, "device": "NVIDIA H100"}
        assert runs(_result(**timed)) == 0
        (measured,) = (entry for entry in entries("h100") if entry.taken)
        assert measured.evidence == "measured" and measured.obtained["over_default"]["low"] == 1.1
        assert runs(_result()) == 0 and measured in entries("h100")  # an estimate is no reason
        assert sum(entry.taken for entry in entries("h100")) == 1
        assert runs(Problem("A838", "no tile sizes fit", why="of 9 tried")) == 1
        assert "no tile sizes fit" in capsys.readouterr().out
        assert runs(Problem("A835", "no process starts")) == 1
    finally:
        entries.cache_clear()


def test_the_command_knows_its_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--target", "h100", "--kernel", "flash_postfill"]) == 1
    assert "flash_prefill" in capsys.readouterr().err
    assert command.main(["--target", "h101"]) == 1
