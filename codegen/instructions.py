"""What a compiled kernel does in its innermost loop, counted in the machine's own instructions.

The text is what `nvdisasm` prints of a cubin (the wheels of triton bring it), or the assembly that
triton keeps for AMD. Loops are the natural loops of its flow graph (Aho, Lam, Sethi and Ullman,
"Compilers", section 9.6), so that code placed out of line counts where it runs. Of an innermost
loop it is counted what one warp issues in one turn. How much of that the program asked for stands
in triton's own text before: where tiles are too small for the warps, they repeat each other's
products.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import networkx as nx

_LABEL = re.compile(r"^\s*(\.L[\w$]+):")
_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)(.*)")
_AMDGCN = re.compile(r"^\s+([a-z]\w*)(.*)")
_GOAL = re.compile(r"(\.L[\w$]+)")
_HMMA_SHAPES = {"884": 8 * 8 * 4, "1688": 16 * 8 * 8, "16816": 16 * 8 * 16, "16832": 16 * 8 * 32}
_KINDS = {
    "HMMA": "float16", "HGMMA": "float16", "UTCHMMA": "float16", "IMMA": "int8", "IGMMA": "int8",
    "QMMA": "float8", "QGMMA": "float8", "UTCQMMA": "float8", "OMMA": "float8", "DMMA": "float64",
}  # fmt: skip
_AMD_KINDS = (
    ("xf32", "tf32"), ("bf16", "float16"), ("f16", "float16"), ("fp8", "float8"), ("bf8", "float8"),
    ("i8", "int8"), ("f64", "float64"), ("f32", "float32"),
)  # fmt: skip
_TTGIR_LOOP = re.compile(r"\bscf\.(for|while)\b")
_TTGIR_DOT = re.compile(r"\b(tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma) ")
_SHAPE = re.compile(r"(?:memdesc|tensor)<(?:(\d+)x)?(\d+)x(\d+)x[a-z]")
_SPECIAL = re.compile(r"^(MUFU|v_(exp|log|rcp|rsq|sqrt|sin|cos)_)")
_FMA = re.compile(r"^(FFMA|HFMA2|DFMA|v_(pk_)?(fma|fmac|mac|mad)_f)")


@dataclass(frozen=True)
class Loop:
    """One turn of a loop, of one warp: instructions that are no matrix products, by what they are;
    multiply-adds of matrix products by dtype ("float16" stands for both of two bytes), of which a
    share is `useful` and the rest repeated; and bytes loaded from the device's memory."""

    plain: int = 0
    vector: int = 0  # of `plain`, those that every lane runs
    special: int = 0  # of `plain`, exponentials and the like
    fma: int = 0  # of `plain`, multiply-adds
    bytes: int = 0
    matrix: Mapping[str, int] = field(default_factory=dict)
    useful: float = 1.0

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of all matrix products."""
        return sum(self.matrix.values())


def hot_loop(made: Any) -> Loop:
    """The loop of a compiled kernel that does its work: of the innermost loops with the most
    multiply-adds (or, without any, the most bytes) the one of the fewest instructions; the whole
    text where it has no loop."""
    asked = products(made.asm["ttgir"]) / made.metadata.num_warps
    if "amdgcn" in made.asm:
        loop = _hot(_blocks(made.asm["amdgcn"].splitlines(), _AMDGCN), 64, asked)
    else:
        loop = _hot(_blocks(disassembled(made.asm["cubin"]).splitlines(), _SASS), 32, asked)
    done = loop.multiply_adds
    return replace(loop, useful=min(1.0, asked / done)) if asked and done else loop


def disassembled(cubin: bytes) -> str:
    """The instructions of a cubin, as text."""
    import triton  # counting does not need it

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@dataclass
class _Block:
    """Instructions that run one after the other, and where the last of them goes."""

    labels: list[str] = field(default_factory=list)
    instructions: list[tuple[str, str]] = field(default_factory=list)
    goals: list[str] = field(default_factory=list)
    falls: bool = True


def _blocks(lines: Iterable[str], pattern: re.Pattern[str]) -> list[_Block]:
    blocks = [_Block()]
    for line in lines:
        label = _LABEL.match(line)
        if label:
            if blocks[-1].instructions:
                blocks.append(_Block())
            blocks[-1].labels.append(label.group(1))
            continue
        found = pattern.match(line)
        if found is None:
            continue
        name, operands = found.groups()
        blocks[-1].instructions.append((name, operands))
        guarded = "@" in line.partition(name)[0] or re.search(r"\bU?P\d", operands) is not None
        if name.startswith(("BRA", "s_branch", "s_cbranch")):
            blocks[-1].goals = _GOAL.findall(operands)
            blocks[-1].falls = name.startswith("s_cbranch") or (name.startswith("BRA") and guarded)
            blocks.append(_Block())
        elif name in ("EXIT", "RET", "s_endpgm") and not guarded:
            blocks[-1].falls = False
            blocks.append(_Block())
    return blocks


def _loops(blocks: list[_Block]) -> list[frozenset[int]]:
    """The natural loops, as sets of blocks."""
    place = {label: at for at, block in enumerate(blocks) for label in block.labels}
    graph = nx.DiGraph()
    graph.add_node(0)
    for at, block in enumerate(blocks):
        graph.add_edges_from((at, place[goal]) for goal in block.goals if goal in place)
        if block.falls and at + 1 < len(blocks):
            graph.add_edge(at, at + 1)
    above = nx.immediate_dominators(graph, 0)
    bodies: dict[int, set[int]] = {}
    for tail, head in graph.edges:
        if tail in above and _dominates(above, head, tail):
            bodies.setdefault(head, {head}).update(_reaching(graph, tail, head))
    return [frozenset(body) for body in bodies.values()]


def _dominates(above: Mapping[int, int | None], head: int, node: int) -> bool:
    at: int | None = node
    while at is not None and at != head:
        up = above.get(at)
        at = None if up == at else up
    return at == head


def _reaching(graph: Any, tail: int, head: int) -> set[int]:
    """All nodes from which `tail` is reached without passing `head`."""
    found, waiting = {tail}, [tail]
    while waiting:
        node = waiting.pop()
        if node == head:
            continue
        fresh = set(graph.predecessors(node)) - found
        found |= fresh
        waiting += fresh
    return found


def _hot(blocks: list[_Block], lanes: int, asked: float) -> Loop:
    def counted(body: Iterable[int]) -> Loop:
        inside = [step for at in sorted(body) for step in blocks[at].instructions]
        return _count(inside, lanes, asked)

    loops = {body: counted(body) for body in _loops(blocks)}
    for works in (lambda loop: loop.multiply_adds, lambda loop: loop.bytes, lambda loop: loop.fma):
        working = [body for body, loop in loops.items() if works(loop)]  # not those that only wait
        inner = [loops[p] for p in working if not any(other < p for other in working)]
        if inner:
            most = max(map(works, inner))
            return min((p for p in inner if works(p) >= 0.9 * most), key=lambda p: p.plain)
    return counted(range(len(blocks)))


def _count(steps: Iterable[tuple[str, str]], lanes: int, asked: float) -> Loop:
    """`asked` is what stands for the products of the fifth tensor cores, whose instructions do not
    tell their sizes: one thread gives them to the whole block."""
    plain = vector = special = fma = loaded = 0
    matrix: dict[str, int] = {}
    for name, operands in steps:
        if name.startswith("UTC") and name.partition(".")[0] in _KINDS:
            matrix[_KINDS[name.partition(".")[0]]] = round(asked)
            continue
        product = _product(name, operands)
        if product:
            matrix[product[0]] = matrix.get(product[0], 0) + product[1]
            continue
        plain += 1
        vector += name[0].isupper() or name.startswith("v_")
        special += bool(_SPECIAL.match(name))
        fma += bool(_FMA.match(name))
        loaded += _loaded(name) * lanes
    return Loop(plain, vector, special, fma, loaded, matrix)


def _product(name: str, operands: str) -> tuple[str, int] | None:
    """The kind of a matrix product and one warp's share of its multiply-adds."""
    amd = re.match(r"v_s?mfmac?_\w+?_(\d+)x(\d+)x(\d+)(\w*)", name)
    if amd:
        kind = next((known for word, known in _AMD_KINDS if word in amd.group(4)), "float32")
        return kind, int(amd.group(1)) * int(amd.group(2)) * int(amd.group(3))
    parts = name.split(".")
    if parts[0] not in _KINDS:
        return None
    kind = "tf32" if "TF32" in name or "TF32" in operands else _KINDS[parts[0]]
    shape = re.search(r"\.(\d+)x(\d+)x(\d+)", name)
    if shape:  # four warps together
        return kind, int(shape.group(1)) * int(shape.group(2)) * int(shape.group(3)) // 4
    return kind, next((_HMMA_SHAPES[part] for part in parts if part in _HMMA_SHAPES), 16 * 8 * 8)


def products(ttgir: str) -> int:
    """Multiply-adds that a block is asked for in one turn of its loop with the most of them, from
    triton's text; 0 where no loop has matrix products."""
    most, opened = 0, list[tuple[int, int]]()  # loops around a line: their indent, and products
    for line in ttgir.splitlines():
        indent = len(line) - len(line.lstrip())
        if _TTGIR_LOOP.search(line):
            opened.append((indent, 0))
        elif opened and line.lstrip().startswith("}") and indent == opened[-1][0]:
            if "do {" not in line:  # between the two parts of a while loop
                most = max(most, opened.pop()[1])
        elif opened and _TTGIR_DOT.search(line):
            (times, rows, deep), (*_, columns) = _SHAPE.findall(line)[:2]
            done = int(times or 1) * int(rows) * int(deep) * int(columns)
            opened[-1] = (opened[-1][0], opened[-1][1] + done)
    return most


def _loaded(name: str) -> int:
    """Bytes that one lane loads from the device's memory."""
    if name.startswith(("LDG", "LDGSTS")) and not name.startswith("LDGDEPBAR"):
        wide = re.search(r"\.(?:U|S)?(128|64|16|8)(?=\.|$)", name)
        return int(wide.group(1)) // 8 if wide else 4
    amd = re.match(r"(?:global|buffer|flat)_load_(dwordx(\d)|dword|u?short|s?short|[us]byte)", name)
    if amd is None:
        return 0
    if amd.group(2):
        return 4 * int(amd.group(2))
    return 4 if amd.group(1) == "dword" else 2 if "short" in amd.group(1) else 1
