"""Each operator of the table against ONNX Runtime, and the table against what is tested here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attnopt.compiler.onnx import read_onnx
from attnopt.compiler.onnx.table import names
from tests.onnx_files import MICROSOFT, answers, assert_as_runtime, node, save

_DRAW = np.random.default_rng(0)


def _f(*shape: int) -> Any:
    return _DRAW.standard_normal(shape).astype(np.float32)


def _i(*numbers: int) -> Any:
    return np.array(numbers, np.int64)


def _fit(operator: str) -> Any:
    """X, without what an operator has no number for."""
    return np.abs(X) + 0.1 if operator in ("Sqrt", "Log") else X


X, W = _f(3, 4, 6), _f(4, 6)
IMAGE = _f(2, 4, 7, 6)
WHOLE = _DRAW.integers(-9, 9, (3, 4, 6))
TRUTH = _DRAW.integers(0, 2, (3, 4, 6)).astype(bool)
UNARY = [
    "Neg",
    "Abs",
    "Sqrt",
    "Reciprocal",
    "Floor",
    "Ceil",
    "Exp",
    "Log",
    "Erf",
    "Sin",
    "Cos",
    "Tan",
    "Tanh",
    "Sigmoid",
    "Relu",
    "Softplus",
    "Softsign",
    "HardSwish",
    "Mish",
    "Sign",
    "Round",
    "IsNaN",
    "Identity",
    "HardSigmoid",
    "Elu",
    "LeakyRelu",
    "Gelu",
    "IsInf",
    "Dropout",
]
BINARY = [
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Min",
    "Max",
    "Sum",
    "Mean",
    "Equal",
    "Less",
    "LessOrEqual",
    "Greater",
    "GreaterOrEqual",
]
REDUCTIONS = [
    "ReduceMean",
    "ReduceSum",
    "ReduceMax",
    "ReduceMin",
    "ReduceProd",
    "ReduceL1",
    "ReduceL2",
    "ReduceSumSquare",
    "ReduceLogSumExp",
]

# operator, opset, inputs that are fed (a name each), constants, attributes
Case = tuple[str, int, Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]
CASES: list[Case] = [
    *((name, 20, {"a": _fit(name)}, {}, {}) for name in UNARY),
    *((name, 18, {"a": X, "b": W}, {}, {}) for name in BINARY),
    *((name, 18, {"a": X}, {"axes": _i(1, -1)}, {"keepdims": 0}) for name in REDUCTIONS),
    ("ReduceLogSum", 18, {"a": np.abs(X)}, {"axes": _i(1)}, {}),
    ("ReduceMean", 17, {"a": X}, {}, {"axes": [-1], "keepdims": 1}),
    ("Swish", 24, {"a": X}, {}, {"alpha": 1.5}),
    ("Gelu", 20, {"a": X}, {}, {"approximate": "tanh"}),
    ("Div", 21, {"a": WHOLE}, {"b": np.int64(4)}, {}),
    ("Div", 21, {"a": np.float32(2.0).reshape(1), "b": X}, {}, {}),
    ("Sub", 21, {"b": X}, {"a": np.float32(1.5)}, {}),
    ("Less", 21, {"b": X}, {"a": np.float32(0.5)}, {}),
    ("Mod", 21, {"a": WHOLE}, {"b": np.int64(5)}, {}),
    ("Mod", 21, {"a": X, "b": np.abs(W) + 1}, {}, {"fmod": 1}),
    ("Pow", 21, {"a": np.abs(X)}, {"b": np.float32(1.5)}, {}),
    ("Clip", 21, {"a": X}, {"low": np.float32(-0.5), "high": np.float32(0.5)}, {}),
    ("Not", 21, {"a": TRUTH}, {}, {}),
    *((name, 21, {"a": TRUTH, "b": ~TRUTH[:, :1]}, {}, {}) for name in ("And", "Or", "Xor")),
    *((name, 21, {"a": WHOLE, "b": WHOLE + 3}, {}, {}) for name in ("BitwiseAnd", "BitwiseOr")),
    ("BitwiseNot", 21, {"a": WHOLE}, {}, {}),
    ("Where", 21, {"c": TRUTH, "a": X}, {"b": np.float32(-1e4)}, {}),
    ("Where", 21, {"c": TRUTH}, {"a": np.float32(0), "b": np.float32(-1e4)}, {}),
    ("Cast", 21, {"a": X * 3}, {}, {"to": 7}),
    ("CastLike", 21, {"a": WHOLE, "b": X}, {}, {}),
    ("Transpose", 21, {"a": X}, {}, {"perm": [2, 0, 1]}),
    ("Transpose", 21, {"a": X}, {}, {}),
    ("Reshape", 21, {"a": X}, {"shape": _i(0, 2, -1)}, {}),
    ("Flatten", 21, {"a": X}, {}, {"axis": 2}),
    ("Squeeze", 21, {"a": X[:1]}, {"axes": _i(0)}, {}),
    ("Unsqueeze", 21, {"a": X}, {"axes": _i(0, -1)}, {}),
    ("Concat", 21, {"a": X, "b": X[:, :2]}, {}, {"axis": 1}),
    ("Expand", 21, {"a": X[:, :1]}, {"shape": _i(2, 1, 5, 6)}, {}),
    ("Tile", 21, {"a": X}, {"n": _i(1, 2, 3)}, {}),
    ("Shape", 21, {"a": X}, {}, {"start": 1}),
    ("Size", 21, {"a": X}, {}, {}),
    ("EyeLike", 21, {"a": W}, {}, {"k": 1}),
    ("Pad", 21, {"a": X}, {"pads": _i(0, 1, 2, 0, 0, 3), "v": np.float32(7)}, {}),
    ("Pad", 21, {"a": IMAGE}, {"pads": _i(0, 0, 1, 2, 0, 0, 3, 1)}, {"mode": "reflect"}),
    ("Gather", 21, {"a": X}, {"i": _i(1, 3, 0)}, {"axis": 1}),
    ("Gather", 21, {"a": W, "i": np.array([[0, 3], [1, 1]])}, {}, {}),
    ("Gather", 21, {"a": X, "i": np.array([[-1, 2]])}, {}, {"axis": 2}),
    ("GatherElements", 21, {"a": X, "i": WHOLE % 6}, {}, {"axis": 2}),
    ("GatherND", 21, {"a": X, "i": np.array([[0, 1], [2, -1]])}, {}, {}),
    ("GatherND", 21, {"a": X, "i": np.array([[1], [0], [3]])}, {}, {"batch_dims": 1}),
    ("ScatterND", 21, {"a": W, "i": np.array([[0], [2]]), "u": W[:2]}, {}, {}),
    ("ScatterElements", 21, {"a": W, "i": np.array([[1, -1]]), "u": W[:1, :2]}, {}, {"axis": 1}),
    ("Slice", 21, {"a": X}, {"s": _i(1, -4), "e": _i(4, 2**62), "x": _i(1, 2), "t": _i(2, 1)}, {}),
    ("Slice", 21, {"a": X}, {"s": _i(-1), "e": _i(-(2**62)), "x": _i(1), "t": _i(-1)}, {}),
    ("Trilu", 21, {"a": X}, {"k": np.int64(1)}, {"upper": 0}),
    ("CumSum", 21, {"a": X}, {"axis": np.int64(1)}, {"exclusive": 1, "reverse": 1}),
    ("OneHot", 21, {"i": np.array([1, -1, 0])}, {"d": np.int64(4), "v": _f(2)}, {"axis": 0}),
    ("ArgMax", 21, {"a": X}, {}, {"axis": 1, "keepdims": 0}),
    ("ArgMin", 21, {"a": X}, {}, {"axis": 2}),
    ("MatMul", 21, {"a": X}, {"w": _f(6, 5)}, {}),
    ("MatMul", 21, {"a": X, "b": _f(3, 6, 2)}, {}, {}),
    ("Gemm", 21, {"a": W}, {"w": _f(5, 6), "c": _f(5)}, {"transB": 1}),
    ("Gemm", 21, {"a": W, "b": _f(4, 3), "c": _f(1, 3)}, {},
     {"transA": 1, "alpha": 2.0, "beta": 0.5}),
    ("Einsum", 21, {"a": X, "b": X}, {}, {"equation": "bij, bkj -> bik"}),
    ("Softmax", 21, {"a": X}, {}, {"axis": 1}),
    ("LogSoftmax", 21, {"a": X}, {}, {}),
    ("LayerNormalization", 21, {"a": X}, {"s": _f(6), "b": _f(6)}, {"epsilon": 1e-3}),
    ("LayerNormalization", 21, {"a": X}, {"s": _f(4, 6)}, {"axis": 1}),
    ("RMSNormalization", 23, {"a": X}, {"s": _f(6)}, {}),
    ("BatchNormalization", 21, {"a": IMAGE},
     {"s": _f(4), "b": _f(4), "m": _f(4), "v": _f(4) ** 2}, {}),
    ("InstanceNormalization", 21, {"a": IMAGE}, {"s": _f(4), "b": _f(4)}, {}),
    ("GroupNormalization", 21, {"a": IMAGE}, {"s": _f(4), "b": _f(4)}, {"num_groups": 2}),
    ("GroupNormalization", 18, {"a": IMAGE}, {"s": _f(2), "b": _f(2)}, {"num_groups": 2}),
    ("LpNormalization", 21, {"a": X}, {}, {"axis": 1, "p": 2}),
    ("Conv", 21, {"a": IMAGE}, {"w": _f(6, 2, 3, 3), "b": _f(6)},
     {"group": 2, "pads": [1, 0, 2, 1], "strides": [2, 1]}),
    ("Conv", 21, {"a": X}, {"w": _f(5, 4, 3)}, {"dilations": [2], "pads": [2, 2]}),
    ("Conv", 21, {"a": IMAGE}, {"w": _f(6, 4, 3, 2)},
     {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ("ConvTranspose", 21, {"a": X}, {"w": _f(4, 5, 3)}, {"strides": [2], "pads": [1, 1]}),
    ("MaxPool", 21, {"a": IMAGE}, {}, {"kernel_shape": [3, 2], "strides": [2, 1]}),
    ("AveragePool", 21, {"a": IMAGE}, {}, {"kernel_shape": [3, 2], "pads": [1, 1, 1, 1]}),
    ("GlobalAveragePool", 21, {"a": IMAGE}, {}, {}),
    ("Resize", 19, {"a": IMAGE}, {"": None, " ": None, "z": _i(2, 4, 14, 9)}, {"mode": "linear"}),
]  # fmt: skip
CONTRIB: list[Case] = [
    ("Gelu", 21, {"a": X}, {}, {}),
    ("BiasGelu", 21, {"a": X}, {"b": _f(6)}, {}),
    ("FastGelu", 21, {"a": X}, {"b": _f(6)}, {}),
    ("QuickGelu", 21, {"a": X}, {}, {"alpha": 1.702}),
    ("FusedMatMul", 21, {"a": X, "b": X}, {}, {"transB": 1, "alpha": 0.3}),
    ("SkipLayerNormalization", 21, {"a": X, "b": X[::-1]},
     {"g": _f(6), "e": _f(6), "i": _f(6)}, {}),
    ("SkipSimplifiedLayerNormalization", 21, {"a": X, "b": X[::-1]}, {"g": _f(6)}, {}),
]  # fmt: skip
# Tested elsewhere, or made here and never in a file.
OTHERS = {
    "Attention", "RotaryEmbedding", "com.microsoft.Attention", "com.microsoft.MultiHeadAttention",
    "com.microsoft.GroupQueryAttention", "com.microsoft.RotaryEmbedding", "attnopt.Linear",
    "attnopt.SafeSoftmax", "com.microsoft.EmbedLayerNormalization", "ConstantOfShape", "Range",
    "Constant", "Split", "TopK", "SimplifiedLayerNormalization",
}  # fmt: skip


def _check(case: Case, domain: str, folder: Path) -> None:
    operator, opset, fed, constants, attributes = case
    fed = {name: np.ascontiguousarray(value) for name, value in fed.items()}
    inputs = {name: (value.dtype, [None] * value.ndim) for name, value in fed.items()}
    known = {name: value for name, value in constants.items() if value is not None}
    order = "cab" if operator == "Where" else ""
    every = sorted([*fed, *constants], key=order.find) if order else [*fed, *constants]
    every = sorted(every) if operator in ("Sub", "Less") else every
    made = node(operator, [name.strip() for name in every], domain=domain, **attributes)
    path = save(folder / "one.onnx", [made], inputs, known, opset=opset)  # type: ignore[arg-type]
    found = read_onnx(path)(*(torch.from_numpy(value) for value in fed.values()))["y"]
    assert_as_runtime(found, answers(path, fed)[0])


@pytest.mark.parametrize("case", CASES, ids=[f"{case[0]}-{i}" for i, case in enumerate(CASES)])
def test_standard_operators(case: Case, tmp_path: Path) -> None:
    _check(case, "", tmp_path)


@pytest.mark.parametrize("case", CONTRIB, ids=[case[0] for case in CONTRIB])
def test_operators_of_onnx_runtime(case: Case, tmp_path: Path) -> None:
    _check(case, MICROSOFT, tmp_path)


@pytest.mark.parametrize(
    "made",
    [
        node("Split", ["x"], ["y", "z"], axis=1, num_outputs=2),
        node("TopK", ["x", "k"], ["y", "z"], axis=1),
        node("Split", ["x", "lengths"], ["y", "z"], axis=2),
    ],
    ids=["equal parts", "top", "lengths"],
)
def test_two_outputs(made: Any, tmp_path: Path) -> None:
    constants = {"k": _i(2), "lengths": _i(2, 4)}
    used = {name: constants[name] for name in made.input if name in constants}
    inputs = {"x": (np.float32, [3, 4, 6])}
    path = save(tmp_path / "two.onnx", [made], inputs, used, outputs=("y", "z"))
    found = read_onnx(path)(torch.from_numpy(X))
    for mine, theirs in zip(found.values(), answers(path, {"x": X}), strict=True):
        assert_as_runtime(mine, theirs)


def test_every_operator_is_tested() -> None:
    tested = {case[0] for case in CASES} | {f"{MICROSOFT}.{case[0]}" for case in CONTRIB}
    assert set(names()) - tested == OTHERS
