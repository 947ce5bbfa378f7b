"""Running emitted modules where attnopt cannot be imported, in triton's interpreter."""

from __future__ import annotations

from tests.tree import benchmarks

benchmarks()

from benchmarks.bare import run_bare  # noqa: E402

__all__ = ["run_bare"]
