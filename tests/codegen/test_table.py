"""The table of kernels on targets: what it says, and that what it says is good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from attnopt.codegen import table
from attnopt.codegen.aot import Resources
from attnopt.codegen.kernel import Load, kernels
from attnopt.codegen.table import Row, load_on, page, read, record
from attnopt.codegen.target import known, target
from tests.codegen.compiling import compiling
from tests.codegen.conftest import Golden
from tests.codegen.doubling import Doubling
from tests.tree import ROOT

GPUS = tuple(name for name in known() if not target(name).measured)


def test_a_target_without_the_dtype_gets_float16() -> None:
    assert load_on(Load(), target("t4")).dtype == "float16"
    assert load_on(Load(), target("l4")) == Load()
    assert load_on(Load(dtype="float32"), target("t4")).dtype == "float32"


def _taken(shared: int, spills: int = 0, serialized: bool = False) -> Resources:
    return Resources("_double", 40, spills, spills, shared, 4, serialized=serialized)


def test_the_page(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "kernels", lambda: {"double": Doubling})
    monkeypatch.setattr(table, "version", lambda package: "VERSION")
    text = page([
        Row("double", 0, "h100", "double{}", (_taken(2048, 0, True),), 2.5e-6),
        Row("double", 0, "t4", "double{block=32}", (_taken(0), _taken(1000)), 0.0125),
        Row("double", 0, "mi300x", "double{}", (_taken(64, 8),), 1e-6, bad="spills 8 bytes"),
        Row("double", 0, "b200", why_not="the factor is not positive", estimated_s=1.0),
        Row("double", 0, "a100", "double{}", estimated_s=1e-3, bad="cannot compile: no"),
    ])  # fmt: skip
    golden("kernels.md", text)


def test_rows_are_written_and_read(tmp_path: Path) -> None:
    row = Row("double", 0, "h100", "double{}", (_taken(2048), _taken(0, 4)), 1e-6, digest="12")
    path = tmp_path / "kernels.json"
    assert read(path) == []
    path.write_text(record([row, row]))
    assert read(path) == [row, row]


def test_nothing_is_compiled_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def compile(planned: Sequence[Row]) -> list[Row]:
        compiled.extend(row.target for row in planned)
        return [replace(row, parts=(_taken(64),)) for row in planned]

    monkeypatch.setattr(table, "kernels", lambda: {"double": Doubling})
    monkeypatch.setattr(table, "_compiled", compile)
    monkeypatch.setattr("attnopt.codegen.aot.require_compiler", lambda: None)
    first = table.rows(["double"], ["h100"])
    assert compiled == ["h100"] and first[0].parts == (_taken(64),)
    assert table.rows(["double"], ["h100"], first) == first and compiled == ["h100"]
    other = replace(first[0], digest="another")
    assert table.rows(["double"], ["h100"], [other]) == first and len(compiled) == 2
    monkeypatch.setattr(table, "version", lambda package: "another")
    changed = table.rows(["double"], ["h100"], first)
    assert len(compiled) == 3 and changed[0].digest != first[0].digest


_ROWS = """
from dataclasses import asdict, replace
from attnopt.codegen import table
from tests.codegen.doubling import Doubling
from tests.tree import ROOT

class Refused(Doubling):
    name = "refused"

    @classmethod
    def examples(cls):
        ((_, load),) = super().examples()
        return ((-1.0, load),)

table.kernels = lambda: {"refused": Refused, "double": Doubling}
(refused,) = table.rows(["refused"], ["h100"])
(double,) = table.rows(["double"], ["t4"])
told = [asdict(refused), asdict(double)]
"""


@pytest.mark.slow
def test_rows_of_what_is_supported_and_what_is_not() -> None:
    refused, double = compiling(_ROWS)
    assert refused["why_not"] == "the factor is not positive" and not refused["parts"]
    assert double["tiles"] == "double{}" and not double["bad"]
    (taken,) = double["parts"]
    assert Resources(**taken).registers > 0
    traffic = 2 * 1000 * 2 / (target("t4").bandwidth * 0.8)
    assert double["estimated_s"] == pytest.approx(traffic)


@pytest.mark.slow
def test_the_command_writes_the_page_and_keeps_what_was_there(tmp_path: Path) -> None:
    code = """
import io, contextlib
from attnopt.codegen import table
from tests.codegen.doubling import Doubling
from tests.tree import ROOT
table.kernels = lambda: {"double": Doubling}
said = io.StringIO()
with contextlib.redirect_stdout(said):
    code = table.main(["--targets", "h100"])
told = [code, said.getvalue(), table.main(["--targets", "h100", "--out", sys.argv[1]])]
told.append(table.main(["--targets", "a100", "--out", sys.argv[1]]))
"""
    out = tmp_path / "kernels.md"
    code, text, *codes = compiling(code, out)
    assert code == 0 and codes == [0, 0]
    assert "1 of 1 fit their target and spill nothing; 0 more are not for their target" in text
    assert "| h100 | as declared | " in text
    both = out.read_text()
    assert "2 of 2 fit" in both and both.index("| a100 |") < both.index("| h100 |")
    assert [row.target for row in read(out.with_suffix(".json"))] == ["a100", "h100"]


RECORDED = read(ROOT / "docs" / "kernels.json")


@pytest.mark.parametrize("name", sorted(kernels()))
def test_the_recorded_rows_are_of_the_kernels_at_hand(name: str) -> None:
    told = version("triton")
    if f"with triton {told}." not in (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8"):
        pytest.skip(f"the table was made with another triton than {told}")
    before = {row.place: row for row in RECORDED}
    for row in table.planned([name], ["h100"]):
        kept = before.get(row.place)
        assert kept is not None and (kept.digest, kept.why_not) == (row.digest, row.why_not), (
            f"{row.place} is of another text: run "
            f"python -m attnopt.codegen.table --kernels {name} --out docs/kernels.md"
        )


_EVERY = """
from dataclasses import asdict
from pathlib import Path
from attnopt.codegen.table import read, rows
before = read(Path("docs/kernels.json"))
told = [asdict(row) for row in rows([sys.argv[1]], sys.argv[2].split(","), before)]
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(kernels()))
def test_every_example_fits_every_target_and_spills_nothing(name: str) -> None:
    """Compiles what docs/kernels.json does not have of the same text already."""
    found: list[dict[str, Any]] = compiling(_EVERY, name, ",".join(GPUS))
    assert len(found) == len(kernels()[name].examples()) * len(GPUS)
    bad = [f"{r['target']}, example {r['example'] + 1}: {r['bad']}" for r in found if r["bad"]]
    assert not bad, "\n".join(bad)
    for row in found:
        assert row["why_not"] or row["parts"], row
