"""The fused attentions against ONNX Runtime, and what raising finds of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attnopt.compiler.errors import Problem
from attnopt.compiler.inspect import inspect
from attnopt.compiler.onnx import read_onnx
from tests.onnx_files import MICROSOFT, answers, assert_as_runtime, node, save

HEADS, SHARED, DIM, ROWS, LENGTH = 4, 2, 16, 2, 7
WIDTH, NARROW = HEADS * DIM, SHARED * DIM
_DRAW = np.random.default_rng(0)


def _f(*shape: int) -> Any:
    return (0.3 * _DRAW.standard_normal(shape)).astype(np.float32)


_ANGLES = np.arange(32)[:, None] * 0.3 * np.arange(1, DIM // 2 + 1)[None]
TABLES = {"cos": np.cos(_ANGLES).astype(np.float32), "sin": np.sin(_ANGLES).astype(np.float32)}
PADDED = np.array([[1] * LENGTH, [1] * 4 + [0] * (LENGTH - 4)], np.int32)
KEEP = np.ones((ROWS, 1, LENGTH, LENGTH), bool)
KEEP[1, :, :, 5:] = False
KEEP[0, 0, 2] = False  # a query that reads nothing
Q, K, V = _f(ROWS, LENGTH, WIDTH), _f(ROWS, LENGTH, NARROW), _f(ROWS, LENGTH, NARROW)
PLACES = np.tile(np.arange(LENGTH), (ROWS, 1))


def _same(
    path: Path, made: Any, fed: Mapping[str, Any], constants: Mapping[str, Any], opset: int
) -> None:
    inputs = {k: (v.dtype, ["b", *[None] * (v.ndim - 1)]) for k, v in fed.items()}
    for name in ("q", "k", "v", "x"):
        if name in inputs:
            inputs[name] = (inputs[name][0], ["b", "s", fed[name].shape[2]])
    save(path, [made], inputs, constants, opset=opset)  # type: ignore[arg-type]
    found = read_onnx(path)(*(torch.from_numpy(value) for value in fed.values()))["y"]
    assert_as_runtime(found, answers(path, fed)[0])


STANDARD: list[tuple[Mapping[str, Any], Any]] = [
    ({}, None),
    ({"is_causal": 1}, None),
    ({"scale": 0.2}, KEEP),
    ({"is_causal": 1}, KEEP),
    ({"is_causal": 1, "softcap": 0.5}, _f(1, 1, LENGTH, LENGTH)),
]


@pytest.mark.parametrize("opset", [23, 24])
@pytest.mark.parametrize("case", STANDARD, ids=range(len(STANDARD)))  # type: ignore[arg-type]
def test_standard_attention(case: Any, opset: int, tmp_path: Path) -> None:
    attributes, mask = case
    fed = {"q": Q, "k": K, "v": V} | ({} if mask is None else {"m": mask})
    made = node("Attention", list(fed), q_num_heads=HEADS, kv_num_heads=SHARED, **attributes)
    _same(tmp_path / "a.onnx", made, fed, {}, opset)


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("mask", [None, PADDED, PADDED.sum(1).astype(np.int32)])
def test_packed_attention(mask: Any, causal: int, tmp_path: Path) -> None:
    fed = {"x": Q} | ({} if mask is None else {"m": mask})
    constants = {"w": _f(WIDTH, 3 * WIDTH), "b": _f(3 * WIDTH)}
    made = node(
        "Attention", ["x", "w", "b", *(["m"] if mask is not None else [])],
        domain=MICROSOFT, num_heads=HEADS, unidirectional=causal,
    )  # fmt: skip
    _same(tmp_path / "a.onnx", made, fed, constants, 21)


def test_packed_attention_with_wide_values_and_bias(tmp_path: Path) -> None:
    constants = {"w": _f(WIDTH, 4 * WIDTH), "b": _f(4 * WIDTH), "a": _f(1, HEADS, LENGTH, LENGTH)}
    made = node(
        "Attention", ["x", "w", "b", "", "", "a"], domain=MICROSOFT, num_heads=HEADS,
        qkv_hidden_sizes=[WIDTH, WIDTH, 2 * WIDTH],
    )  # fmt: skip
    _same(tmp_path / "a.onnx", made, {"x": Q}, constants, 21)


@pytest.mark.parametrize("masked", [False, True])
def test_multi_head_attention_across(masked: bool, tmp_path: Path) -> None:
    fed = {"q": Q, "k": _f(ROWS, 9, WIDTH), "v": _f(ROWS, 9, WIDTH)}
    mask = np.ones((ROWS, 9), np.int32)
    mask[0, 6:] = 0
    inputs = ["q", "k", "v", "b"] + (["m"] if masked else [])
    fed |= {"m": mask} if masked else {}
    made = node("MultiHeadAttention", inputs, domain=MICROSOFT, num_heads=HEADS, scale=0.2)
    path, constants = tmp_path / "a.onnx", {"b": _f(3 * WIDTH)}
    shapes = {k: (v.dtype, [None] * v.ndim) for k, v in fed.items()}
    save(path, [made], shapes, constants)  # type: ignore[arg-type]
    found = read_onnx(path)(*(torch.from_numpy(value) for value in fed.values()))["y"]
    assert_as_runtime(found, answers(path, fed)[0])


def test_multi_head_attention_packed_and_not(tmp_path: Path) -> None:
    """ONNX Runtime has the packed layouts on GPUs only, so they are held against plain ones."""
    q, k, v = (_f(ROWS, LENGTH, HEADS, DIM) for _ in range(3))
    layouts = {
        "plain": {"q": q.reshape(Q.shape), "k": k.reshape(Q.shape), "v": v.reshape(Q.shape)},
        "qkv": {"q": np.stack((q, k, v), 3)},
        "kv": {"q": q.reshape(Q.shape), "k": np.stack((k, v), 3)},
        "heads first": {"q": q.reshape(Q.shape), "k": k.swapaxes(1, 2), "v": v.swapaxes(1, 2)},
    }
    found = {}
    for name, fed in layouts.items():
        made = node("MultiHeadAttention", list(fed), domain=MICROSOFT, num_heads=HEADS)
        shapes = {key: (value.dtype, [None] * value.ndim) for key, value in fed.items()}
        path = save(tmp_path / "a.onnx", [made], shapes)  # type: ignore[arg-type]
        tensors = (torch.from_numpy(np.ascontiguousarray(value)) for value in fed.values())
        found[name] = read_onnx(path)(*tensors)["y"]
    assert_as_runtime(found["plain"], answers(
        save(tmp_path / "a.onnx", [node("MultiHeadAttention", ["q", "k", "v"], domain=MICROSOFT,
                                        num_heads=HEADS)],
             {key: (np.float32, [None] * 3) for key in "qkv"}), layouts["plain"])[0])  # fmt: skip
    for name, made in found.items():
        assert torch.allclose(made, found["plain"], atol=1e-6), name


GROUPED: list[tuple[Mapping[str, Any], list[str]]] = [
    ({}, []),
    ({"do_rotary": 1}, ["cos", "sin"]),
    ({"do_rotary": 1, "rotary_interleaved": 1}, ["cos", "sin"]),
    ({"local_window_size": 3}, []),
    ({"softcap": 0.5, "scale": 0.3}, []),
    ({}, ["", "", "", "", "sinks"]),
]


def _grouped(attributes: Mapping[str, Any], more: list[str]) -> tuple[Any, dict[str, Any]]:
    constants = {
        "lengths": np.full(ROWS, LENGTH - 1, np.int32), "total": np.int32(LENGTH),
        **{k: v for k, v in {**TABLES, "sinks": _f(HEADS)}.items() if k in more},
    }  # fmt: skip
    made = node(
        "GroupQueryAttention", ["q", "k", "v", "", "", "lengths", "total", *more],
        domain=MICROSOFT, num_heads=HEADS, kv_num_heads=SHARED, **attributes,
    )  # fmt: skip
    return made, constants


@pytest.mark.parametrize("case", GROUPED, ids=range(len(GROUPED)))  # type: ignore[arg-type]
def test_group_query_attention(case: Any, tmp_path: Path) -> None:
    made, constants = _grouped(*case)
    _same(tmp_path / "a.onnx", made, {"q": Q, "k": K, "v": V}, constants, 21)


def test_group_query_attention_of_one_packed_tensor(tmp_path: Path) -> None:
    made, constants = _grouped({}, [])
    made.input[1] = made.input[2] = ""
    fed = {"q": np.concatenate((Q, K, V), 2)}
    _same(tmp_path / "a.onnx", made, fed, constants, 21)


@pytest.mark.parametrize("interleaved", [0, 1])
def test_rotary_embeddings(interleaved: int, tmp_path: Path) -> None:
    fed = {"q": Q, "p": PLACES}
    made = node(
        "RotaryEmbedding", ["q", "cos", "sin", "p"], num_heads=HEADS, interleaved=interleaved
    )
    _same(tmp_path / "a.onnx", made, fed, TABLES, 23)
    made = node(
        "RotaryEmbedding", ["q", "p", "cos", "sin"], domain=MICROSOFT, interleaved=interleaved
    )
    _same(tmp_path / "b.onnx", made, fed, TABLES, 21)
    _same(tmp_path / "c.onnx", made, {"q": Q, "p": np.array([3])}, TABLES, 21)


def test_part_of_the_channels_is_rotated(tmp_path: Path) -> None:
    tables = {name: table[:, :4] for name, table in TABLES.items()}
    made = node(
        "RotaryEmbedding", ["q", "cos", "sin", "p"], num_heads=HEADS, rotary_embedding_dim=8
    )
    _same(tmp_path / "a.onnx", made, {"q": Q, "p": PLACES}, tables, 23)


def _cached(operator: str, inputs: list[str], domain: str, **attributes: Any) -> Any:
    return node(operator, inputs, domain=domain, name="/layer.3/attn", **attributes)


@pytest.mark.parametrize(
    "made",
    [
        _cached("Attention", ["q", "q", "q", "", "c", "c"], "", q_num_heads=4, kv_num_heads=4),
        _cached("Attention", ["q", "w", "", "", "c"], MICROSOFT, num_heads=HEADS),
        _cached("MultiHeadAttention", ["q", "q", "q", "", "", "", "c", "c"], MICROSOFT,
                num_heads=4),
        _cached("GroupQueryAttention", ["q", "q", "q", "c", "c", "n", "n"], MICROSOFT,
                num_heads=4, kv_num_heads=4),
    ],
    ids=lambda made: str(made.op_type),
)  # fmt: skip
def test_a_cache_is_refused_by_name(made: Any, tmp_path: Path) -> None:
    constants = {"w": _f(WIDTH, 3 * WIDTH), "n": np.full(2, 1, np.int32)}
    inputs = {"q": (np.float32, ["b", "s", WIDTH]), "c": (np.float32, ["b", 4, "p", DIM])}
    path = save(tmp_path / "a.onnx", [made], inputs, constants, opset=23)
    with pytest.raises(Problem) as caught:
        read_onnx(path)(torch.from_numpy(Q), torch.zeros(ROWS, 4, 3, DIM))
    assert caught.value.code == "A126" and "cache" in caught.value.why
    assert "/layer.3/attn" in caught.value.what


def _model(folder: Path, attention: list[Any], constants: Mapping[str, Any], opset: int) -> Path:
    """Tokens, projections, an attention of `a`, and a product over its result `y`."""
    nodes = [
        node("Gather", ["table", "input_ids"], ["x"]),
        *(node("MatMul", ["x", f"w{name}"], [name]) for name in "qkv"),
        *attention,
        node("MatMul", ["y", "wo"], ["out"]),
        node("Add", ["x", "out"], ["z"]),
    ]
    weights = {
        "table": _f(50, WIDTH), "wq": _f(WIDTH, WIDTH), "wk": _f(WIDTH, NARROW),
        "wv": _f(WIDTH, NARROW), "wo": _f(WIDTH, WIDTH),
    }  # fmt: skip
    inputs = {"input_ids": (np.int64, ["batch", "length"])}
    return save(
        folder / "model.onnx", nodes, inputs, {**weights, **constants}, ("z",), opset
    )  # fmt: skip


WINDOW = {"local_window_size": 3}
RAISED = {
    "standard": (
        node("Attention", "qkv", q_num_heads=HEADS, kv_num_heads=SHARED, is_causal=1, name="att"),
        {}, "causal", "none", 23,
    ),
    "grouped": (*_grouped({"do_rotary": 1}, ["cos", "sin"]), "causal", "rotary(half, 16 dims)", 21),
    "window": (*_grouped(WINDOW, []), "window(left=3)", "none", 21),
    "capped": (*_grouped({"softcap": 0.5}, []), "causal", "none", 21),
}  # fmt: skip


@pytest.mark.parametrize("name", RAISED)
def test_fused_nodes_are_raised_with_their_facts(name: str, tmp_path: Path) -> None:
    made, constants, mask, position, opset = RAISED[name]
    found = inspect(_model(tmp_path, [made], constants, opset), time=False, batch=3, length=LENGTH)
    (row,) = found.sites
    assert row["raised"] and row["heads"] == HEADS and row["head_dim"] == DIM
    assert (row["mask"], row["position"], row["missing"]) == (mask, position, {})
    assert (made.name or made.op_type) in row["module"]
    assert found.program.dynamic["input_ids"].keys() == {0, 1}
    for shape in ((2, 9), (5, 4)):
        tokens = torch.randint(0, 50, shape)
        if name == "standard":
            wanted = answers(tmp_path / "model.onnx", {"input_ids": tokens})[0]
            assert_as_runtime(found.program(input_ids=tokens)["z"], wanted)
