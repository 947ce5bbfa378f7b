"""List what a pickle would import and call, without running it.

The opcodes are replayed on a stack of symbols: strings, tuples and imported names are kept, all
other values are blanks. That resolves `STACK_GLOBAL` (whose operands may come through the memo) and
tells a class that is merely instantiated (`NEWOBJ`, which never calls `__init__`) from a callable
that is called (`REDUCE`, `INST`, `OBJ`).
"""

from __future__ import annotations

import io
import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from dataclasses import dataclass, field
from typing import BinaryIO

from attnopt.compiler.errors import Problem

_GETS = {"GET", "BINGET", "LONG_BINGET"}
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_TUPLES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE"}
_MARK = object()
MAX_OPCODES = 20_000_000


@dataclass(frozen=True, order=True)
class Global:
    """A name that a pickle imports: `module` and, inside it, `name` (dotted for a nested class)."""

    module: str
    name: str

    @property
    def path(self) -> str:
        """The full dotted path, as `--allow-global` takes it."""
        return f"{self.module}.{self.name}"


@dataclass
class Scan:
    """What the pickles of one file import (`globals`), and which of those they call (`called`)."""

    globals: set[Global] = field(default_factory=set)
    called: set[Global] = field(default_factory=set)

    def update(self, other: Scan) -> None:
        """Add what another scan found."""
        self.globals |= other.globals
        self.called |= other.called


def scan_pickle(data: bytes | BinaryIO, where: str = "") -> Scan:
    """Scan one pickle, up to and including its STOP; a stream is left just behind it.

    Raises `Problem` A103 where the opcodes do not make a pickle. What was imported up to there is
    named, because a real unpickler would have run it before it met the damage.
    """
    machine = _Machine()
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count > MAX_OPCODES:
                raise ValueError(f"more than {MAX_OPCODES} opcodes")
            machine.step(opcode, argument)
    except (ValueError, IndexError, KeyError, EOFError, OverflowError) as error:
        found = ", ".join(sorted(item.path for item in machine.scan.globals))
        raise Problem(
            "A103",
            "the pickle is damaged or cut short" + (f"; it imports {found}" if found else ""),
            where=where,
            why=str(error),
            help="download or save the file again",
        ) from error
    return machine.scan


class _Machine:
    """The stack of symbols; see the module docstring."""

    def __init__(self) -> None:
        self.scan = Scan()
        self.stack: list[object] = []
        self.memo: dict[int, object] = {}
        self.protocol = 0

    def step(self, opcode: pickletools.OpcodeInfo, argument: object) -> None:
        name = opcode.name
        if name == "PROTO":
            self.protocol = int(str(argument))
            return
        if name == "MARK":
            self.stack.append(_MARK)
            return
        if name == "POP" and self.stack[-1] is _MARK:
            self.stack.pop()
            return
        if name in _PUTS:
            key = len(self.memo) if name == "MEMOIZE" else int(str(argument))
            self.memo[key] = self.stack[-1]
            return
        if name in _GETS:
            self.stack.append(self.memo[int(str(argument))])
            return
        taken = self._take(opcode)
        self.stack.extend(self._results(opcode, argument, taken))

    def _take(self, opcode: pickletools.OpcodeInfo) -> list[object]:
        """Pop the operands, without the mark, in the order in which they were pushed."""
        before = opcode.stack_before
        if pickletools.markobject in before:
            mark = len(self.stack) - 1 - self.stack[::-1].index(_MARK)
            below = before.index(pickletools.markobject)
            taken = self.stack[mark - below : mark] + self.stack[mark + 1 :]
            del self.stack[mark - below :]
            return taken
        if len(before) > len(self.stack):
            raise ValueError(f"{opcode.name} finds the stack empty")
        taken = self.stack[len(self.stack) - len(before) :]
        del self.stack[len(self.stack) - len(before) :]
        return taken

    def _results(
        self, opcode: pickletools.OpcodeInfo, argument: object, taken: list[object]
    ) -> list[object]:
        name = opcode.name
        if name == "GLOBAL":
            return [self._imported(*str(argument).split(" ", 1))]
        if name == "STACK_GLOBAL":
            module, attribute = taken
            known = isinstance(module, str) and isinstance(attribute, str)
            return [self._imported(str(module), str(attribute)) if known else self._hidden(name)]
        if name in ("EXT1", "EXT2", "EXT4"):
            return [self._hidden(f"{name} {argument}")]
        if name == "INST":
            self._call(self._imported(*str(argument).split(" ", 1)), tuple(taken))
            return [None]
        if name == "OBJ":
            self._call(taken[0] if taken else None, tuple(taken[1:]))
            return [None]
        if name == "REDUCE":
            self._call(taken[0], taken[1])
            return [None]
        if name == "DUP":
            return taken * 2
        if name in _TUPLES:
            return [tuple(taken)]
        if isinstance(argument, str) and len(opcode.stack_after) == 1:
            return [argument]
        return [None] * len(opcode.stack_after)

    def _imported(self, module: str, name: str) -> Global:
        if self.protocol < 3:
            module, name = NAME_MAPPING.get(
                (module, name), (IMPORT_MAPPING.get(module, module), name)
            )
        found = Global(module, name)
        self.scan.globals.add(found)
        return found

    def _hidden(self, how: str) -> Global:
        """A name that is computed while loading, so that no scan can know it."""
        found = Global("<computed>", how)
        self.scan.globals.add(found)
        return found

    def _call(self, function: object, arguments: object) -> None:
        """Note a call; an imported name among the arguments counts, since the callee may call it in
        turn.
        """
        passed = arguments if isinstance(arguments, tuple) else ()
        for symbol in (function, *passed):
            if isinstance(symbol, Global):
                self.scan.called.add(symbol)
