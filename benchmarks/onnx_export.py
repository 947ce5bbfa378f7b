"""ONNX in, ONNX out: what `attnopt export` writes, in ONNX Runtime, against the same model under
ONNX Runtime's own graph optimizer and under its optimizer for transformers."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.autotune.optimize import optimize
from attnopt.autotune.timing import Contender, compare
from attnopt.compiler.artifact import program_of
from attnopt.compiler.onnx.write import write_onnx
from attnopt.compiler.pipeline import read
from attnopt.compiler.program import Batch
from benchmarks.run import Row

ROWS, LENGTH, LAYERS, VOCABULARY = 4, 512, 4, 2048
_SIZES: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8,
    "vocab_size": VOCABULARY, "max_position_embeddings": 1024,
}  # fmt: skip


class _Decoder(nn.Module):
    """A model of transformers that takes tokens and gives logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.hf = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits for tokens [batch, seq]."""
        found: Tensor = self.hf(input_ids=input_ids).logits
        return found


class _Encoder(nn.Module):
    """A model of transformers that takes tokens and a mask and gives states."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.hf = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """States for tokens [batch, seq]."""
        made = self.hf(input_ids=input_ids, attention_mask=attention_mask)
        found: Tensor = made.last_hidden_state
        return found


def rows(batch: int = ROWS, length: int = LENGTH, layers: int = LAYERS) -> list[Row]:
    """A decoder with grouped heads and an encoder, each against both optimizers."""
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    sizes = {**_SIZES, "num_hidden_layers": layers}
    llama = LlamaConfig(**sizes, num_key_value_heads=2, use_cache=False)
    bert = BertConfig(**sizes)
    # Each from the exporter whose spelling ONNX Runtime's optimizer knows best.
    cases: list[tuple[str, str, Callable[[], nn.Module]]] = [
        ("Llama-shaped, 8/2 heads", "gpt2", lambda: _Decoder(LlamaForCausalLM(_eager(llama)))),
        ("BERT-shaped, 8 heads", "bert", lambda: _Encoder(BertModel(_eager(bert)))),
    ]
    found: list[Row] = []
    for name, kind, build in cases:
        torch.manual_seed(0)
        model = build().eval()
        inputs = {"input_ids": torch.randint(0, VOCABULARY, (batch, length))}
        if kind == "bert":
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        found += _case(f"{name}, {layers}x512, {batch}x{length} tokens", kind, model, inputs)
    return found


def _eager(config: Any) -> Any:
    config._attn_implementation = "eager"
    return config


def _case(name: str, kind: str, model: nn.Module, inputs: dict[str, Tensor]) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        given, fused, ours = (home / f"{part}.onnx" for part in ("given", "fused", "ours"))
        _export(model, inputs, given, older=kind == "bert")
        torch.save(inputs, home / "inputs.pt")
        optimize(
            given, inputs=home / "inputs.pt", max_drop=0.0, effort="none", out=home / "run"
        )  # fmt: skip
        written = write_onnx(read(program_of(home / "run")), ours)
        nodes = _fuse(given, kind, fused)
        contenders = [
            Contender(part, _session(path))
            for part, path in (("attnopt", ours), ("graph optimizer", given), ("fused", fused))
        ]
        timing = compare(contenders, [Batch((), inputs)], seconds=20.0)
    against = [timing.ratio("attnopt", other) for other in ("graph optimizer", "fused")]
    figure = "; ".join(
        f"{r.value:.2f}x ({r.interval.low:.2f} to {r.interval.high:.2f}) over {words}"
        for r, words in zip(
            against,
            ("ORT_ENABLE_ALL", f"onnxruntime.transformers ({nodes} attentions fused)"),
            strict=True,
        )
    )
    numbers = {
        "ratios": [r.as_json() for r in against],
        "attentions": written.attentions,
        "fused_by_onnxruntime": nodes,
        "error": written.error,
        "seconds": {part: timing.median(part) for part in timing.samples},
    }
    return [Row(name, figure, numbers=numbers)]


def _export(model: nn.Module, inputs: dict[str, Tensor], path: Path, *, older: bool) -> None:
    auto = torch.export.Dim.DYNAMIC
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if older:
            torch.onnx.export(
                model, tuple(inputs.values()), str(path), dynamo=False, opset_version=17,
                input_names=list(inputs), output_names=["last_hidden_state"],
                dynamic_axes={name: {0: "batch", 1: "length"} for name in inputs},
            )  # fmt: skip
            return
        torch.onnx.export(
            model, (), str(path), kwargs=inputs, dynamo=True, opset_version=18,
            dynamic_shapes={name: {0: auto, 1: auto} for name in inputs},
            external_data=False, verbose=False,
        )  # fmt: skip


def _fuse(given: Path, kind: str, fused: Path) -> int:
    """Write what ONNX Runtime's optimizer for transformers makes; answers its fused attentions."""
    from onnxruntime.transformers import optimizer

    made = optimizer.optimize_model(
        str(given), model_type=kind, num_heads=8, hidden_size=512, opt_level=0
    )
    made.save_model_to_file(str(fused))
    return sum(node.op_type.endswith("Attention") for node in made.model.graph.node)


def _session(path: Path) -> Callable[..., list[Tensor]]:
    """A file in ONNX Runtime with all of its graph optimizations, called like the model."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]

    def call(**inputs: Tensor) -> list[Tensor]:
        arrays = {name: inputs[name].numpy() for name in names}
        return [torch.from_numpy(array) for array in session.run(None, arrays)]

    return call
