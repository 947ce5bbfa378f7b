"""Attention dispatched on a GPU: the same function here, where there is none."""

from __future__ import annotations

import pytest
import torch

from attnopt.codegen import target as targets
from attnopt.compiler.contract import Notes, read_pass
from attnopt.compiler.errors import Problem
from attnopt.compiler.lower import export, lower
from attnopt.compiler.pipeline import apply_pass
from attnopt.passes import generate_kernel
from tests.decoder import decoder
from tests.tolerance import assert_close


def test_it_fires_for_a_gpu_and_changes_nothing_here() -> None:
    before = decoder()
    after, outcomes = apply_pass(
        before, read_pass("generate_kernel"), ("*",), Notes(before, device="h100")
    )
    assert len(outcomes) == len(before.sites)
    assert all(o.applied and o.note == "dispatched on h100" for o in outcomes)
    assert all(after.spec(site).backend == "triton" for site in after.sites)
    inputs = before.example.kwargs
    assert_close(lower(after)(**inputs)["logits"], lower(before)(**inputs)["logits"])
    _, outcomes = apply_pass(
        after, read_pass("generate_kernel"), ("*",), Notes(after, device="h100")
    )
    assert not any(o.applied for o in outcomes) and "already" in outcomes[0].reason


def test_what_is_saved_keeps_the_op_and_gradients_flow() -> None:
    before = decoder()
    after, _ = apply_pass(
        before, read_pass("generate_kernel"), ("*",), Notes(before, device="a100")
    )
    exported = export(after)
    assert torch.ops.attnopt.attention.default in [n.target for n in exported.graph.nodes]
    grads = []  # none may be left on the decoder, which others share
    for program in (before, after):
        module = lower(program)
        total = module(**before.example.kwargs)["logits"].square().sum()
        trained = [p for p in module.parameters() if p.requires_grad]
        grads.append(torch.autograd.grad(total, trained))
    assert grads[0] and len(grads[0]) == len(grads[1])
    for a, b in zip(*grads, strict=True):
        assert_close(a / a.norm().clamp_min(1), b / a.norm().clamp_min(1))


def test_not_for_a_cpu_nor_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    before = decoder()
    _, outcomes = apply_pass(before, read_pass("generate_kernel"), ("*",), Notes(before))
    assert all(not o.applied and "`cpu`" in o.reason for o in outcomes)
    monkeypatch.setattr(generate_kernel, "find_spec", lambda name: None)
    _, outcomes = apply_pass(
        before, read_pass("generate_kernel"), ("*",), Notes(before, device="h100")
    )
    assert all(not o.applied and "triton is not installed" in o.reason for o in outcomes)


@pytest.mark.parametrize(
    ("told", "meant"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L4", "l4"), ("NVIDIA L40S", "l40s"), ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Tesla T4", "t4"), ("NVIDIA H200", "h200"), ("NVIDIA L40", "nvidia l40"),
    ],
)  # fmt: skip
def test_the_gpu_at_hand_is_known_by_its_name(
    monkeypatch: pytest.MonkeyPatch, told: str, meant: str
) -> None:
    class Facts:
        name, major, minor, multi_processor_count, total_memory = told, 8, 9, 142, 48 << 30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Facts)
    got = targets.at_hand()
    assert got.name == meant
    assert got.units == (142 if meant == "nvidia l40" else targets.target(meant).units)


def test_without_a_gpu_there_is_none_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Problem) as caught:
        targets.at_hand()
    assert caught.value.code == "A401"
