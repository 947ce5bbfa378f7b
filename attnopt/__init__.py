"""attnopt: make the attention of trained models fast, and prove what it cost.

The public names are loaded on first use, so that ``import attnopt`` imports neither torch nor the
command line:

- ``optimize(model, example_inputs, budget=2.0, max_drop=0.01)`` searches under a budget.
- ``load(folder)`` gives the optimized program of a finished run, callable like the model.
- ``apply(plan, model)`` rebuilds an optimized model from a saved plan, without searching.
- ``inspect(model)`` lists every attention site with its facts, or the reason it was left alone.
- ``register_hf()`` makes ``from_pretrained(..., attn_implementation="attnopt")`` known.
- ``Problem`` is the one exception meant for users: what went wrong, where, and how to mend it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnopt.autotune.optimize import optimize as optimize
    from attnopt.autotune.replay import apply as apply
    from attnopt.compiler.artifact import load as load
    from attnopt.compiler.errors import Problem as Problem
    from attnopt.compiler.hf_attention import register_hf as register_hf
    from attnopt.compiler.inspect import inspect as inspect

__version__ = "0.1.0"

_HOME = {
    "Problem": "attnopt.compiler.errors",
    "apply": "attnopt.autotune.replay",
    "inspect": "attnopt.compiler.inspect",
    "load": "attnopt.compiler.artifact",
    "optimize": "attnopt.autotune.optimize",
    "register_hf": "attnopt.compiler.hf_attention",
}

__all__ = ["Problem", "__version__", "apply", "inspect", "load", "optimize", "register_hf"]


def __getattr__(name: str) -> object:
    """Load a public name from its home module on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'attnopt' has no attribute '{name}'")
    value: object = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
