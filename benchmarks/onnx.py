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


class _Tokens(nn.Module):
    """A model of transformers that takes tokens and gives one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.hf = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits or states for tokens [batch, seq]."""
        made = self.hf(input_ids=input_ids)
        found: Tensor = made.logits if "logits" in made else made.last_hidden_state
        return found


def rows(batch: int = ROWS, length: int = LENGTH, layers: int = LAYERS) -> list[Row]:
    """A decoder with grouped heads and an encoder, each against both optimizers."""
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    sizes = {**_SIZES, "num_hidden_layers": layers}
    llama = LlamaConfig(**sizes, num_key_value_heads=2, use_cache=False)
    bert = BertConfig(**sizes)
    cases: list[tuple[str, str, Callable[[], nn.Module]]] = [
        ("Llama-shaped, 8/2 heads", "gpt2", lambda: LlamaForCausalLM(_eager(llama))),
        ("BERT-shaped, 8 heads", "bert", lambda: BertModel(_eager(bert))),
    ]
    found: list[Row] = []
    for name, kind, build in cases:
        torch.manual_seed(0)
        model = _Tokens(build()).eval()
        tokens = torch.randint(0, VOCABULARY, (batch, length))
        found += _case(f"{name}, {layers}x512, {batch}x{length} tokens", kind, model, tokens)
    return found


def _eager(config: Any) -> Any:
    config._attn_implementation = "eager"
    return config


def _case(name: str, kind: str, model: nn.Module, tokens: Tensor) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        given, fused, ours = (home / f"{part}.onnx" for part in ("given", "fused", "ours"))
        _export(model, tokens, given)
        torch.save({"input_ids": tokens}, home / "inputs.pt")
        optimize(
            given, inputs=home / "inputs.pt", max_drop=0.0, effort="none", out=home / "run"
        )  # fmt: skip
        written = write_onnx(read(program_of(home / "run")), ours)
        nodes = _fuse(given, kind, fused)
        contenders = [
            Contender(part, _session(path))
            for part, path in (("attnopt", ours), ("graph optimizer", given), ("fused", fused))
        ]
        timing = compare(contenders, [Batch((), {"input_ids": tokens})], seconds=20.0)
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


def _export(model: nn.Module, tokens: Tensor, path: Path) -> None:
    auto = torch.export.Dim.DYNAMIC
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (), str(path), kwargs={"input_ids": tokens}, dynamo=True, opset_version=18,
            dynamic_shapes={"input_ids": {0: auto, 1: auto}}, external_data=False, verbose=False,
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
    name = session.get_inputs()[0].name

    def call(input_ids: Tensor) -> list[Tensor]:
        return [torch.from_numpy(array) for array in session.run(None, {name: input_ids.numpy()})]

    return call
