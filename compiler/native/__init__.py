"""Operators in C++ for the CPU, compiled where they are first wanted.

`few_rows` and `many_rows` are y = x W^T + b, `one_token` the attention of one token to a cache,
`prompt` that of many; see the sources beside this file. `ready` builds them, and says why not where
it cannot.
"""

from __future__ import annotations

import torch

from attnopt.compiler.native.build import loaded, ready

__all__ = ["DTYPES", "loaded", "ready"]

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
"""Of q, k and v that `one_token` takes."""
