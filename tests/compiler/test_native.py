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
from attnopt.compiler.native import build, layouts
from attnopt.compiler.spec import FULL, AttentionSpec
from tests.tolerance import assert_close
from tests.tree import ROOT

pytestmark = pytest.mark.slow  # the operators are built, once per machine


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    assert native.ready() == ""
    torch.manual_seed(0)


OUTS = [33, 1, 40]


def _maps(ins: int, kept: torch.dtype) -> tuple[list[Tensor], list[Tensor | None]]:
    """Weights whose values a dtype holds, and biases."""
    weights = [(torch.randn(out, ins) / max(ins, 1) ** 0.5).to(kept).float() for out in OUTS]
    return weights, [None, torch.randn(1), torch.randn(40)]


def _linear(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    return [
        F.linear(x.double(), w.double(), None if b is None else b.double())
        for w, b in zip(weights, biases, strict=True)
    ]


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8, 9, 16, 17])
@pytest.mark.parametrize("ins", [5, 64, 250])
@pytest.mark.parametrize("kept", [torch.float32, torch.float16, torch.bfloat16])
def test_few_rows_is_linear(rows: int, ins: int, kept: torch.dtype) -> None:
    x = torch.randn(rows, 3, ins)[:, -1:]  # rows that are not next to each other
    weights, biases = _maps(ins, kept)
    packed = layouts.panels(weights)
    assert packed.dtype == kept
    made = torch.ops.attnopt.few_rows(x, packed, layouts.biases(biases, weights), [0, 0], OUTS, 0)
    assert_close(made, torch.cat(_linear(x, weights, biases), -1))


def test_few_rows_of_nothing() -> None:
    weights, biases = _maps(24, torch.float32)
    given = layouts.panels(weights), layouts.biases(biases, weights), [0, 0], OUTS, 0
    assert torch.ops.attnopt.few_rows(torch.randn(0, 24), *given).shape == (0, 74)
    weights, _ = _maps(0, torch.float32)
    added = layouts.biases(biases, weights)
    made = torch.ops.attnopt.few_rows(
        torch.randn(2, 0), layouts.panels(weights), added, [0, 0], OUTS, 0
    )
    assert_close(made, torch.cat(_linear(torch.randn(2, 0), weights, biases), -1))


def test_few_rows_says_what_does_not_fit() -> None:
    few, x = torch.ops.attnopt.few_rows, torch.randn(2, 24)
    weights, biases = _maps(24, torch.float32)
    packed, added = layouts.panels(weights), layouts.biases(biases, weights)
    for wrong in (packed[:, 1:], packed[1:], packed.mT, packed.flatten()):
        with pytest.raises(RuntimeError, match=r"few_rows: weights .* are not those of 24 inputs"):
            few(x, wrong, added, [0, 0], OUTS, 0)
    with pytest.raises(RuntimeError, match="inputs are float32, not Double"):
        few(x.double(), packed, added, [0, 0], OUTS, 0)
    with pytest.raises(RuntimeError, match="weights are float32, float16 or bfloat16, not Double"):
        few(x, packed.double(), added, [0, 0], OUTS, 0)
    for wrong in (added[1:], added.double()):
        with pytest.raises(RuntimeError, match="biases are not float32"):
            few(x, packed, wrong, [0, 0], OUTS, 0)


def test_maps_lie_one_behind_the_other() -> None:
    """Where a call's weights and biases begin, of those of others."""
    x, weights = torch.randn(5, 24), [torch.randn(out, 24) for out in (33, 64)]
    added: list[Tensor | None] = [torch.randn(33), torch.randn(64)]
    for name, layout in (("few_rows", layouts.panels), ("many_rows", layouts.tiles)):
        if name == "many_rows" and not torch.ops.attnopt.matrix_units():
            continue
        run = getattr(torch.ops.attnopt, name)
        first, second = (layout([weight]) for weight in weights)
        both, biases = torch.cat((first, second)), layouts.biases(added, weights)
        at = [len(first), 64]
        want = _linear(x, weights, added)[1]
        assert_close(run(x, both, biases, at, [64], 0), want)
        assert_close(run(x, both, None, at, [64], 0), _linear(x, weights, [None, None])[1])
        for wrong in ([-1, 0], [0, -1], [0], [0, 0, 0]):
            with pytest.raises(RuntimeError, match=f"{name}: weights and biases begin at"):
                run(x, both, biases, wrong, [64], 0)
        for beyond in (at[0] + 1, 2**63 - 1):
            with pytest.raises(RuntimeError, match=r"not those of 24 inputs and .* outputs from"):
                run(x, both, biases, [beyond, 64], [64], 0)
        for beyond in (65, 2**63 - 1):
            with pytest.raises(RuntimeError, match=f"biases are not float32, 64 from {beyond} on"):
                run(x, both, biases, [at[0], beyond], [64], 0)


GATES = {1: F.silu, 2: lambda x: F.gelu(x, approximate="tanh")}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("rows", [1, 8, 9, 70])
@pytest.mark.parametrize("out", [32, 50, 640])
@pytest.mark.parametrize("kept", [torch.float32, torch.float16])
def test_a_map_gates_another(gate: int, rows: int, out: int, kept: torch.dtype) -> None:
    x = 4 * torch.randn(rows, 100)
    weights = [torch.randn(out, 100).to(kept).float() for _ in range(2)]
    biases: list[Tensor | None] = [torch.randn(out), None]
    gates, others = _linear(x, weights, biases)
    want = GATES[gate](gates) * others
    both = [layouts.paired(*weights)]
    added = layouts.paired(*layouts.biases(biases, weights).chunk(2))
    few = torch.ops.attnopt.few_rows(x, layouts.panels(both), added, [0, 0], [out], gate)
    scale = want.abs().max()
    assert_close(few / scale, want / scale)
    if torch.ops.attnopt.matrix_units():
        many = torch.ops.attnopt.many_rows(x, layouts.tiles(both), added, [0, 0], [out], gate)
        assert_close(many / scale, want / scale)


def test_gates_of_what_is_large_and_what_is_no_number() -> None:
    inf, nan = float("inf"), float("nan")
    weights, x = layouts.panels([torch.zeros(64, 1)]), torch.ones(1, 1)
    for gate, form in GATES.items():
        for value in (-3e38, -90.0, -1e-30, 0.0, 1e-30, 90.0, 3e38, inf, -inf, nan):
            added = torch.tensor([value] * 32 + [1.0] * 32)
            made = torch.ops.attnopt.few_rows(x, weights, added, [0, 0], [32], gate)
            want = form(torch.full((1, 32), value))
            assert torch.equal(made.isnan(), want.isnan()), value
            assert_close(
                made.nan_to_num(0.0, 3.3e38, -3.3e38), want.nan_to_num(0.0, 3.3e38, -3.3e38)
            )
    with pytest.raises(RuntimeError, match="few_rows: no gate is 3"):
        torch.ops.attnopt.few_rows(x, weights, added, [0, 0], [32], 3)


@pytest.fixture
def units() -> None:
    if not torch.ops.attnopt.matrix_units():
        pytest.skip("a processor without matrix units")


@pytest.mark.usefixtures("units")
@pytest.mark.parametrize("rows", [1, 31, 33, 300])
@pytest.mark.parametrize("ins", [5, 64, 250])
@pytest.mark.parametrize("kept", [torch.float32, torch.float16, torch.bfloat16])
def test_many_rows_is_linear(rows: int, ins: int, kept: torch.dtype) -> None:
    x = torch.randn(rows, 2, ins)[:, -1:]
    weights, biases = _maps(ins, kept)
    packed = layouts.tiles(weights)
    parts = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 1}
    assert packed.shape[1] == parts[kept]
    made = torch.ops.attnopt.many_rows(x, packed, layouts.biases(biases, weights), [0, 0], OUTS, 0)
    assert_close(made, torch.cat(_linear(x, weights, biases), -1))


@pytest.mark.usefixtures("units")
def test_many_rows_is_as_near_as_torch() -> None:
    """A product of parts loses no more than one of float32, of numbers of all sizes."""
    x, weight = (torch.randn(200, 512) * 2.0 ** torch.randint(-20, 20, (200, 512)) for _ in "xw")
    given = layouts.tiles([weight]), None, [0, 0], [200], 0
    made = torch.ops.attnopt.many_rows(x, *given)
    exact = x.double() @ weight.double().T
    sizes = x.double().abs() @ weight.double().abs().T
    lost, torchs = ((each - exact).abs() / sizes for each in (made, F.linear(x, weight)))
    assert lost.max() < 1.5 * torchs.max()
    assert lost.mean() < 1.5 * torchs.mean()


@pytest.mark.usefixtures("units")
def test_many_rows_keeps_to_the_row_what_is_no_number() -> None:
    weights, biases = _maps(24, torch.float32)
    x = torch.randn(40, 24)
    x[3, 5], x[35, 23] = float("nan"), float("inf")
    given = layouts.tiles(weights), layouts.biases(biases, weights), [0, 0], OUTS, 0
    outputs = torch.ops.attnopt.many_rows(x, *given).split(OUTS, -1)
    for made, want in zip(outputs, _linear(x, weights, biases), strict=True):
        whole = want.isfinite().all(1)
        assert whole.tolist() == [i not in (3, 35) for i in range(40)]
        assert_close(made[whole], want[whole])
        assert made[~whole].isnan().all()  # where torch has infinite numbers too


@pytest.mark.usefixtures("units")
def test_many_rows_says_what_does_not_fit() -> None:
    many, x = torch.ops.attnopt.many_rows, torch.randn(2, 24)
    weights, biases = _maps(24, torch.float32)
    packed, added = layouts.tiles(weights), layouts.biases(biases, weights)
    odd = [packed[1:], packed.float(), packed.flatten(), packed[:, :0]]
    odd += [packed[..., :16], packed[..., :8, :], packed[:, :, :1], packed.mT]
    for wrong in (*(x.contiguous() for x in odd[:-1]), odd[-1]):
        with pytest.raises(RuntimeError, match=r"many_rows: weights .* are not those of 24 inputs"):
            many(x, wrong, added, [0, 0], OUTS, 0)
    with pytest.raises(RuntimeError, match="inputs are float32, not Double"):
        many(x.double(), packed, added, [0, 0], OUTS, 0)
    with pytest.raises(RuntimeError, match="biases are not float32"):
        many(x, packed, added[1:], [0, 0], OUTS, 0)
    assert many(x[:0], packed, added, [0, 0], OUTS, 0).shape == (0, sum(OUTS))


@pytest.mark.parametrize(
    "batch, heads, kv_heads, rows, keys, dim, v_dim",
    [
        (1, 1, 1, 1, 1, 16, 16),
        (2, 4, 4, 70, 70, 32, 32),
        (1, 3, 1, 300, 300, 64, 64),  # more than a block of keys, heads that share them
        (1, 6, 2, 25, 600, 33, 17),  # the last of many tokens, columns left over
        (3, 2, 2, 5, 9, 48, 176),
        (1, 2, 1, 32, 32, 8, 8),  # as many rows as matrix units take together
        (1, 5, 5, 33, 800, 72, 100),
        (2, 2, 2, 257, 257, 128, 40),
    ],
)
def test_prompt_is_causal_attention(
    batch: int, heads: int, kv_heads: int, rows: int, keys: int, dim: int, v_dim: int
) -> None:
    q = torch.randn(batch, rows, heads, dim).transpose(1, 2)
    k, v = (torch.randn(batch, kv_heads, keys + 3, d)[:, :, :keys] for d in (dim, v_dim))
    made = torch.ops.attnopt.prompt(q, k, v, dim**-0.5)
    assert made.shape == (batch, heads, rows, v_dim)
    assert_close(made, _causal(q, k, v, dim**-0.5))


@pytest.mark.parametrize("at", [0, 1, 255, 256, 299])
@pytest.mark.parametrize("odd", [float("nan"), float("-inf"), 300.0, 1e30])
def test_prompt_of_scores_that_are_far_apart(at: int, odd: float) -> None:
    """No NaN is hidden, keys of scores -inf have no share, and others may have all of it."""
    q, (k, v) = torch.ones(1, 1, 300, 16), torch.randn(2, 1, 1, 300, 16)
    k[:, :, at] = odd
    made, want = torch.ops.attnopt.prompt(q, k, v, 0.25), _causal(q, k, v, 0.25)
    assert torch.equal(made.isnan(), want.isnan())
    assert_close(made.nan_to_num(), want.nan_to_num())


def test_prompt_of_a_block_of_scores_that_are_minus_infinity() -> None:
    q, (k, v) = torch.ones(1, 1, 300, 16), torch.randn(2, 1, 1, 300, 16)
    k[:, :, :270] = float("-inf")
    made, want = torch.ops.attnopt.prompt(q, k, v, 0.25), _causal(q, k, v, 0.25)
    assert torch.equal(made.isnan(), want.isnan())
    assert_close(made[:, :, 270:], want[:, :, 270:])


def test_prompt_of_views_and_of_nothing_and_what_does_not_fit() -> None:
    q, (k, v) = torch.randn(2, 6, 30, 8), torch.randn(2, 2, 1, 30, 8)
    spread = [x.expand(2, 6, 30, 8) for x in (k, v)]  # heads, and so strides of zero
    assert_close(torch.ops.attnopt.prompt(q, *spread, 0.3), _causal(q, *spread, 0.3))
    across = [x.mT.contiguous().mT for x in (q, *spread)]  # whose last dimension is not dense
    assert_close(torch.ops.attnopt.prompt(*across, 0.3), _causal(*across, 0.3))
    assert torch.ops.attnopt.prompt(q[:0], k[:0], v[:0], 0.3).shape == (0, 6, 30, 8)
    assert torch.ops.attnopt.prompt(q[:, :, :0], k, v, 0.3).shape == (2, 6, 0, 8)
    assert torch.ops.attnopt.prompt(q[:1, :, :0], k[:1], v[:1], 0.3).shape == (1, 6, 0, 8)
    for wrong in ((q, k[:, :, 1:], v), (q[..., 1:], k, v), (q, k[:, :, 5:], v[:, :, 5:])):
        with pytest.raises(RuntimeError, match="do not fit"):
            torch.ops.attnopt.prompt(*wrong, 0.3)
    with pytest.raises(RuntimeError, match="are float32"):
        torch.ops.attnopt.prompt(q.double(), k, v, 0.3)


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
from attnopt.compiler.native import layouts
from tests.tolerance import assert_close

assert native.ready() == "", native.ready()
torch.manual_seed(0)
for rows, keys, dim in ((1, 3, 5), (2, 65, 24), (7, 400, 40)):
    q, k, v = torch.randn(2, 2, rows, dim), *torch.randn(2, 2, 2, keys, dim)
    want = (q.double() @ k.double().mT).softmax(-1) @ v.double()
    assert_close(torch.ops.attnopt.one_token(q, k, v, 1.0), want)
    x, w = torch.randn(rows, dim), torch.randn(33, dim).bfloat16().float() / 4
    few = torch.ops.attnopt.few_rows(x, layouts.panels([w]), None, [0, 0], [33], 0)
    assert_close(few, x.double() @ w.double().T)
    seen = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
    scores = (q.double() @ k.double().mT).masked_fill(~seen, float("-inf"))
    assert_close(torch.ops.attnopt.prompt(q, k, v, 1.0), scores.softmax(-1) @ v.double())
assert torch.ops.attnopt.matrix_units() is False
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


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q.double() @ k.mT * scale
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1 + k.shape[2] - q.shape[2])
    # A key that is not seen has no part in it, whatever it is.
    return scores.masked_fill(later, float("-inf")).softmax(-1) @ v


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    scores = q.double() @ k.double().transpose(-1, -2) * scale
    return scores.softmax(-1) @ v.double()


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
