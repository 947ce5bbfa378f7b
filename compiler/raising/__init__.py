"""Raising: every softmax attention of a traced program becomes the canonical op, with its facts
found by probing."""

from attnopt.compiler.raising.raise_program import raise_program

__all__ = ["raise_program"]
