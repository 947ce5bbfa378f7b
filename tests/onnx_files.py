"""Small ONNX files, by hand or by torch's exporter, and ONNX Runtime to hold them against."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")

Arrays = Mapping[str, Any]
Shape = Sequence[int | str]
MICROSOFT = "com.microsoft"


def node(operator: str, inputs: Sequence[str], outputs: Sequence[str] = ("y",), **more: Any) -> Any:
    """One node; `domain` and attributes by name."""
    return onnx.helper.make_node(operator, list(inputs), list(outputs), **more)


def save(
    path: Path, nodes: Sequence[Any], inputs: Mapping[str, tuple[Any, Shape]],
    constants: Arrays | None = None, outputs: Sequence[str] = ("y",), opset: int = 21,
) -> Path:  # fmt: skip
    """Write a graph; `inputs` gives the numpy dtype and the sizes of each, names where open."""
    kinds = onnx.helper.np_dtype_to_tensor_dtype
    graph = onnx.helper.make_graph(
        nodes,
        path.stem,
        [
            onnx.helper.make_tensor_value_info(name, kinds(np.dtype(dtype)), list(shape))
            for name, (dtype, shape) in inputs.items()
        ],
        [onnx.helper.make_empty_tensor_value_info(name) for name in outputs],
        [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in (constants or {}).items()],
    )
    imports = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(MICROSOFT, 1)]
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)
    onnx.save(model, path)
    return path


def answers(path: Path, feeds: Mapping[str, Any], optimize: bool = True) -> list[Tensor]:
    """What ONNX Runtime computes."""
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    if not optimize:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    arrays = {name: np.asarray(feeds[name]) for name in names}
    return [torch.from_numpy(np.asarray(found)) for found in session.run(None, arrays)]


def assert_as_runtime(found: Tensor, wanted: Tensor) -> None:
    """Float32 within 1e-5 of the root mean square; other kinds exactly."""
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    if not wanted.is_floating_point():
        assert torch.equal(found, wanted)
        return
    apart = (found.double() - wanted.double()).abs().max()
    rms = wanted.double().square().mean().sqrt()
    assert apart <= 1e-5 * rms + 1e-12, f"{apart / rms:.1e} of the rms"


def old_export(model: nn.Module, inputs: Mapping[str, Tensor], path: Path, output: str) -> Path:
    """A module through torch's older exporter, opset 17, batch and length open."""
    axes: dict[str, dict[int, str]] = {name: {0: "batch", 1: "length"} for name in inputs}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, tuple(inputs.values()), str(path), dynamo=False, opset_version=17,
            input_names=list(inputs), output_names=[output], dynamic_axes=axes, verbose=False,
        )  # fmt: skip
    return path


class Decoder(nn.Module):
    """Two pre-norm layers of grouped causal attention, written out, over a table of tokens."""

    def __init__(self, window: int = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.layers = nn.ModuleList(_Layer(window) for _ in range(2))
        self.head = nn.Linear(32, 40, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(x)
        return logits


class _Layer(nn.Module):
    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self.norm, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)
        self.out, self.up, self.down = nn.Linear(32, 32), nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (
            part.reshape(x.shape[0], x.shape[1], -1, 8).transpose(1, 2)
            for part in (self.q(h), self.k(h), self.v(h))
        )
        k, v = (
            part[:, :, None].expand(-1, -1, 2, -1, -1).reshape(x.shape[0], 4, x.shape[1], 8)
            for part in (k, v)
        )
        scores = q @ k.transpose(-1, -2) * 8**-0.5
        i, j = torch.arange(x.shape[1])[:, None], torch.arange(x.shape[1])[None, :]
        keep = (j <= i) & (i - j < self.window) if self.window else j <= i
        scores = scores.masked_fill(~keep, torch.finfo(torch.float32).min)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)
        x = x + self.out(mixed)
        y: Tensor = x + self.down(torch.relu(self.up(self.norm2(x))))
        return y


def decoder(path: Path, window: int = 0) -> Path:
    """The decoder as an ONNX file: `input_ids` [batch, length] to `logits`."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 40, (2, 11))
    return old_export(Decoder(window).eval(), {"input_ids": tokens}, path, "logits")
