"""A compiled program's text as computations and instructions; which of them run how often.

The text is what `jax.stages.Compiled.as_text()` prints. Only what counting needs is read: names, opcodes, types,
operands, called computations, and the number of turns of each loop.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

BYTES = {"pred": 1.0, "bf16": 2.0, "f16": 2.0, "f32": 4.0, "f64": 8.0, "c64": 8.0, "c128": 16.0, "token": 0.0}
ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
NAME = re.compile(r"%([\w.\-]+)")
CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation. `type` and `attributes` are kept as text."""

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool
    literal: str  # what stands between the parentheses: the value of a constant, the number of a parameter

    @property
    def op_name(self) -> str:
        """Where the instruction comes from in the traced program; empty where the compiler does not say."""
        match = OP_NAME.search(self.attributes)
        return match[1] if match else ""

    def attribute(self, name: str) -> str:
        """A number among the attributes, as text; empty where it is not written."""
        match = re.search(rf"\b{name}=(\d+)", self.attributes)
        return match[1] if match else ""

    def called(self, role: str) -> str | None:
        """The computation that it calls as `body`, `condition`, `calls` or `to_apply`."""
        return next((name for kind, name in CALLED.findall(self.attributes) if kind == role), None)

    @property
    def branches(self) -> list[str]:
        """The computations of a conditional."""
        match = BRANCHES.search(self.attributes)
        if match:
            return [name.strip().lstrip("%") for name in match[1].split(",")]
        found = [self.called("true_computation"), self.called("false_computation")]
        return [name for name in found if name]


@dataclasses.dataclass(frozen=True)
class Computation:
    """A named list of instructions in their order."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        """The instruction whose value is the computation's."""
        return next(
            (entry for entry in self.instructions.values() if entry.is_root), list(self.instructions.values())[-1]
        )

    @property
    def parameters(self) -> dict[int, Instruction]:
        """Its parameters by number."""
        return {int(e.literal): e for e in self.instructions.values() if e.opcode == "parameter"}

    def users(self, name: str) -> list[Instruction]:
        """The instructions that read `name`."""
        return [entry for entry in self.instructions.values() if name in entry.operands]


@dataclasses.dataclass(frozen=True)
class Program:
    """All computations of a compiled program, and the one that runs."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Program:
    """The program of a compiled module's text.

    Raises a text without an entry computation -> ValueError.
    """
    computations: dict[str, Computation] = {}
    entry, name, instructions = "", "", dict[str, Instruction]()
    for line in text.splitlines():
        header = HEADER.match(line) if line[:1] not in (" ", "}", "") else None
        if header:
            name, instructions = header[2], {}
            entry = name if header[1] else entry
        elif line.rstrip() == "}" and name:  # alone: kernels are described over several lines
            computations[name] = Computation(name, instructions)
            name = ""
        elif name and line.startswith("  ") and " = " in line:
            found = _instruction(line.strip())
            if found is not None:
                instructions[found.name] = found
    if entry not in computations:
        raise ValueError("expected the text of a compiled module with an ENTRY computation, got none")
    return Program(computations, entry)


def _instruction(line: str) -> Instruction | None:
    is_root = line.startswith("ROOT ")
    left, _, right = line.removeprefix("ROOT ").partition(" = ")
    end = _closing(right, 0) + 1 if right.startswith("(") else right.find(" ")
    kind, rest = right[:end], right[end:].lstrip()
    opening = rest.find("(")
    if opening <= 0:
        return None
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    return Instruction(
        name=left.strip().lstrip("%"),
        opcode=rest[:opening],
        type=kind,
        operands=tuple(NAME.findall(inside)),
        attributes=rest[closing + 1 :],
        is_root=is_root,
        literal=inside,
    )


def _closing(text: str, opening: int) -> int:
    """The place of the parenthesis that closes the one at `opening`."""
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return len(text) - 1


def arrays(kind: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(element type, sizes, layout) of every array in a type's text."""
    for element, sizes, layout in ARRAY.findall(kind):
        yield element, tuple(int(size) for size in sizes.split(",") if size), layout


def element_bytes(element: str) -> float:
    """Bytes of one element; four-bit types take half a byte."""
    if element in BYTES:
        return BYTES[element]
    if element.startswith("f8"):
        return 1.0
    bits = re.fullmatch(r"[su](\d+)", element)
    return int(bits[1]) / 8 if bits else 0.0


def size_of(kind: str, *, hbm_only: bool = False) -> float:
    """Bytes of all arrays of a type, without the padding of their layouts.

    Args
      hbm_only: leave out what the compiler put into other memory, `S(1)` and so on in the layout.
    """
    total = 0.0
    for element, sizes, layout in arrays(kind):
        if hbm_only and "S(" in layout:
            continue
        count = 1
        for size in sizes:
            count *= size
        total += count * element_bytes(element)
    return total


def trip_count(program: Program, computation: Computation, loop: Instruction) -> int | None:
    """Turns of a `while`: as the compiler notes them, or from `i < constant` in its condition; None if data decide."""
    known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes)
    if known:
        return int(known[1])
    condition = program.computations.get(loop.called("condition") or "")
    if condition is None or condition.root.opcode != "compare" or "direction=LT" not in condition.root.attributes:
        return None
    counter, limit = (_source(condition, name) for name in condition.root.operands)
    if limit.opcode != "constant" or counter.opcode != "get-tuple-element":
        return None
    index = re.search(r"index=(\d+)", counter.attributes)
    return int(limit.literal) - _start(computation, loop, int(index[1]) if index else 0)


def _start(computation: Computation, loop: Instruction, index: int) -> int:
    """Where the counter begins; 0 where it is not a plain constant, as in every loop that jax writes."""
    state = computation.instructions.get(loop.operands[0])
    if state is None or state.opcode != "tuple" or index >= len(state.operands):
        return 0
    first = _source(computation, state.operands[index])
    return int(first.literal) if first.opcode == "constant" and first.literal.lstrip("-").isdigit() else 0


def _source(computation: Computation, name: str) -> Instruction:
    entry = computation.instructions[name]
    while entry.opcode in ("copy", "bitcast", "convert") and entry.operands[0] in computation.instructions:
        entry = computation.instructions[entry.operands[0]]
    return entry
