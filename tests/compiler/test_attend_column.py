"""A bias of one number per key as a column of the keys, and when it may be one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attnopt.compiler import attend
from attnopt.compiler.attend_column import column, takes
from attnopt.compiler.bounds import moderate
from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.program import Program
from attnopt.compiler.raising import raise_program
from attnopt.compiler.spec import CAUSAL, FULL, AttentionSpec
from attnopt.compiler.trace import trace
from tests.programs import rewritten
from tests.tolerance import assert_close


def operands(spec: AttentionSpec, length: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((spec.heads, spec.head_dim), (spec.kv_heads, spec.head_dim),
             (spec.kv_heads, spec.v_dim))  # fmt: skip
    return [torch.randn(2, h, length, d, generator=generator, dtype=dtype) for h, d in sizes]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "v_dim", "shape"),
    [(4, 4, 8, (2, 4, 1, 33)), (4, 4, 9, (4, 1, 33)), (4, 2, 5, (1, 33)), (4, 1, 8, (1, 1, 1, 33))],
)
def test_it_is_the_reference(
    heads: int, kv_heads: int, v_dim: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    spec = AttentionSpec(heads, kv_heads, 8, v_dim, 0.3, CAUSAL, extras=("bias",))
    q, k, v = operands(spec, 33, dtype)
    bias = torch.randn(shape, dtype=dtype)
    assert takes(spec, q, bias)
    assert_close(column(q, k, v, [bias], spec), attend.reference(q, k, v, [bias], spec))


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (AttentionSpec(4, 4, 8, 8, 0.3, FULL, extras=("bias",)), (4, 1, 12)),
        (AttentionSpec(4, 4, 8, 8, 0.3, CAUSAL, extras=("bias",)), (4, 12, 12)),
        (AttentionSpec(4, 2, 8, 8, 0.3, CAUSAL, extras=("bias",)), (4, 1, 12)),
        (AttentionSpec(4, 4, 8, 10, 0.3, CAUSAL, extras=("bias",)), (4, 1, 12)),
    ],
)
def test_what_it_cannot_do_runs_as_before(spec: AttentionSpec, shape: tuple[int, ...]) -> None:
    q, k, v = operands(spec, 12, torch.float64)
    bias = torch.randn(shape, dtype=torch.float64)
    assert not takes(spec, q, bias)
    assert_close(column(q, k, v, [bias], spec), attend.reference(q, k, v, [bias], spec))


def test_half_precision_is_left_alone() -> None:
    spec = AttentionSpec(4, 4, 8, 8, 0.3, CAUSAL, extras=("bias",))
    q = torch.zeros(1, 4, 12, 8, dtype=torch.float16)
    assert not takes(spec, q, torch.zeros(4, 1, 12))


class Biased(nn.Module):
    """One causal attention with a bias per key that is made in one of several ways."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, 5)[:, None, None])

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)
        j = torch.arange(x.shape[1])
        bias = self.slopes * j
        if self.kind == "filled":
            bias = bias.masked_fill(j == 0, torch.finfo(x.dtype).min)
        if self.kind == "given":
            bias = bias + given[:, None, None, :]
        if self.kind == "huge":
            bias = bias * 1e30
        logits = q @ k.transpose(-1, -2) * 8**-0.5 + bias
        drop = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = logits.masked_fill(drop, torch.finfo(x.dtype).min).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(x.shape))


def biased(kind: str) -> Program:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 12, 32), "given": torch.zeros(2, 12)}
    return rewritten(
        raise_program(trace(Loaded(Biased(kind).eval(), None, (), inputs, "m", "callable")))
    )


@pytest.mark.parametrize(
    ("kind", "backend"),
    [("alibi", "column"), ("filled", "sdpa"), ("given", "sdpa"), ("huge", "sdpa")],
)
def test_only_a_moderate_bias_becomes_a_column(kind: str, backend: str) -> None:
    program = biased(kind)
    (node,) = program.attentions()
    spec = program.spec(program.sites[0])
    assert spec.backend == backend, spec
    bias = node.args[3][spec.extras.index("bias")]  # type: ignore[index]
    assert moderate(program, bias) == (kind == "alibi")  # type: ignore[arg-type]


def test_a_row_without_keys_is_what_it_was() -> None:
    """The first query may read one key, and the bias drops it: the mean over all keys."""
    program = biased("filled")
    model = Biased("filled").eval()
    model.load_state_dict({name: program.weight(name) for name in model.state_dict()})
    x, given = torch.randn(2, 9, 32), torch.zeros(2, 9)
    with torch.no_grad():
        assert_close(program(x=x, given=given), model(x, given))
