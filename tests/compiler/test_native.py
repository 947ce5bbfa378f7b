"""The operators in C++ against their definitions, and what happens where they cannot be built."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import cpp_extension

from attnopt.compiler import native
from attnopt.compiler.attend_step import to_all
from attnopt.compiler.native import build
from attnopt.compiler.spec import FULL, AttentionSpec
from tests.tolerance import assert_close
from tests.tree import ROOT


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    assert native.ready() == ""
    torch.manual_seed(0)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8, 9, 16, 17])
@pytest.mark.parametrize("ins", [5, 64, 250])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_few_rows_is_linear(rows: int, ins: int, stored: torch.dtype) -> None:
    x = torch.randn(rows, 3, ins)[:, -1:]  # rows that are not next to each other
    copies = [(torch.randn(out, ins) / ins**0.5).to(stored) for out in (33, 1, 40)]
    weights = [copy.float() for copy in copies]
    biases = [None, torch.randn(1), torch.randn(40)]
    short = [None] * 3 if stored == torch.float32 else copies
    given = [each for three in zip(weights, biases, short, strict=True) for each in three]
    made = torch.ops.attnopt.few_rows(x, *given)
    wanted = [
        F.linear(x.double(), w.double(), None if b is None else b.double())
        for w, b in zip(weights, biases, strict=True)
    ]
    assert_close(made, torch.cat(wanted, -1))


def test_few_rows_of_a_transposed_weight_and_of_nothing() -> None:
    x, weight = torch.randn(2, 24) / 5, torch.randn(24, 17).T
    none = [None] * 8
    assert_close(torch.ops.attnopt.few_rows(x, weight, *none), F.linear(x, weight))
    assert torch.ops.attnopt.few_rows(x[:0], weight, *none).shape == (0, 17)


def test_few_rows_says_what_does_not_fit() -> None:
    x, none = torch.randn(2, 24), [None] * 8
    with pytest.raises(RuntimeError, match="not \\[out, 24\\]"):
        torch.ops.attnopt.few_rows(x, torch.randn(8, 23), *none)
    with pytest.raises(RuntimeError, match="float32"):
        torch.ops.attnopt.few_rows(x, torch.randn(8, 24).double(), *none)
    for wrong in (torch.randn(8, 23).half(), torch.randn(8, 24), torch.ones(8, 24).short()):
        with pytest.raises(RuntimeError, match="a copy of a weight is not 16-bit"):
            torch.ops.attnopt.few_rows(x, torch.randn(8, 24), None, wrong, *none[:6])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "batch, heads, rows, keys, dim, v_dim",
    [
        (1, 1, 1, 1, 16, 16),
        (1, 8, 1, 513, 32, 32),
        (1, 1, 8, 2100, 64, 64),  # parts, with keys left over
        (2, 3, 4, 77, 24, 40),
        (1, 3, 2, 1025, 33, 17),
        (2, 1, 11, 131, 48, 176),  # rows and columns left over
    ],
)
def test_one_token_is_attention(
    batch: int, heads: int, rows: int, keys: int, dim: int, v_dim: int, dtype: torch.dtype
) -> None:
    k = torch.randn(batch, heads, keys + 5, dim).to(dtype)[:, :, :keys]
    v = torch.randn(batch, heads, keys + 5, v_dim).to(dtype)[:, :, :keys]
    q = torch.randn(batch, rows, heads, dim).to(dtype).transpose(1, 2)
    scale = dim**-0.5
    made = torch.ops.attnopt.one_token(q, k, v, scale)
    assert made.dtype == dtype
    assert_close(made, _attention(q, k, v, scale))


def test_one_token_of_large_scores() -> None:
    """The maximum grows from block to block, so that earlier sums are scaled down."""
    k = torch.linspace(-3, 3, 700)[None, None, :, None] * torch.ones(8)
    q, v = torch.full((1, 1, 1, 8), 2.0), torch.randn(1, 1, 700, 8)
    assert_close(torch.ops.attnopt.one_token(q, k, v, 1.0), _attention(q, k, v, 1.0))


@pytest.mark.parametrize(
    ("keys", "at"),
    [(128, 0), (128, 1), (128, 16), (128, 100), (65, 64), (79, 78), (130, 129), (1025, 1024)],
)
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_one_token_hides_no_nan(keys: int, at: int, rows: int) -> None:
    q, (k, v) = torch.randn(1, 1, rows, 16), torch.randn(2, 1, 1, keys, 16)
    k[0, 0, at] = float("nan")
    assert torch.ops.attnopt.one_token(q, k, v, 1.0).isnan().all()


@pytest.mark.parametrize(
    "out", [slice(0, 1), slice(0, 64), slice(60, 70), slice(128, 130), slice(0, 130)]
)
def test_one_token_of_scores_that_are_minus_infinity(out: slice) -> None:
    """Their keys have no share; where all are, the result is no number, as the definition's."""
    q, (k, v) = torch.ones(1, 1, 5, 16), torch.randn(2, 1, 1, 130, 16)
    k[:, :, out] = float("-inf")
    made, want = torch.ops.attnopt.one_token(q, k, v, 1.0), _attention(q, k, v, 1.0)
    assert torch.equal(made.isnan(), want.isnan())
    assert_close(made.nan_to_num(), want.nan_to_num())


def test_one_token_of_views_and_of_nothing() -> None:
    q, (k, v) = torch.randn(2, 6, 3, 8), torch.randn(2, 2, 1, 70, 8)
    spread = [x.expand(2, 6, 70, 8) for x in (k, v)]  # heads, and so strides of zero
    assert_close(torch.ops.attnopt.one_token(q, *spread, 0.3), _attention(q, *spread, 0.3))
    across = [x.mT.contiguous().mT for x in spread]  # whose last dimension is not dense
    assert_close(torch.ops.attnopt.one_token(q, *across, 0.3), _attention(q, *across, 0.3))
    assert torch.ops.attnopt.one_token(q[:0], k[:0].expand(0, 6, 70, 8), v[:0].expand(0, 6, 70, 8),
                                       1.0).shape == (0, 6, 3, 8)  # fmt: skip
    assert torch.ops.attnopt.one_token(q[:, :, :0], *spread, 1.0).shape == (2, 6, 0, 8)


_ELSEWHERE = """
import torch
from attnopt.compiler import native
from tests.tolerance import assert_close

assert native.ready() == "", native.ready()
torch.manual_seed(0)
for rows, keys, dim in ((1, 3, 5), (2, 65, 24), (7, 400, 40)):
    q, k, v = torch.randn(2, 2, rows, dim), *torch.randn(2, 2, 2, keys, dim)
    want = (q.double() @ k.double().mT).softmax(-1) @ v.double()
    assert_close(torch.ops.attnopt.one_token(q, k, v, 1.0), want)
    x, w = torch.randn(rows, dim), torch.randn(33, dim).bfloat16() / 4
    few = torch.ops.attnopt.few_rows(x, w.float(), None, w, *[None] * 6)
    assert_close(few, x.double() @ w.double().T)
print(torch.backends.cpu.get_cpu_capability())
"""


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_they_compute_the_same_on_other_processors(capability: str) -> None:
    env = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-c", _ELSEWHERE]
    made = subprocess.run(command, capture_output=True, text=True, env=env)
    assert made.returncode == 0, made.stderr
    assert made.stdout.strip().lower() == capability


def test_one_token_says_what_does_not_fit() -> None:
    q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 5, 8)
    with pytest.raises(RuntimeError, match="do not fit"):
        torch.ops.attnopt.one_token(q, k, k[:, :, :4], 1.0)
    with pytest.raises(RuntimeError, match="do not fit"):
        torch.ops.attnopt.one_token(q, k[:, :, :0], k[:, :, :0], 1.0)
    with pytest.raises(RuntimeError, match="of one dtype"):
        torch.ops.attnopt.one_token(q, k.bfloat16(), k, 1.0)
    with pytest.raises(RuntimeError, match="not Double"):
        torch.ops.attnopt.one_token(q.double(), k.double(), k.double(), 1.0)


def test_they_compile_for_a_processor_without_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    folder = Path(build.__file__).parent
    command = [cpp_extension.get_cxx_compiler(), *build._flags(), "-fsyntax-only"]
    command += [f"-I{path}" for path in cpp_extension.include_paths()]
    made = subprocess.run(
        [*command, *(str(folder / name) for name in build.SOURCES)], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpp_extension, "get_default_build_root", lambda: str(tmp_path))
    monkeypatch.setattr(cpp_extension, "get_cxx_compiler", lambda: "no-such-compiler")
    assert build._ready.__wrapped__() == "no C++ compiler `no-such-compiler`"
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'x.cpp:1: error: no such header' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(cpp_extension, "get_cxx_compiler", lambda: str(broken))
    assert "error: no such header" in build._ready.__wrapped__()
    monkeypatch.setattr(cpp_extension, "get_cxx_compiler", lambda: f"env {broken}")
    assert "error: no such header" in build._ready.__wrapped__()  # a compiler behind another


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    scores = q.double() @ k.double().transpose(-1, -2) * scale
    return scores.softmax(-1) @ v.double()


def test_few_rows_checks_biases_and_gives_them_where_there_are_no_inputs() -> None:
    few, none = torch.ops.attnopt.few_rows, [None] * 7
    for wrong in (torch.ones(1), torch.ones(4).double(), torch.ones(4, 1)):
        with pytest.raises(RuntimeError, match="a bias is not float32"):
            few(torch.randn(1, 8), torch.randn(4, 8), wrong, *none)
    bias = torch.randn(4)
    assert_close(few(torch.randn(2, 0), torch.randn(4, 0), bias, *none), bias.expand(2, 4))


def test_gradients_and_exports_go_through_torch() -> None:
    """The operators have no gradient, and are not where an exported graph is loaded."""
    spec = AttentionSpec(2, 2, 8, 8, 0.3, mask=FULL)
    k, v = torch.randn(2, 1, 2, 5, 8)
    q = torch.randn(1, 2, 1, 8, requires_grad=True)
    torch.compile(lambda q: to_all(q, k, v, (), spec), backend="aot_eager")(q).sum().backward()
    assert q.grad is not None and bool((q.grad != 0).any())

    class One(torch.nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return to_all(q, k, v, (), spec)

    with torch.no_grad():
        graph = torch.export.export(One(), (q.detach(),)).graph
    assert not [node for node in graph.nodes if "one_token" in str(node.target)]
