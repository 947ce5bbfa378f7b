"""The table of kernels on targets: what it says, and that what it says is good."""

from __future__ import annotations

from typing import Any

import pytest

from attnopt.codegen import table
from attnopt.codegen.aot import Resources
from attnopt.codegen.kernel import Load, kernels
from attnopt.codegen.table import Row, load_on, page
from attnopt.codegen.target import known, target
from tests.codegen.compiling import compiling
from tests.codegen.conftest import Golden
from tests.codegen.doubling import Doubling

GPUS = tuple(name for name in known() if not target(name).measured)


def test_a_target_without_the_dtype_gets_float16() -> None:
    assert load_on(Load(), target("t4")).dtype == "float16"
    assert load_on(Load(), target("l4")) == Load()
    assert load_on(Load(dtype="float32"), target("t4")).dtype == "float32"


def _taken(shared: int, spills: int = 0, serialized: bool = False) -> Resources:
    return Resources("_double", 40, spills, spills, shared, 4, serialized=serialized)


def test_the_page(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "kernels", lambda: {"double": Doubling})
    monkeypatch.setattr("triton.__version__", "VERSION")
    text = page([
        Row("double", 0, "h100", "double{}", (_taken(2048, 0, True),), 2.5e-6),
        Row("double", 0, "t4", "double{block=32}", (_taken(0), _taken(1000)), 0.0125),
        Row("double", 0, "mi300x", "double{}", (_taken(64, 8),), 1e-6, bad="spills 8 bytes"),
        Row("double", 0, "b200", why_not="the factor is not positive", estimated_s=1.0),
        Row("double", 0, "a100", "double{}", estimated_s=1e-3, bad="cannot compile: no"),
    ])  # fmt: skip
    golden("kernels.md", text)


_ROWS = """
from dataclasses import asdict, replace
from attnopt.codegen import table
from tests.codegen.doubling import Doubling

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
def test_the_command_writes_the_page() -> None:
    code = """
import io, contextlib
from attnopt.codegen import table
from tests.codegen.doubling import Doubling
table.kernels = lambda: {"double": Doubling}
said = io.StringIO()
with contextlib.redirect_stdout(said):
    code = table.main(["--targets", "h100"])
told = [code, said.getvalue()]
"""
    code, text = compiling(code)
    assert code == 0
    assert "1 of 1 fit their target and spill nothing." in text
    assert "| h100 | as declared | " in text


_EVERY = """
from dataclasses import asdict
from attnopt.codegen.table import rows
told = [asdict(row) for row in rows([sys.argv[1]], sys.argv[2].split(","))]
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(kernels()))
def test_every_example_fits_every_target_and_spills_nothing(name: str) -> None:
    found: list[dict[str, Any]] = compiling(_EVERY, name, ",".join(GPUS))
    assert len(found) == len(kernels()[name].examples()) * len(GPUS)
    bad = [f"{r['target']}, example {r['example'] + 1}: {r['bad']}" for r in found if r["bad"]]
    assert not bad, "\n".join(bad)
    for row in found:
        assert row["why_not"] or row["parts"], row
