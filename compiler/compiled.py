"""A module under torch.compile that runs as it is where it cannot be compiled."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from attnopt.compiler.errors import Notice


class Compiled:
    """Calls a module through torch.compile; where that fails, once and for all without, with one
    warning (A507) that says what was left uncompiled.

    `options` are those of torch.compile.
    """

    def __init__(
        self, module: Callable[..., Any], what: str, help: str, where: str = "", **options: Any
    ) -> None:
        self.module, self.what, self.help, self.where = module, what, help, where
        self.form: Callable[..., Any] | None = torch.compile(module, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.form is None:
            return self.module(*args, **kwargs)
        try:
            return self.form(*args, **kwargs)
        except (RuntimeError, OSError, ImportError) as error:
            outputs = self.module(*args, **kwargs)  # an error of the inputs is raised again here
            self.form = None
            told = [line.strip() for line in str(error).splitlines() if line.strip()]
            why = f"{type(error).__name__}: {' '.join(told[:2]) or 'no message'}"
            notice = Notice("A507", f"{self.what} runs uncompiled", self.where, why, self.help)
            warnings.warn(str(notice), RuntimeWarning, stacklevel=3)
            return outputs
