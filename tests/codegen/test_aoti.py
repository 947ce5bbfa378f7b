"""The whole model as a package of AOTInductor, also of a model that was rewritten for a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram, passes

from attnopt.autotune.generate import generate
from attnopt.codegen import aoti
from attnopt.codegen.target import target
from attnopt.compiler.artifact import load, save
from attnopt.compiler.contract import Notes, read_pass
from attnopt.compiler.errors import Problem
from attnopt.compiler.lower import export
from attnopt.compiler.ops import ATTENTION
from attnopt.compiler.packed_ops import UNPACK
from attnopt.compiler.pipeline import apply_pass
from attnopt.compiler.plan import Plan
from attnopt.compiler.program import Program
from attnopt.compiler.spec import AttentionSpec, Mask
from tests.autotune.results import least
from tests.decoder import decoder
from tests.tolerance import assert_close


def _for_a_gpu() -> Program:
    """A decoder whose attentions are dispatched, the second with a window and a soft cap."""
    program = decoder(length=10).copy()
    first, second = program.sites
    window = Mask("window", left=3, sink=1)
    spec = second.spec.with_(mask=window, softcap=0.5, backend="reference")
    node = program.node(second.node)
    node.args = (*node.args[:4], spec.text)
    program.module.recompile()
    program = program.with_sites([first, replace(second, spec=spec)])
    notes = Notes(program, target="h100")
    made, outcomes = apply_pass(program, read_pass("generate_kernel"), ("*",), notes)
    assert all(outcome.applied for outcome in outcomes)
    return made


def _called(exported: ExportedProgram) -> list[str]:
    return [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]


@pytest.mark.slow
def test_a_model_that_was_rewritten_for_a_gpu_is_packaged_for_the_cpu(tmp_path: Path) -> None:
    save(tmp_path / "run", _for_a_gpu(), Plan().then("generate_kernel"), least())
    assert str(ATTENTION) in _called(load(tmp_path / "run").exported)
    generate(tmp_path / "run", tmp_path / "out", "cpu", with_package=True)
    packaged = torch._inductor.aoti_load_package(str(tmp_path / "out/model.pt2"))
    tokens = torch.randint(0, 31, (3, 17))
    wanted = load(tmp_path / "run")(input_ids=tokens)["logits"]
    assert_close(packaged(input_ids=tokens)["logits"], wanted)


def test_attention_is_in_torchs_operators_and_gives_the_same() -> None:
    exported = export(_for_a_gpu())
    plain = aoti.rebound(exported)
    called = _called(plain)
    assert not any(name.startswith("attnopt.") for name in called)
    assert called.count("aten.scaled_dot_product_attention.default") == 1  # it has no soft cap
    tokens = torch.randint(0, 31, (3, 17))
    given = exported.module()(input_ids=tokens)["logits"]
    assert_close(plain.module()(input_ids=tokens)["logits"], given)
    assert aoti.rebound(plain) is plain


def test_on_a_gpu_the_program_is_moved_there_in_torchs_operators(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What AOTInductor is given; "meta" stands for the device."""
    move, handed = passes.move_to_device_pass, []

    def moved(exported: ExportedProgram, location: Any) -> ExportedProgram:
        assert location == "cuda"
        return move(exported, "meta")

    monkeypatch.setattr(passes, "move_to_device_pass", moved)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for name in ("get_rng_state", "set_rng_state"):  # of the device that is not there
        monkeypatch.setattr(torch.cuda, name, getattr(torch, name))
    monkeypatch.setattr(
        torch._inductor, "aoti_compile_and_package",
        lambda exported, package_path: handed.append((exported, package_path)),
    )  # fmt: skip
    aoti.package(export(_for_a_gpu()), tmp_path / "model.pt2", target("h100"))
    ((exported, path),) = handed
    assert path == str(tmp_path / "model.pt2")
    assert not any(name.startswith("attnopt.") for name in _called(exported))
    assert all(x.is_meta for x in exported.state_dict.values())
    nodes = exported.graph.nodes
    assert {str(n.kwargs["device"]) for n in nodes if "device" in n.kwargs} == {"meta"}
    with pytest.raises(Problem, match=r"the GPU here has capability 9\.0"):
        aoti.package(exported, tmp_path / "model.pt2", target("a100"))


def test_what_cannot_be_packaged_is_named_and_only_that(tmp_path: Path) -> None:
    class _Calls(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = ATTENTION(x, x, x, [], AttentionSpec(1, 1, 4, 4, 1.0).text)
            back: Tensor = UNPACK(made[0, 0], torch.arange(3), 1, 3, 0.0)
            return back

    exported = torch.export.export(_Calls(), (torch.randn(1, 1, 3, 4),))
    with pytest.raises(Problem, match="cannot be packaged") as problem:
        aoti.package(exported, tmp_path / "model.pt2", target("cpu"))
    assert problem.value.code == "A809"
    assert problem.value.why == "it calls attnopt's own attnopt.unpack.default"
    assert "without `unpad`" in problem.value.help
