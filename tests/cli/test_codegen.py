"""`attnopt codegen`: the folder it writes, that it runs on its own, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from attnopt.autotune.generate import generate
from attnopt.codegen.emit import public_name
from attnopt.compiler.artifact import load, save
from attnopt.compiler.folder import check_writable
from attnopt.compiler.plan import Plan
from attnopt.compiler.spec import CAUSAL, AttentionSpec, Mask
from tests.autotune.results import least
from tests.cli.conftest import Command
from tests.codegen.bare import run_bare
from tests.codegen.compiling import compiling
from tests.decoder import decoder
from tests.programs import one_attention
from tests.tolerance import assert_close

WINDOW = Mask("window", left=3, sink=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of a decoder, whose second attention has a window."""
    program = decoder(length=10).copy()
    site = program.sites[1]
    node = program.node(site.node)
    spec = site.spec.with_(mask=WINDOW)
    node.args = (*node.args[:4], spec.text)
    program.module.recompile()
    folder = tmp_path_factory.mktemp("run") / "out"
    save(folder, program, Plan(), least())
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose one attention is larger than kernels take, and that no decoder has."""
    folder = tmp_path_factory.mktemp("wide") / "out"
    program = one_attention(AttentionSpec(2, 2, 300, 300, 0.1, CAUSAL, backend="sdpa"))
    save(folder, program, Plan(), least())
    return folder


def _error(command: Command, *words: object) -> dict[str, Any]:
    ended = command("attnopt", "codegen", *words, "--json")
    assert ended.code == 1, ended.out + ended.err
    return ended.error


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_module_for_each_distinct_spec_and_phase(command: Command, run: Path) -> None:
    told = command(
        "attnopt", "codegen", run, "--target", "h100", "--out", "out", "--no-aot", "--length", 64,
        "--dtype", "bf16", "--json",
    ).json  # fmt: skip
    assert [(s["site"], s["at"], s["phase"], s.get("module")) for s in told["sites"]] == [
        ("s0", "blocks.0", "prompt", "flash_prefill_0"),
        ("s1", "blocks.1", "prompt", "flash_prefill_1"),
        ("s0", "blocks.0", "step", "split_decode_0"),
        ("s1", "blocks.1", "step", "split_decode_1"),
    ]
    assert "mask=window(left=3,sink=1)" in told["sites"][1]["spec"]
    assert "cache=ring" in told["sites"][3]["spec"]
    assert told["kernels"][0]["sizes"] == {
        "batch": 2, "queries": 64, "keys": 64, "dtype": "bfloat16"
    }  # fmt: skip
    assert told["kernels"][2]["sizes"]["queries"] == 1 and told["kernels"][0]["launches"] == []
    files = _bytes(Path("out"))
    manifest = json.loads(files.pop("manifest.json"))
    assert manifest["files"] == {
        name: hashlib.sha256(data).hexdigest() for name, data in files.items()
    }
    assert set(files) == {
        "README.md", *(f"{name}_{at}.py" for name in ("flash_prefill", "split_decode")
                       for at in (0, 1)),
    }  # fmt: skip
    assert "- at s0 (blocks.0) at each step" in files["README.md"].decode()


def test_attentions_that_are_alike_share_a_module(
    command: Command, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("alike") / "out"
    save(folder, decoder(), Plan(), least())
    ended = command(
        "attnopt", "codegen", folder / "plan.json", "--target", "a100", "--out", "out", "--no-aot"
    )
    assert ended.code == 0 and "flash_prefill_0.py" in ended.out
    assert "at s0 (blocks.0), s1 (blocks.1)\n" in ended.out
    assert not Path("out/flash_prefill_1.py").exists()


def test_the_same_plan_gives_the_same_bytes_and_replaces_what_was_there(
    command: Command, run: Path
) -> None:
    words = ("attnopt", "codegen", run, "--target", "h100", "--no-aot", "--out")
    assert command(*words, "one").code == command(*words, "two").code == 0
    first = _bytes(Path("one"))
    assert first == _bytes(Path("two"))
    manifest = json.loads(first["manifest.json"])
    manifest["files"]["stale_0.cubin"] = "0"
    Path("one/manifest.json").write_text(json.dumps(manifest))
    Path("one/stale_0.cubin").touch()
    Path("one/mine.txt").touch()
    check_writable("one")  # it is known as one of ours
    assert command(*words, "one").code == 0
    assert _bytes(Path("one")) == {**first, "mine.txt": b""}


@pytest.mark.slow
def test_the_folder_runs_where_attnopt_is_not(run: Path, tmp_path: Path) -> None:
    made = generate(run, tmp_path / "out", "h100", dtype="fp32", aot=False)
    assert len(made.built) == 4
    calls, wanted = {}, {}
    for one in made.built:
        kernel, spec = type(one.picked.kernel), one.picked.spec
        inputs = kernel.inputs(spec, one.picked.load)
        calls[one.name] = (public_name(spec), inputs)
        exact = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        wanted[one.name] = kernel.reference(spec, exact)
    found = run_bare(tmp_path / "out", calls)
    for name, want in wanted.items():
        assert not isinstance(found[name], str), found[name]
        assert_close(found[name], want, name)


def test_what_no_kernel_computes_is_told(command: Command, wide: Path) -> None:
    error = _error(command, wide, "--target", "h100", "--out", "out", "--no-aot", "--dtype", "fp16")
    assert error["code"] == "A806" and "head_dim 300 is more than 256" in error["why"]
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--target", "cpu"), "A808", "no Triton kernels for the CPU"),
        (("--target", "h1000"), "A401", "unknown target"),
        (("--target", "t4", "--no-aot", "--dtype", "bf16"), "A807", "no arithmetic in bfloat16"),
        (("--target", "h100", "--no-aot", "--dtype", "int8"), "A807", "do not take int8"),
        (("--target", "h100", "--no-aot", "--precision", "tf33"), "A802", "cannot be 'tf33'"),
        (
            ("--target", "mi250", "--no-aot", "--precision", "tf32"),
            "A807",
            "no products in tf32",
        ),
        (
            ("--target", "h100", "--no-aot", "--precision", "tf32", "--dtype", "fp16"),
            "A807",
            "not in float16",
        ),
        (("--target", "h100", "--package"), "A809", "no package for NVIDIA H100"),
        (("--target", "mi300x", "--package"), "A809", "no package for AMD"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    command: Command, run: Path, words: tuple[str, ...], code: str, said: str
) -> None:
    error = _error(command, run, *words, "--out", "out")
    assert error["code"] == code and said in error["what"]
    assert not Path("out").exists()


def test_the_help_for_a_dtype_names_those_there_are(command: Command, run: Path) -> None:
    words = ("--target", "t4", "--no-aot", "--dtype", "bf16", "--out", "out")
    assert _error(command, run, *words)["help"] == "--dtype float16 or float32"


def test_tf32_is_told_where_it_was_asked_for(command: Command, run: Path) -> None:
    words = ("--target", "h100", "--no-aot", "--dtype", "fp32", "--precision", "tf32")
    assert command("attnopt", "codegen", run, *words, "--out", "out").code == 0
    for name in ("flash_prefill_0.py", "split_decode_1.py", "README.md"):
        assert "precision=tf32}" in Path("out", name).read_text()


def test_places_that_hold_other_things_are_refused(command: Command, run: Path) -> None:
    words = (run, "--target", "h100", "--no-aot", "--out")
    assert _error(command, *words, run)["code"] == "A830"
    Path("other").mkdir()
    Path("other/mine.txt").touch()
    assert _error(command, *words, "other")["code"] == "A508"
    assert _error(command, "nowhere", *words[1:], "out")["code"] == "A505"


def test_the_interpreter_is_refused(
    command: Command, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    error = _error(command, run, "--target", "h100", "--out", "out")
    assert error["code"] == "A804" and not Path("out").exists()


def test_a_run_without_its_model_still_gives_kernels_for_prompts(
    command: Command, run: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "model.pt2").unlink()
    words = ("--target", "h100", "--no-aot", "--out", "out")
    ended = command("attnopt", "codegen", copy, *words)
    assert ended.code == 0
    assert "no kernel for s0 (blocks.0) at each step: the run has no decoder here" in ended.out
    assert "- s1 (blocks.1) at each step" in Path("out/README.md").read_text()


@pytest.mark.slow
def test_a_model_that_is_no_decoder_is_read_again(
    command: Command, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("encoder") / "out"
    spec = AttentionSpec(4, 2, 16, 16, 0.25, WINDOW, backend="sdpa")
    save(folder, one_attention(spec, seq=9), Plan(), least())
    assert not (folder / "decode.pt2").exists()
    told = command(
        "attnopt", "codegen", folder, "--target", "h100", "--out", "out", "--no-aot", "--dtype",
        "fp16", "--json",
    ).json  # fmt: skip
    (site,) = told["sites"]
    assert "mask=window(left=3,sink=1)" in site["spec"] and site["module"] == "flash_prefill_0"


_AOT = """
import contextlib, io
from attnopt.cli.main import commands, run
words = ["codegen", sys.argv[1], "--target", sys.argv[2], "--out", sys.argv[3], "--dtype", "fp16"]
said = io.StringIO()
with contextlib.redirect_stdout(said):
    code = run(commands, "attnopt", words)
told = [code, said.getvalue()]
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["h100", "mi300x"])
def test_binaries_are_written_with_what_launches_them(name: str, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended, said = compiling(_AOT, run, name, out)
    assert ended == 0 and "bytes of shared memory" in said
    manifest = json.loads((out / "manifest.json").read_text())
    kind = "hsaco" if name == "mi300x" else "cubin"
    for module in manifest["modules"]:
        facts = json.loads((out / f"{module['name']}.json").read_text())
        assert facts["launches"]
        for launch in facts["launches"]:
            assert launch["file"].endswith(kind) and launch["file"] in module["files"]
            digest = hashlib.sha256((out / launch["file"]).read_bytes()).hexdigest()
            assert digest == launch["sha256"] == manifest["files"][launch["file"]]
    assert {"attnopt_kernels.h", "loader.c"} < set(manifest["files"])
    assert manifest["triton"] and "## From C" in (out / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["h100", "mi300x"])
def test_the_same_plan_gives_the_same_binaries_in_another_process(
    name: str, tmp_path: Path
) -> None:
    """Each process has a seed of hashes and a compiler's cache of its own."""
    made, run = [], tmp_path / "run"
    save(run, decoder(length=10), Plan(), least())
    for seed in ("1", "2"):
        out, cache = tmp_path / seed / "out", tmp_path / seed / "cache"
        ended, _ = compiling(_AOT, run, name, out, PYTHONHASHSEED=seed, TRITON_CACHE_DIR=str(cache))
        assert ended == 0
        made.append(_bytes(out))
    assert any(file.endswith((".cubin", ".hsaco")) for file in made[0])
    differing = [file for file in made[0] if made[0][file] != made[1].get(file)]
    assert set(made[0]) == set(made[1]) and not differing


@pytest.mark.slow
def test_a_package_for_the_cpu_equals_the_model(command: Command, run: Path) -> None:
    told = command(
        "attnopt", "codegen", run, "--target", "cpu", "--package", "--out", "out", "--json"
    ).json
    assert told["package"] == "model.pt2" and told["sites"] == [] and told["kernels"] == []
    model = torch._inductor.aoti_load_package("out/model.pt2")
    tokens = torch.randint(0, 31, (3, 17))
    assert_close(model(input_ids=tokens)["logits"], load(run)(input_ids=tokens)["logits"])


def test_a_package_that_cannot_be_compiled_leaves_nothing(
    command: Command, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    error = _error(command, run, "--target", "cpu", "--package", "--out", "out")
    assert error["code"] == "A809" and error["why"] == "no compiler"
    assert not Path("out").exists() and not list(Path().glob(".out*"))
