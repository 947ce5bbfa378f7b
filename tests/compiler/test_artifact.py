"""A run's folder is written, loads safely, and its model is called like the original."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnopt.compiler import artifact
from attnopt.compiler.compiled import Compiled
from attnopt.compiler.errors import Problem
from attnopt.compiler.optimized import Optimized
from attnopt.compiler.plan import Plan
from attnopt.compiler.program import Batch, Program
from attnopt.compiler.signature import Signature
from tests.tolerance import assert_close


class _Model(nn.Module):
    """Embeds tokens and their positions (64 at most), and returns its outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 4)
        self.places = nn.Parameter(torch.randn(64, 4))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        embedded = self.table(input_ids) + self.places[: input_ids.shape[1]]
        return {"logits": embedded * attention_mask[..., None]}


class _Positional(nn.Module):
    """Two inputs in order, one output that is no mapping."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y[None]


@dataclass(frozen=True)
class _Reports:
    """The least that a run can say about itself."""

    said: Mapping[str, Any] = field(default_factory=lambda: {"device": "cpu"})

    def files(self) -> Mapping[str, bytes]:
        return {"report.json": b'{"schema": 1}', "report.md": b"# x", "report.html": b"<p>"}

    def evidence(self) -> Mapping[str, Any]:
        return self.said


def _program(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    size = torch.export.Dim("length", max=64)
    both = {0: torch.export.Dim.DYNAMIC, 1: size}
    shapes: Any = (both, {0: size}) if args else dict.fromkeys(kwargs, both)
    exported = torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
    made = exported.module(check_guards=False)
    assert isinstance(made, torch.fx.GraphModule)
    return Program(made, Batch(args, kwargs), dynamic={name: {0: "b", 1: "s"} for name in kwargs})


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 11, (2, 5))


@pytest.fixture(scope="module")
def program() -> Program:
    tokens = torch.randint(0, 11, (2, 5))
    return _program(_Model(), (), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, program: Program) -> Path:
    batch = Batch((), {**program.example.kwargs}, torch.ones(2, 5, dtype=torch.bool))
    roles = {"calibration": [batch], "heldout": [batch, batch]}
    folder = tmp_path_factory.mktemp("saved") / "out"
    return artifact.save(folder, program, Plan(), _Reports(), roles)


@pytest.fixture(scope="module")
def loaded(saved: Path) -> Optimized:
    return artifact.load(saved)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved run, for tests that change it."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_a_saved_program_loads_and_answers_like_the_model(
    loaded: Optimized, program: Program
) -> None:
    tokens = torch.randint(0, 11, (3, 9))
    mask = (torch.arange(9) < torch.tensor([[9], [4], [1]])).long()
    expected = program(input_ids=tokens, attention_mask=mask)["logits"]
    by_name = loaded(input_ids=tokens, attention_mask=mask)
    assert_close(by_name.logits, expected)
    assert_close(by_name["logits"], expected)
    assert_close(by_name[0], expected)
    assert_close(loaded(tokens, mask).logits, expected)
    assert not by_name.logits.requires_grad
    with pytest.raises(AttributeError, match="no output `hidden`; there are logits"):
        _ = by_name.hidden


def test_one_sequence_and_one_token_are_taken(loaded: Optimized, program: Program) -> None:
    for rows, length in ((1, 5), (1, 1), (2, 1)):
        tokens = torch.randint(0, 11, (rows, length))
        mask = torch.ones_like(tokens)
        expected = program(input_ids=tokens, attention_mask=mask)["logits"]
        assert_close(loaded(tokens, mask).logits, expected)


def test_plain_torch_opens_a_model_of_aten_alone(folder: Path) -> None:
    code = (
        "import sys, torch; m = torch.export.load(sys.argv[1]).module();"
        "x = torch.ones(2, 3, dtype=torch.long);"
        "assert m(input_ids=x, attention_mask=x)['logits'].shape == (2, 3, 4);"
        "assert 'attnopt' not in sys.modules"
    )
    run = [sys.executable, "-P", "-c", code, str(folder / "model.pt2")]
    subprocess.run(run, check=True, timeout=120)


def test_a_missing_mask_is_all_ones_and_whole_numbers_convert(
    loaded: Optimized, tokens: Tensor
) -> None:
    expected = loaded(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    assert_close(loaded(input_ids=tokens).logits, expected)
    assert_close(loaded(tokens.int(), torch.ones_like(tokens).bool()).logits, expected)
    types = torch.zeros_like(tokens)
    assert_close(loaded(input_ids=tokens, token_type_ids=types).logits, expected)


def _wrong() -> dict[str, Callable[[Tensor], tuple[tuple[Any, ...], dict[str, Any]]]]:
    return {
        "`input_ids` is missing": lambda x: ((), {"attention_mask": x}),
        "`labels` is unknown": lambda x: ((x,), {"labels": x}),
        "`token_type_ids` is unknown": lambda x: ((x,), {"token_type_ids": x + 1}),
        "`input_ids` is given twice": lambda x: ((x,), {"input_ids": x}),
        "3 inputs were given in order": lambda x: ((x, x, x), {}),
        "`input_ids` is list, not a tensor": lambda x: (([1, 2],), {"attention_mask": x}),
        "`input_ids` is float32 [2, 5]": lambda x: ((x.float(), x), {}),
        "`input_ids` has shape [5]": lambda x: ((x[0], x), {}),
        "`attention_mask` has shape [2, 4]": lambda x: ((x, x[:, :4]), {}),
        "`input_ids` has shape [2, 65]": lambda x: ((x.new_ones(2, 65),), {}),
    }


@pytest.mark.parametrize("why", sorted(_wrong()))
def test_wrong_inputs_are_told_what_the_model_takes(
    loaded: Optimized, tokens: Tensor, why: str
) -> None:
    args, kwargs = _wrong()[why](tokens)
    with pytest.raises(Problem) as told:
        loaded(*args, **kwargs)
    assert told.value.code == "A506" and told.value.why == why
    assert "input_ids int64 [batch, length<=64]" in told.value.help


def test_inputs_in_order_and_an_output_that_is_no_mapping(tmp_path: Path) -> None:
    x, y = torch.randn(2, 3), torch.randn(3)
    saved = artifact.save(tmp_path / "out", _program(_Positional(), (x, y), {}), Plan(), _Reports())
    loaded = artifact.load(saved)
    assert loaded.signature.positional == ("x", "y")
    assert_close(loaded(x, y), x + y)
    assert_close(loaded(x=x, y=y), x + y)
    assert not (saved / "calibration.pt").exists(), "no batches, no file"


def test_the_plan_carries_its_evidence_and_reads_back(folder: Path) -> None:
    document = json.loads((folder / "plan.json").read_text())
    assert document["evidence"] == {"device": "cpu"}
    assert document["inputs"][0] == "input_ids int64 [batch, length<=64]"
    assert artifact.read_plan(folder) == artifact.read_plan(folder / "plan.json") == Plan()
    assert artifact.load(folder).plan == Plan()
    assert artifact.read_report(folder) == {"schema": 1}


def test_calibration_batches_come_back_by_role(folder: Path, program: Program) -> None:
    roles = artifact.load_calibration(folder)
    assert {role: len(batches) for role, batches in roles.items()} == {
        "calibration": 1,
        "heldout": 2,
    }
    batch = roles["calibration"][0]
    assert torch.equal(batch.kwargs["input_ids"], program.example.kwargs["input_ids"])
    assert batch.valid is not None and bool(batch.valid.all()) and batch.args == ()


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("executed",)


def test_a_tampered_model_is_refused_before_it_is_opened(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with zipfile.ZipFile(folder / "model.pt2") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    target = next(name for name in entries if name.endswith(".pt"))
    entries[target] = pickle.dumps(_Evil())
    with zipfile.ZipFile(folder / "model.pt2", "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    with pytest.raises(Problem) as told:
        artifact.load(folder)
    assert told.value.code.startswith("A10")
    assert "executed" not in capsys.readouterr().out


def test_calibration_that_is_code_is_not_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"calibration": [_Evil()]}, folder / "calibration.pt")
    with pytest.raises(Problem) as told:
        artifact.load_calibration(folder)
    assert told.value.code == "A505"
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("made", [False, True])
def test_a_folder_without_a_run_says_what_to_do(tmp_path: Path, made: bool) -> None:
    if made:
        (tmp_path / "out").mkdir()
    with pytest.raises(Problem, match="no finished run") as told:
        artifact.load(tmp_path / "out")
    assert told.value.code == "A505" and "optimize" in told.value.help


def test_an_unreadable_plan_says_so(folder: Path) -> None:
    (folder / "plan.json").write_text("{")
    with pytest.raises(Problem) as told:
        artifact.read_plan(folder)
    assert told.value.code == "A505"


def test_a_compiled_plan_runs_compiled(folder: Path, tokens: Tensor) -> None:
    loaded = _compiled(folder)
    assert loaded.compiled
    assert isinstance(loaded.module, Compiled)
    loaded.module.form = torch.compile(loaded.module.module, backend="eager")
    assert_close(loaded(tokens).logits, artifact.load(folder)(tokens).logits)
    assert loaded.compiled


def test_where_compiling_fails_it_runs_uncompiled_with_one_warning(
    folder: Path, tokens: Tensor
) -> None:
    def broken(module: Any, example: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    loaded = _compiled(folder)
    assert isinstance(loaded.module, Compiled)
    loaded.module.form = torch.compile(loaded.module.module, backend=broken)
    with pytest.warns(RuntimeWarning, match=r"warning\[A507\].*\n.*\n.*no C\+\+ compiler"):
        outputs = loaded(tokens)
    assert_close(outputs.logits, artifact.load(folder)(tokens).logits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded(tokens)
    assert not loaded.compiled


def _compiled(folder: Path) -> Optimized:
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps({**plan, "compiled": True}))
    return artifact.load(folder)


def test_an_unwritable_folder_is_refused_before_the_export(
    tmp_path: Path, program: Program
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(Problem) as told:
        artifact.save(tmp_path / "file", program, Plan(), _Reports())
    assert told.value.code == "A502"


def test_the_hash_of_a_model_depends_on_contents_and_names(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "one").write_bytes(b"x")
    (tmp_path / "b" / "one").write_bytes(b"x")
    (tmp_path / "c" / "two").write_bytes(b"x")
    a, b, c = (artifact.source_sha256(tmp_path / name) for name in ("a", "b", "c"))
    assert a == b != c and len(a) == 64


def test_a_signature_names_fixed_and_open_sizes() -> None:
    linear = nn.Linear(4, 4)
    exported = torch.export.export(linear, (torch.randn(2, 4),))
    assert str(Signature.of(exported)) == "input float32 [2, 4]"
