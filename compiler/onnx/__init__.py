"""Reading ONNX: a file becomes a torch module, operator by operator; `read_onnx` does it all.

`read` parses, `linears` simplifies, `table` says which operators there are, `module` runs them.
"""

from __future__ import annotations

from pathlib import Path

from attnopt.compiler.onnx.linears import with_linears, with_safe_softmax
from attnopt.compiler.onnx.module import OnnxModule
from attnopt.compiler.onnx.read import read
from attnopt.compiler.onnx.table import check_supported

__all__ = ["OnnxModule", "read_onnx"]


def read_onnx(path: Path) -> OnnxModule:
    """The model of an ONNX file as a torch module in eval mode.

    Raises `Problem` A103 (damaged), A124 (onnx is missing), A125 (opset), A126 (operators), A128
    (types) and A129 (weights in other files).
    """
    graph = read(path)
    check_supported(graph, str(path))
    return OnnxModule(with_linears(with_safe_softmax(graph))).eval()
