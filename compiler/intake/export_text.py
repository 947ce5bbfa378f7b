"""Which texts of an exported program are harmless: those in the forms that torch itself writes.

Size expressions go to sympy's evaluator, guards and names into Python source, targets are looked up
from `torch` downwards, and tree specs may name modules to import; so each has its own small grammar
here.
"""

from __future__ import annotations

import ast
import json
import math
import operator
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

_NAME = re.compile(r"[A-Za-z_]\w*|")
_PLAIN = re.compile(r"[^'\"\\\n\r(){}\[\]]*")
_DOTTED = re.compile(r"[\w.\-]*")
# fmt: off
_NAME_KEYS = {"name", "as_name", "forward_arg_names"}
_DOTTED_KEYS = {
    "parameter_name", "buffer_name", "tensor_constant_name", "custom_obj_name", "fqn", "path_name",
}
_NAMESPACES = {"aten", "prims", "prim", "attnopt", "quantized_decomposed", "torchvision"}
_HIGHER_ORDER = {
    "wrap_with_set_grad_enabled", "wrap_with_autocast", "cond", "while_loop", "scan", "map_impl",
    "flex_attention", "associative_scan",
}
_TOUCHES_FILES = {"from_file", "save", "load"}
_OPERATORS = {
    "getitem", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos", "abs", "eq",
    "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_", "xor", "index", "is_", "is_not", "lshift",
    "rshift", "invert", "truth",
}
# What sympy's srepr writes and what the deserializer adds to it; all of them only build
# expressions.
_FUNCTIONS = {
    "Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Abs", "Mod", "Eq",
    "Ne", "Lt", "Le", "Gt", "Ge", "Equality", "Unequality", "And", "Or", "Not", "StrictLessThan",
    "LessThan", "StrictGreaterThan", "GreaterThan", "floor", "ceiling", "log", "sqrt", "Piecewise",
    "ExprCondPair", "FloorDiv", "ModularIndexing", "Where", "PythonMod", "CleanDiv", "CeilToInt",
    "FloorToInt", "CeilDiv", "LShift", "RShift", "PowByNatural", "FloatPow", "FloatTrueDiv",
    "IntTrueDiv", "TruncToFloat", "TruncToInt", "RoundToInt", "RoundDecimal", "ToFloat", "Identity",
    "IsNonOverlappingAndDenseIndicator",
}
_SYNTAX = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.Call, ast.keyword,
    ast.Name, ast.Constant, ast.operator, ast.unaryop, ast.cmpop, ast.boolop, ast.expr_context,
    ast.Subscript, ast.Attribute, ast.Tuple, ast.IfExp,
)
# fmt: on
_GUARD_METHODS = {"size", "stride", "storage_offset", "dim", "shape"}


def strings(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Every string below `value` with the key it stands under; keys of mappings by name count as
    names.
    """
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, list):
        for item in value:
            yield from strings(item, key)
    elif isinstance(value, dict):
        for name, item in value.items():
            if key.endswith("_values"):
                yield "name", name
            yield from strings(item, name)


def harmless(key: str, text: str) -> bool:
    if key in _NAME_KEYS:
        return _NAME.fullmatch(text) is not None
    if key in _DOTTED_KEYS:
        return _DOTTED.fullmatch(text) is not None
    if key == "expr_str":
        return _is_expression(text, guard=False)
    if key == "guards_code":
        return _is_expression(text, guard=True)
    if key in ("in_spec", "out_spec"):
        return _is_tree_spec(text)
    return True


def _is_tree_spec(text: str) -> bool:
    """Whether a tree spec holds plain containers under plain keys.

    Its keys end up in source text, and the context of an enumeration or of a defaultdict names a
    module to import; those contexts are objects, so only lists of words and nothing are taken.
    """
    try:
        return all(_is_plain_context(part) for part in _contexts(json.loads(text)))
    except (ValueError, RecursionError):
        return False


def _is_plain_context(context: Any) -> bool:
    value = json.loads(context) if isinstance(context, str) else context
    words = value if isinstance(value, list) else [value]
    return all(
        word is None
        or isinstance(word, int)
        or (isinstance(word, str) and _PLAIN.fullmatch(word) is not None)
        for word in words
    )


def _contexts(spec: Any) -> Iterator[Any]:
    """The contexts of a tree spec: JSON in text, or for some types any JSON value."""
    if isinstance(spec, list):
        for item in spec:
            yield from _contexts(item)
    if isinstance(spec, dict):
        yield spec.get("context")
        yield from _contexts(spec.get("children_spec"))


def _is_expression(text: str, *, guard: bool) -> bool:
    """Whether the text is arithmetic over known functions (and, in a guard, over sizes of the
    inputs).
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    quoted = {id(call.args[0]) for call in ast.walk(tree) if _is_symbol(call)}  # type: ignore[attr-defined]
    return all(_allowed_node(node, quoted, guard=guard) for node in ast.walk(tree))


def _is_symbol(node: ast.AST) -> bool:
    named = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args
    return bool(named and node.func.id == "Symbol")  # type: ignore[attr-defined]


def _allowed_node(node: ast.AST, quoted: set[int], *, guard: bool) -> bool:
    if not isinstance(node, _SYNTAX):
        return False
    if isinstance(node, ast.Call):
        method = guard and isinstance(node.func, ast.Attribute)
        return method or (isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS)
    if isinstance(node, ast.Attribute):
        return guard and node.attr in _GUARD_METHODS
    if isinstance(node, ast.Subscript):
        return guard
    if isinstance(node, ast.Name):
        return not node.id.startswith("__") and (
            guard or node.id in _FUNCTIONS or _is_variable(node.id)
        )
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _NAME.fullmatch(node.value) is not None and (guard or id(node) in quoted)
    return True


def _is_variable(name: str) -> bool:
    """Names of size symbols and of the constants that sympy prints; no function of sympy looks like
    one.
    """
    return re.fullmatch(r"(s|u|zf|zuf|z)\d+|true|false|oo|int_oo|zoo|nan", name) is not None


def target_trouble(target: str) -> str:
    """Why a node may not call this target, or an empty string."""
    head, *names = target.split(".")
    if head == "_operator":
        known = len(names) == 1 and names[0] in _OPERATORS and hasattr(operator, names[0])
        return "" if known else "an operator that torch does not trace"
    if head == "math":
        known = len(names) == 1 and names[0].isalnum() and hasattr(math, names[0])
        return "" if known else "not a function of the math module"
    if head != "torch" or not names:
        return "not an operator of torch"
    if len(names) == 1 and names[0].startswith(("sym_", "_sym_")):
        return ""
    if names[0] != "ops" or len(names) < 3:
        return "a function of Python, not an operator of torch"
    return _op_trouble(names[1], names[2], names[2:])


def _op_trouble(namespace: str, op: str, path: list[str]) -> str:
    if namespace == "higher_order":
        return (
            "" if op in _HIGHER_ORDER else "a higher-order operator that is not expected in a model"
        )
    if namespace not in _NAMESPACES:
        return f"custom operators of {namespace} are not known here"
    if op in _TOUCHES_FILES:
        return "it reads or writes files"
    found: Any = getattr(torch.ops, namespace)
    for name in path:
        found = getattr(found, name, None)
    if isinstance(found, OpOverload | OpOverloadPacket | HigherOrderOperator):
        return ""
    return "there is no such operator in this version of torch"
