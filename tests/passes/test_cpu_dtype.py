"""Half-precision products run in float32 where the CPU has none of its own; everything else stays
as it was."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from attnopt.compiler import cpu_support
from attnopt.compiler.contract import Edit, Miss, Notes, read_pass
from attnopt.compiler.cpu_support import cpu_flags, native_products
from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.ops import ATTENTION
from attnopt.compiler.pipeline import apply_edit, apply_pass
from attnopt.compiler.program import Program
from attnopt.compiler.raising import raise_program
from attnopt.compiler.trace import trace
from attnopt.passes import cpu_dtype
from attnopt.passes.cpu_dtype import HALVES, PRODUCTS, CpuDtype

HALF = [torch.bfloat16, torch.float16]


class Model(nn.Module):
    """Embedding tied to the last layer, one attention, a convolution, a batched product."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 32)
        self.norm = nn.LayerNorm(32)
        self.qkv = nn.Linear(32, 96)
        self.conv = nn.Conv1d(32, 32, 3, padding=1)
        self.out = nn.Linear(32, 40, bias=False)
        self.out.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        q, k, v = self.qkv(self.norm(x)).view(*ids.shape, 3, 4, 8).permute(2, 0, 3, 1, 4)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = x + torch.bmm(torch.bmm(x, x.transpose(1, 2)).tanh(), x) / 8
        made: Tensor = self.out(x)
        return made


def program(dtype: torch.dtype) -> Program:
    ids = torch.randint(0, 40, (3, 5))
    return raise_program(
        trace(Loaded(Model().eval().to(dtype), None, (ids,), {}, "tiny", "callable"))
    )


def answer(made: Program, device: str = "cpu") -> Edit | Miss:
    return CpuDtype().rewrite(made, made, Notes(made, target=device))


def without_flags(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr(cpu_dtype, "cpu_flags", lambda: frozenset(flags))


@pytest.mark.parametrize("dtype", HALF)
def test_every_product_runs_in_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    without_flags(monkeypatch, "avx2", "avx512f")
    before = program(dtype)
    edit = answer(before)
    assert isinstance(edit, Edit) and "change of rounding" in edit.note
    after = apply_edit(before, before, edit)
    products = [n for n in after.graph.nodes if n.target in PRODUCTS]
    assert len(products) == edit.evidence["products"] == 6
    assert {n.meta["val"].dtype for n in products} == {torch.float32}
    assert any(n.target is ATTENTION for n in products)
    norms = [n for n in after.graph.nodes if n.target is torch.ops.aten.layer_norm.default]
    assert {n.meta["val"].dtype for n in norms} == {dtype}


@pytest.mark.parametrize("dtype", HALF)
def test_results_are_nearer_to_the_float64_model(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same dtype out; no further from the same model in float64 than two roundings of the result at
    any element."""
    without_flags(monkeypatch)
    before = program(dtype)
    edit = answer(before)
    assert isinstance(edit, Edit)
    after = apply_edit(before, before, edit)
    exact = replace(before, module=copy.deepcopy(before.module).double())
    for batch, seq in ((3, 5), (2, 9), (4, 2)):
        ids = torch.randint(0, 40, (batch, seq))
        with torch.no_grad():
            ours, theirs, truth = after(ids), before(ids), exact(ids)
        assert ours.dtype is theirs.dtype is dtype
        error = (ours.double() - truth).square().mean().sqrt()
        assert error <= 1.2 * (theirs.double() - truth).square().mean().sqrt()
        assert error < 8 * torch.finfo(dtype).eps * truth.square().mean().sqrt()


def test_the_tied_embedding_keeps_its_half_precision_table(monkeypatch: pytest.MonkeyPatch) -> None:
    without_flags(monkeypatch)
    before = program(torch.bfloat16)
    edit = answer(before)
    assert isinstance(edit, Edit)
    after = apply_edit(before, before, edit)
    halves = [p.shape for p in after.module.parameters() if p.dtype in HALVES]
    assert sorted(halves) == [(32,), (32,), (40, 32)]  # the norm's two, and the table
    had = sum(p.nbytes for p in before.module.parameters())
    has = sum(p.nbytes for p in after.module.parameters())
    assert edit.evidence["extra_bytes"] == has - had > 0
    assert {p.dtype for p in before.module.parameters()} == {torch.bfloat16}


def test_pipeline_accepts_it_as_the_same_function(monkeypatch: pytest.MonkeyPatch) -> None:
    without_flags(monkeypatch)
    before = program(torch.bfloat16)
    after, (outcome,) = apply_pass(before, read_pass("cpu_dtype"), ("*",), Notes(before))
    assert outcome.applied and outcome.error is not None and outcome.error < 1e-12, outcome
    assert not answer(after)


@pytest.mark.parametrize(
    "dtype, flag",
    [(torch.bfloat16, "avx512_bf16"), (torch.bfloat16, "amx_bf16"), (torch.float16, "asimdhp")],
)
def test_not_on_a_cpu_that_has_them(
    dtype: torch.dtype, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_flags(monkeypatch, "avx2", flag)
    miss = answer(program(dtype))
    assert isinstance(miss, Miss) and "natively" in miss.reason and flag in miss.reason


def test_native_bf16_says_nothing_of_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    without_flags(monkeypatch, "avx512_bf16")
    assert isinstance(answer(program(torch.float16)), Edit)


def test_not_for_float32_and_not_for_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    without_flags(monkeypatch)
    miss = answer(program(torch.float32))
    assert isinstance(miss, Miss)
    assert miss.reason == "no matrix product of the program is in bfloat16 or float16"
    other = answer(program(torch.bfloat16), device="a100")
    assert isinstance(other, Miss) and other.reason == "the target is `a100`, not a CPU"


def test_flags_are_read_from_the_kernel_list_and_from_torch(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    listed = tmp_path / "cpuinfo"
    listed.write_text(
        "processor : 0\nflags\t\t: fpu avx2 avx512_fp16\nmodel : x\n", encoding="utf-8"
    )
    monkeypatch.setattr(cpu_support, "CPUINFO", listed)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    cpu_flags.cache_clear()
    found = cpu_flags()
    cpu_flags.cache_clear()
    assert {"avx2", "avx512_fp16", "avx512_bf16"} <= found
    listed_flags = found & {"avx2", "avx512_fp16"}  # this machine may have wider units
    assert native_products(torch.float16, frozenset(listed_flags)) == "avx512_fp16"
    assert native_products(torch.bfloat16, frozenset({"avx2"})) == ""
    assert native_products(torch.float32, frozenset()) == "float32"


def test_text_round_trip() -> None:
    assert read_pass(CpuDtype().text) == CpuDtype()
