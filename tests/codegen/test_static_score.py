"""The static score: what it reads off a kernel's text, and that it falls where it should."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from attnopt.codegen import instructions
from attnopt.codegen.aot import Resources
from attnopt.codegen.instructions import Loop, hot_loop, products
from attnopt.codegen.kernel import Load
from attnopt.codegen.kernels.flash_prefill import FlashPrefill
from attnopt.codegen.static_score import (
    Score,
    Static,
    in_flight,
    matrix_share,
    misfit,
    occupancy,
    resident,
    score,
)
from attnopt.codegen.target import target
from attnopt.compiler.spec import CAUSAL, AttentionSpec, Mask
from tests.codegen.compiling import compiling

H100, A100, T4, MI300X = (target(name) for name in ("h100", "a100", "t4", "mi300x"))
SPEC, LOAD = AttentionSpec(32, 8, 128, 128, 128**-0.5, CAUSAL), Load(1, 8192, 8192)

# A loop of 4 + 1 products with a wait inside it and a slow path out of line, after a loop that
# computes the same with more instructions, and a loop around both.
_SASS = """
_k:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   S2R R0, SR_TID.X ;
.L_x_1:
        /*0020*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0030*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0040*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0050*/                   FFMA R1, R2, R3, R4 ;
        /*0060*/                   MUFU.EX2 R1, R2 ;
        /*0070*/                   LDL R1, [R2] ;
        /*0080*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR12], R88 ;
        /*0090*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR12], R88 ;
        /*00a0*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR12], R88 ;
        /*00b0*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR12], R88 ;
        /*00c0*/                   HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR12].tnspB, R24 ;
        /*00d0*/              @!P3 BRA `(.L_x_1) ;
.L_x_2:
        /*00e0*/                   LDGSTS.E.BYPASS.LTC128B.128 [R4], desc[UR4][R2.64] ;
        /*00f0*/                   LDG.E.64 R2, desc[UR4][R2.64] ;
        /*0100*/                   LDG.E R2, desc[UR4][R2.64] ;
        /*0110*/                   LDG.E.U16 R2, desc[UR4][R2.64] ;
        /*0120*/              @!P0 BRA `(.L_x_4) ;
.L_x_3:
        /*0130*/              @!P1 BRA `(.L_x_3) ;
.L_x_5:
        /*0140*/              @P2  HGMMA.64x64x16.F32.BF16 R88, gdesc[UR12], R88 ;
        /*0150*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR12], R88 ;
        /*0160*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR12], R88 ;
        /*0170*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR12], R88 ;
        /*0180*/                   HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR12].tnspB, R24 ;
        /*0190*/                   BRA.U !UP0, `(.L_x_2) ;
        /*01a0*/                   BRA.U !UP1, `(.L_x_0) ;
        /*01b0*/                   EXIT ;
.L_x_4:
        /*01c0*/                   MUFU.EX2 R1, R2 ;
        /*01d0*/                   BRA `(.L_x_5) ;
.L_x_6:
        /*01e0*/                   BRA `(.L_x_6);
        /*01f0*/                   NOP;
"""
_AMDGCN = """
	.text
_k:                                     ; @_k
	s_load_dwordx2 s[0:1], s[4:5], 0x0
	s_branch .LBB0_2
.LBB0_1:                                ;   in Loop: Header=BB0_2 Depth=1
	v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
	s_cbranch_scc0 .LBB0_4
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
	global_load_dwordx4 v[0:3], v[4:5], off
	buffer_load_ushort v6, v7, s[0:3], 0 offen
	v_exp_f32_e32 v0, v1
	v_pk_fma_f32 v[0:1], v[2:3], v[4:5], v[6:7]
	s_waitcnt vmcnt(0)
	v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
	v_mfma_f32_16x16x16_f16 a[0:3], v[0:1], v[2:3], a[0:3]
	s_cbranch_execz .LBB0_1
	s_branch .LBB0_1
.LBB0_4:
	s_endpgm
"""
_TTGIR = """
    %4 = scf.for %i = %a to %b step %c iter_args(%x = %y) -> (tensor<128x64xf32>) {
      %5 = scf.while (%arg = %z) : (i1) -> i1 {
        scf.condition(%w)
      } do {
      ^bb0(%arg: i1):
        %6 = tt.dot %q, %k, %o : tensor<16x32xf16, #a> * tensor<32x16xf16, #b> -> tensor<16x16xf32>
        scf.yield %w : i1
      }
      %7 = ttng.warp_group_dot %q, %k, %o {isAsync = true} : !ttg.memdesc<128x64xbf16, #s, #m> * !ttg.memdesc<64x32xbf16, #t, #m, mutable> -> tensor<128x32xf32, #mma>
      %8:2 = ttng.warp_group_dot_wait %7, %q {pendings = 0 : i32} : tensor<128x32xf32, #mma>
      scf.yield %7 : tensor<128x64xf32>
    } loc(#l)
    %9 = tt.dot %q, %k, %o : tensor<512x512xf16> * tensor<512x512xf16> -> tensor<512x512xf32>
"""  # noqa: E501
_QK, _PV = 64 * 64 * 16 // 4, 64 * 128 * 16 // 4


def _made(ttgir: str = "", **asm: Any) -> Any:
    return SimpleNamespace(asm={"ttgir": ttgir, **asm}, metadata=SimpleNamespace(num_warps=4))


def test_the_hot_loop_is_the_leanest_of_the_innermost_with_most_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(instructions, "disassembled", lambda cubin: _SASS)
    loop = hot_loop(_made(cubin=b""))
    assert loop.matrix == {"float16": 4 * _QK + _PV}
    # The first loop: of the second the slow path and the wait count too, the loop around both not.
    assert (loop.plain, loop.special, loop.fma, loop.bytes) == (7, 1, 1, 0)
    lean = _SASS.replace("IADD3", "HGMMA.64x8x16").replace("RZ ;", "RZ ; HGMMA")
    monkeypatch.setattr(instructions, "disassembled", lambda cubin: lean.replace("64x8x", "64x1x"))
    assert hot_loop(_made(cubin=b"")).plain == 4


def test_code_out_of_line_counts_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = _SASS.replace("IADD3 R0, R0, 0x1, RZ ;", "\n".join(["NOP ;"] + ["/*0001*/ NOP ;"] * 9))
    monkeypatch.setattr(instructions, "disassembled", lambda cubin: slow)
    loop = hot_loop(_made(cubin=b""))
    # The second loop: four loads, three branches, and the slow path's exponential and branch.
    assert (loop.plain, loop.special) == (9, 1)
    assert loop.bytes == 32 * (16 + 8 + 4 + 2)


def test_a_loop_of_amd_by_its_header_inside() -> None:
    loop = hot_loop(_made(amdgcn=_AMDGCN))
    assert loop.matrix == {"float16": 2 * 32 * 32 * 8 + 16 * 16 * 16}
    assert (loop.special, loop.fma, loop.vector) == (1, 1, 2)
    assert loop.bytes == 64 * (16 + 2)


def test_products_that_warps_repeat_are_not_useful() -> None:
    assert products(_TTGIR) == 128 * 64 * 32  # the inner loop has fewer, and what is in none is out
    loop = hot_loop(_made(_TTGIR, amdgcn=_AMDGCN))
    done = 4 * (2 * 32 * 32 * 8 + 16 * 16 * 16)
    assert loop.useful == 1.0 and done < products(_TTGIR)
    twice = hot_loop(_made(_TTGIR.replace("128x64", "16x64"), amdgcn=_AMDGCN))
    assert twice.useful == pytest.approx(16 * 64 * 32 / done)


def test_products_of_the_fifth_tensor_cores_are_read_from_tritons_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = _SASS.replace(
        "HGMMA.64x64x16.F32.BF16 R88, gdesc[UR12]", "UTCHMMA gdesc[UR1], tmem[UR2]"
    )
    text = text.replace("HGMMA.64x128x16.F32.BF16 R24, R120", "UTCHMMA gdesc[UR1], tmem[UR2]")
    monkeypatch.setattr(instructions, "disassembled", lambda cubin: text)
    assert hot_loop(_made(_TTGIR, cubin=b"")).matrix == {"float16": 128 * 64 * 32 / 4}


def test_text_without_a_loop_counts_whole() -> None:
    flat = "\n".join(
        ["_k:", "\tv_exp_f32_e32 v0, v1", "\tglobal_load_dword v1, v2, off", "\ts_endpgm"]
    )
    assert hot_loop(_made(amdgcn=flat)) == Loop(3, 1, 1, 0, 64 * 4)


def _static(
    registers: int = 128, warps: int = 4, shared: int = 32768, stages: int = 3, **changes: Any
) -> Static:
    loop = Loop(300, 300, 30, 30, 8192, {"float16": 262144})
    took = Resources("_k", registers, changes.pop("spills", 0), 0, shared, warps)
    took = replace(took, serialized=changes.pop("serialized", False))
    return replace(Static((64, 32, 1), stages, took, loop), **changes)


@pytest.mark.parametrize(
    ("static", "on", "blocks"),
    [
        (_static(128, 4, 0), A100, 4),  # 65536 registers over 128 * 128
        (_static(129, 4, 0), A100, 3),  # given out in steps of eight
        (_static(32, 4, 40960), A100, 4),  # 164 KB over 40, and one of the system's for each
        (_static(16, 1, 0), A100, 32),  # so many blocks, though 64 warps would fit
        (_static(16, 8, 0), T4, 4),  # 32 warps
        (_static(32, 4, 65536), T4, 1),  # all of it, with nothing taken by the system
        (_static(256, 4, 0), MI300X, 2),  # 512 registers for each lane of four units
        (_static(64, 4, 32768), MI300X, 2),
        (_static(255, 8, 229376), H100, 1),
        (_static(32, 4, 300000), H100, 0),
    ],
)  # fmt: skip
def test_how_many_blocks_a_unit_holds(static: Static, on: Any, blocks: int) -> None:
    assert resident(static, on) == blocks


def test_occupancy_is_the_share_of_warps() -> None:
    assert occupancy(_static(128, 4, 0), A100) == 16 / 64
    assert occupancy(_static(256, 4, 0), MI300X) == 8 / 32


def test_the_cycles_of_products_follow_from_the_peak() -> None:
    alone = Static(
        (1, 1, 1), 3, Resources("_k", 64, 0, 0, 0, 4), Loop(1, matrix={"float16": 2**20})
    )
    for on in (H100, A100, MI300X):
        assert matrix_share(alone, on) > 0.99
    # 512 of a cycle on an H100: as many instructions take half of one warp's time.
    even = replace(alone, loop=Loop(2**11, 2**11, matrix={"float16": 2**20}))
    one = replace(even, resources=replace(even.resources, shared=200000))
    assert matrix_share(one, H100) == pytest.approx(0.5)
    assert matrix_share(even, H100) == pytest.approx(8 / 9)  # eight warps to a scheduler


def test_what_lowers_the_share_of_products() -> None:
    full = matrix_share(_static(), H100)
    assert 0.5 < full < 1
    for worse in (
        _static(registers=255),  # fewer warps to hide behind
        _static(serialized=True),
        _static(stages=1),
        _static(loop=replace(_static().loop, useful=0.5)),
        _static(loop=replace(_static().loop, special=200)),
        _static(loop=replace(_static().loop, plain=900)),
    ):
        assert matrix_share(worse, H100) < full, worse


def _score(static: Static, kernel: FlashPrefill | None = None, load: Load = LOAD) -> Score:
    return score([static], kernel or FlashPrefill(), SPEC, load, H100)


def test_what_lowers_the_score() -> None:
    best = _score(_static())
    assert 0 < best.value < 1 and best.evidence == "estimated"
    assert best.tail == pytest.approx(2048 / (16 * 132))
    assert _score(_static(grid=(133, 1, 1))).tail == pytest.approx(133 / 264)
    assert _score(_static(grid=(133, 1, 1))).value < best.value
    assert _score(_static(stages=1)).value < best.value
    few = Load(1, 100, 100)
    assert _score(_static(), FlashPrefill(256), few).value < _score(_static(), load=few).value


def test_memory_bound_work_goes_by_the_bytes_in_flight() -> None:
    decode = Load(8, 1, 32768)
    few, many = (_static(loop=Loop(50, 50, 0, 20, bytes=size)) for size in (256, 4096))
    assert in_flight(few, H100) < 0.5 < in_flight(many, H100)
    assert _score(few, load=decode).value < _score(many, load=decode).value
    assert _score(_static(), load=decode).in_flight == 1.0


def test_the_launch_with_the_most_work_stands_for_all() -> None:
    merge = Static((4096, 1, 1), 1, Resources("_m", 40, 0, 0, 0, 1), Loop(9, bytes=64))
    both = score([merge, _static()], FlashPrefill(), SPEC, LOAD, H100)
    assert both == _score(_static())


def test_why_a_kernel_is_not_worth_timing() -> None:
    assert not misfit([_static()], H100)
    assert "shared memory" in misfit([_static(), _static(shared=232449)], H100)
    assert "spills" in misfit([_static(), _static(spills=4)], H100)
    assert "registers" in misfit([_static(registers=255, warps=16)], H100)
    assert "grid" in misfit([_static(grid=(1, 65536, 1))], H100)
    assert not misfit([_static(grid=(65536, 1, 1))], H100)
    assert not misfit([_static(grid=(1, 65536, 1))], MI300X)


def test_arithmetic_in_vain() -> None:
    windowed = replace(SPEC, mask=Mask("window", left=1024, sink=4))
    assert FlashPrefill(128, 64).waste(SPEC, LOAD) == pytest.approx(1.016, abs=1e-3)
    assert 1 < FlashPrefill(16, 16).waste(windowed, LOAD) < 1.02
    assert FlashPrefill(256, 128).waste(windowed, LOAD) > 1.2
    few = Load(1, 8, 8)  # 2080 products of 36 that are read, in each of 32 heads
    assert FlashPrefill(64, 16).waste(SPEC, few) == pytest.approx(64 * 16 / 36)
    assert FlashPrefill(64, 16, packed=True).waste(SPEC, few) == pytest.approx(64 * 16 / 36 / 4)


_COMPILED = """
from attnopt.codegen.kernels.flash_prefill import FlashPrefill
from attnopt.codegen.kernel import Load
from attnopt.codegen.static_score import misfit, score, statics
from attnopt.codegen.target import target
from attnopt.compiler.spec import CAUSAL, AttentionSpec
spec, load = AttentionSpec(32, 8, 64, 64, 0.125, CAUSAL), Load(1, 8192, 8192)
on, told = target(sys.argv[1]), []
for tiles in ((128, 64, False, 4, 2), (16, 16, False, 4, 1)):
    kernel = FlashPrefill(*tiles)
    found = statics(kernel, spec, load, on)
    why = misfit(found, on)
    rated = None if why else score(found, kernel, spec, load, on).value
    told.append([why, rated, found[0].loop.multiply_adds, found[0].loop.useful, found[0].grid])
"""


@pytest.mark.parametrize("name", ["h100", "mi300x"])
def test_compiled_kernels_are_told_apart(name: str) -> None:
    large, small = compiling(_COMPILED, name)
    assert not large[0] and not small[0]
    assert large[1] > 1.3 * small[1] > 0
    assert large[4] == [64 * 32] and small[4] == [512 * 32]
    if name == "h100":
        assert large[2] * 4 == 2 * 128 * 64 * 64 and large[3] == 1.0
    else:
        assert small[3] < 1.0  # tiles of 16 are too small for four warps of 64
