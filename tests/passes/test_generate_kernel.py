"""Attention dispatched on a GPU: the same function here, where there is none."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

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
        before, read_pass("generate_kernel"), ("*",), Notes(before, target="h100")
    )
    assert len(outcomes) == len(before.sites)
    assert all(o.applied and o.note == "dispatched on h100" for o in outcomes)
    assert all(after.spec(site).backend == "triton" for site in after.sites)
    inputs = before.example.kwargs
    assert_close(lower(after)(**inputs)["logits"], lower(before)(**inputs)["logits"])
    _, outcomes = apply_pass(
        after, read_pass("generate_kernel"), ("*",), Notes(after, target="h100")
    )
    assert not any(o.applied for o in outcomes) and "already" in outcomes[0].reason


def test_what_is_saved_keeps_the_op_and_gradients_flow() -> None:
    before = decoder()
    after, _ = apply_pass(
        before, read_pass("generate_kernel"), ("*",), Notes(before, target="a100")
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
        before, read_pass("generate_kernel"), ("*",), Notes(before, target="h100")
    )
    assert all(not o.applied and "triton is not installed" in o.reason for o in outcomes)


def _here(
    monkeypatch: pytest.MonkeyPatch, name: str, units: int, memory: float, **more: int
) -> None:
    """A GPU that its driver says this of."""
    facts = SimpleNamespace(
        name=name, major=8, minor=9, multi_processor_count=units, total_memory=int(memory), **more
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)


@pytest.mark.parametrize(
    ("told", "meant"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L4", "l4"), ("NVIDIA L40S", "l40s"), ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Tesla T4", "t4"), ("NVIDIA H200", "h200"),
    ],
)  # fmt: skip
def test_the_gpu_at_hand_is_known_by_its_name(
    monkeypatch: pytest.MonkeyPatch, told: str, meant: str
) -> None:
    like = targets.target(meant)
    _here(monkeypatch, told, like.units, 0.95 * like.memory)
    assert targets.at_hand() == like


def test_the_l2_that_a_file_does_not_tell_is_the_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    like, right = targets.target("b200"), targets.target
    _here(monkeypatch, "NVIDIA B200", like.units, like.memory, L2_cache_size=100 << 20)
    assert targets.at_hand() == like
    monkeypatch.setattr(targets, "target", lambda name: replace(right(name), l2=0))
    assert targets.at_hand() == replace(like, l2=100 << 20)


def test_a_gpu_that_no_file_is_about_has_its_drivers_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clocks = {"memory_clock_rate": 9_001_000, "memory_bus_width": 384}
    _here(monkeypatch, "NVIDIA L40", 142, 48 << 30, **clocks)
    got = targets.at_hand()
    assert (got.name, got.units, got.memory) == ("nvidia l40", 142, 48 << 30)
    assert not got.peak and round(got.bandwidth / 1e9) == 864


@pytest.mark.parametrize(
    ("told", "units", "memory", "clocks"),
    [
        ("NVIDIA H100 PCIe", 114, 80e9, (1_593_000, 5120)),
        ("NVIDIA H100 NVL", 132, 94e9, (2_619_000, 6016)),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 16, 10e9, ()),
        ("NVIDIA A100-SXM4-40GB", 108, 40e9, (1_215_000, 5120)),
        ("NVIDIA A100 80GB PCIe", 108, 80e9, (1_512_000, 5120)),
    ],
)
def test_another_form_of_a_gpu_has_figures_of_its_own(
    monkeypatch: pytest.MonkeyPatch, told: str, units: int, memory: float, clocks: tuple[int, ...]
) -> None:
    more = dict(zip(("memory_clock_rate", "memory_bus_width"), clocks, strict=False))
    _here(monkeypatch, told, units, memory, **more)
    got = targets.at_hand()
    like = targets.target(got.name)
    assert (got.title, got.units, got.memory) == (told, units, int(memory))
    assert got.shared_per_block == like.shared_per_block
    assert got.peak["bfloat16"] == like.peak["bfloat16"] * units / like.units
    assert f"times {units} of {like.units} processors" in got.note and like.title in got.note
    datasheet = {114: 2.04e12, 132: 3.94e12}.get(units, 1.555e12 if memory == 40e9 else 1.935e12)
    if clocks:
        assert abs(got.bandwidth / datasheet - 1) < 0.01
    else:
        assert got.bandwidth == like.bandwidth * units / like.units


def test_without_a_gpu_there_is_none_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Problem) as caught:
        targets.at_hand()
    assert caught.value.code == "A401"
