"""Writes functions as a module that stands alone: their source, and the source of all they reach.

From the files of the functions, by their syntax trees: the definitions that a function reads by
name (functions, classes, constants), those that these read, and so on. Names imported from torch,
triton and the standard library stay imports; a name imported from anywhere else is followed to its
definition. Source is copied as it is written, with decorators and the comments right above it.
"""

from __future__ import annotations

import ast
import builtins
import symtable
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ALLOWED = frozenset({"torch", "triton", *sys.stdlib_module_names})
_BUILTIN = frozenset(dir(builtins))


class CannotLink(ValueError):
    """The functions cannot be written as one module; says which name stands in the way."""


@dataclass(frozen=True)
class Linked:
    """The text of a module in two parts, each without a newline at its end: its imports, and its
    definitions, each after those that it needs. `names` are all that it defines or imports."""

    imports: str
    definitions: str
    names: frozenset[str]


@dataclass(frozen=True)
class _Import:
    """`import module as name`, or `from module import item` where there is an item."""

    module: str
    item: str
    name: str

    @property
    def kept(self) -> bool:
        return self.module.partition(".")[0] in ALLOWED


@dataclass(frozen=True)
class _Definition:
    """A function, class or constant of a module, by its lines."""

    module: str
    name: str
    first: int
    last: int
    text: str
    is_constant: bool


class _Module:
    """The file of a module, as text and as what is defined and imported at its top."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines = _file(name).read_text(encoding="utf-8").splitlines()
        self.tree = ast.parse("\n".join(self.lines))

    @cached_property
    def imports(self) -> dict[str, list[_Import]]:
        """What is imported at the top of the file, by the name it gets here."""
        found: dict[str, list[_Import]] = {}
        for item in _imports(self.tree.body):
            found.setdefault(item.name, []).append(item)
        return found

    @cached_property
    def definitions(self) -> dict[str, list[_Definition]]:
        """What is defined at the top of the file, by its name."""
        found: dict[str, list[_Definition]] = {}
        for node in self.tree.body:
            for name in _bound(node):
                found.setdefault(name, []).append(self._definition(node, name))
        return found

    @cached_property
    def postponed(self) -> bool:
        """Whether the file says `from __future__ import annotations`."""
        return any(
            isinstance(node, ast.ImportFrom) and node.module == "__future__"
            and "annotations" in [alias.name for alias in node.names]
            for node in self.tree.body
        )  # fmt: skip

    def _definition(self, node: ast.stmt, name: str) -> _Definition:
        decorators = getattr(node, "decorator_list", [])
        first = min([node.lineno, *(item.lineno for item in decorators)])
        last = node.end_lineno or node.lineno
        while first > 1 and self.lines[first - 2].startswith("#"):
            first -= 1
        text = "\n".join(self.lines[first - 1 : last])
        constant = isinstance(node, (ast.Assign, ast.AnnAssign))
        return _Definition(self.name, name, first, last, text, constant)


def _file(module: str) -> Path:
    loaded = sys.modules.get(module)
    file = getattr(loaded, "__file__", None)
    if loaded is None:
        found = find_spec(module)
        file = None if found is None else found.origin
    if file is None or not file.endswith(".py"):
        raise CannotLink(f"module {module} has no source file")
    return Path(file)


@lru_cache(maxsize=256)
def _module(name: str) -> _Module:
    return _Module(name)


def link(functions: Iterable[Callable[..., Any]], imports: str = "") -> Linked:
    """The functions, plain or `triton.jit`, as a module of their own. `imports` are import
    statements for what is written behind them.

    Raises `CannotLink` where a function is not at the top of a file, a name is read that nothing
    defines, or one name would have two meanings.
    """
    linker = _Linker()
    for function in functions:
        plain = getattr(function, "fn", function)  # what triton.jit wraps
        if plain.__qualname__ != plain.__name__:
            raise CannotLink(f"{plain.__qualname__} is not at the top of its file")
        linker.reach(plain.__module__, plain.__name__, plain.__module__)
    for found in _imports(ast.parse(imports).body):
        linker.take(found.name, found)
    return linker.linked()


class _Linker:
    def __init__(self) -> None:
        self.meanings: dict[str, _Import | _Definition] = {}
        self.ordered: list[_Definition] = []
        self.postponed = False

    def reach(self, module: str, name: str, reader: str) -> None:
        """Take in what `name` means in the module, after all that it needs."""
        meaning = _meaning(module, name, reader)
        if not self.take(name, meaning) or isinstance(meaning, _Import):
            return
        home = _module(meaning.module)
        self.postponed = self.postponed or home.postponed
        for needed in sorted(_read(meaning.text) - {name}, key=lambda item: _place(home, item)):
            if needed in home.definitions or needed in home.imports or needed not in _BUILTIN:
                self.reach(meaning.module, needed, f"{meaning.module}.{name}")
        self.ordered.append(meaning)

    def take(self, name: str, meaning: _Import | _Definition) -> bool:
        """Note what a name means; whether it is new."""
        known = self.meanings.get(name)
        if known is not None and known != meaning:
            raise CannotLink(f"`{name}` has two meanings: {_said(known)} and {_said(meaning)}")
        self.meanings[name] = meaning
        return known is None

    def linked(self) -> Linked:
        """The text of all that was reached."""
        lines = ["from __future__ import annotations", ""] if self.postponed else []
        kept = [meaning for meaning in self.meanings.values() if isinstance(meaning, _Import)]
        lines += _spelled(kept)
        parts: list[str] = []
        for before, found in zip([None, *self.ordered], self.ordered, strict=False):
            if before is not None:
                close = before.is_constant and found.is_constant and before.module == found.module
                parts.append("\n" if close else "\n\n\n")
            parts.append(found.text)
        return Linked("\n".join(lines).rstrip(), "".join(parts), frozenset(self.meanings))


def _meaning(module: str, name: str, reader: str) -> _Import | _Definition:
    """What a name stands for in a module, imports followed to where they lead."""
    home = _module(module)
    found: list[_Definition | _Import] = []
    found += home.definitions.get(name, [])
    found += home.imports.get(name, [])
    if len(found) > 1:
        raise CannotLink(f"`{name}` is bound more than once in {module}")
    if not found:
        raise CannotLink(f"{reader} reads `{name}`, which {module} neither defines nor imports")
    (imported,) = found
    if isinstance(imported, _Definition) or imported.kept:
        return imported
    if not imported.item:
        raise CannotLink(f"{reader} reads `{name}`, a module that is not torch's or triton's")
    if imported.item != name:
        raise CannotLink(f"{reader} reads `{imported.item}` by another name, `{name}`")
    return _meaning(imported.module, name, reader)


def _imports(body: Iterable[ast.stmt]) -> Iterator[_Import]:
    for node in body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.partition(".")[0]
                yield _Import(alias.name if alias.asname else name, "", name)
        elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
            for alias in node.names:
                yield _Import(node.module or "", alias.name, alias.asname or alias.name)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from _imports(node.body)


def _bound(node: ast.stmt) -> list[str]:
    """The names that a statement at the top of a file defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.AnnAssign):
        return [node.target.id] if isinstance(node.target, ast.Name) else []
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []


def _read(text: str) -> set[str]:
    """The names that a definition reads from its module: what is local to a function is not."""
    found: set[str] = set()

    def visit(table: symtable.SymbolTable) -> None:
        for symbol in table.get_symbols():
            if symbol.is_global() or (table is top and symbol.is_referenced()):
                found.add(symbol.get_name())
        for child in table.get_children():
            visit(child)

    top = symtable.symtable(text, "<definition>", "exec")
    visit(top)
    return {name for name in found if not (name.startswith("__") and name.endswith("__"))}


def _place(home: _Module, name: str) -> tuple[bool, str, int, str]:
    """Where a needed name goes among others: from other modules first, then as in the file."""
    if name in home.definitions:
        return True, "", home.definitions[name][0].first, name
    modules = [found.module for found in home.imports.get(name, [])]
    return False, "".join(modules), 0, name


def _said(meaning: _Import | _Definition) -> str:
    if isinstance(meaning, _Definition):
        return f"that of {meaning.module}"
    return f"{meaning.item or meaning.module} of an import of {meaning.module}"


def _spelled(kept: Iterable[_Import]) -> list[str]:
    """Import statements, sorted: the standard library, then what is installed."""
    whole: dict[str, str] = {}
    parts: dict[str, set[str]] = {}
    for found in kept:
        if found.item:
            renamed = "" if found.item == found.name else f" as {found.name}"
            parts.setdefault(found.module, set()).add(found.item + renamed)
        else:
            renamed = "" if found.module == found.name else f" as {found.name}"
            whole[f"import {found.module}{renamed}"] = found.module
    lines: list[str] = []
    for standard in (True, False):
        group = [
            *sorted(line for line, of in whole.items() if _is_standard(of) == standard),
            *(
                f"from {module} import {', '.join(sorted(parts[module]))}"
                for module in sorted(parts) if _is_standard(module) == standard
            ),
        ]  # fmt: skip
        lines += [*group, ""] if group else []
    return lines


def _is_standard(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names
