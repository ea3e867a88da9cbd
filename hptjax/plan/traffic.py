"""What a compiled program moves: collectives by kind and size, bytes through memory, and its largest buffers.

The compiler's own analysis counts a loop's body once. Here everything inside a loop is multiplied by the loop's turns,
loops in loops too; of a conditional the branch that moves more is counted.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from hptjax.plan.groups import first_group
from hptjax.plan.hlo import Computation, Instruction, Program, arrays, parse, size_of, trip_count

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id replica-id "
    "opt-barrier optimization-barrier async-start async-update async-done iota send recv".split()
)
MOVES_NOTHING = ('"AllocateBuffer"', '"SliceId"', '"AssumeGatherIndicesInBound"')  # custom calls
READ_IN_PART = ("dynamic-slice", "slice", "gather")
WRITTEN_IN_PART = ("dynamic-update-slice", "scatter")  # their first operand's memory becomes the result's
LARGEST = 8  # buffers that are listed
SMALLEST_LISTED = 1 << 20


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program, on one device.

    Args
      bytes: of the whole array that the group gathers or reduces, each time. group: positions in the mesh of one group.
      times: how often it runs in one call of the program. where: its place in the traced program.
      between_slices: whether the hosts carry it from slice to slice; the text then does not name the group.
    """

    kind: str
    bytes: float
    group: tuple[int, ...]
    times: int
    where: str
    between_slices: bool = False

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends over all runs, by ring algorithms: (g - 1) / g of the array, all-reduce twice."""
        size = len(self.group)
        if size <= 1:
            return 0.0
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.bytes * self.times
        return self.bytes * self.times * (size - 1) * (2 if self.kind == "all-reduce" else 1) / size


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A large intermediate array: bytes on a device, type, and place in the traced program."""

    bytes: float
    type: str
    where: str


@dataclasses.dataclass(frozen=True)
class Moved:
    """What a computation moves in one run, on one device.

    Args
      memory_bytes: read from and written to the device's memory. unknown_loops: loops whose turns depend on data.
    """

    memory_bytes: float = 0.0
    collectives: tuple[Collective, ...] = ()
    unknown_loops: int = 0

    def plus(self, other: Moved, times: int = 1) -> Moved:
        """Both, the other `times` times."""
        repeated = tuple(dataclasses.replace(entry, times=entry.times * times) for entry in other.collectives)
        return Moved(
            self.memory_bytes + times * other.memory_bytes,
            self.collectives + repeated,
            self.unknown_loops + other.unknown_loops,
        )


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one call of a program moves on one device.

    Args
      always: everything outside the update. update: the conditional of the program that moves most, or nothing: in
        the train step it is the optimizer's update, which one micro-batch of a window carries out.
      largest: the largest intermediate arrays, largest first.
    """

    always: Moved
    update: Moved
    largest: tuple[Buffer, ...]

    @property
    def whole(self) -> Moved:
        """A call that carries out the update."""
        return self.always.plus(self.update)


def traffic(text: str, *, turns: Sequence[int] = (), has_update: bool = False) -> Traffic:
    """What the compiled module of this text moves.

    Args
      turns: of loops whose length depends on data: of the outermost, of those inside it, and so on; 1 where none is
        given. has_update: whether a conditional of it is an optimizer's update.
    """
    program = parse(text)
    always, branches = _moved(program, program.entry, tuple(turns), apart=True)
    update = max(branches, key=lambda branch: branch.memory_bytes, default=Moved()) if has_update else Moved()
    for branch in branches:
        always = always if branch is update else always.plus(branch)
    return Traffic(always, update, largest_buffers(program))


def _moved(program: Program, name: str, turns: tuple[int, ...], *, apart: bool = False) -> tuple[Moved, list[Moved]]:
    """One run of a computation; its conditionals' costliest branches apart from the rest, if asked."""
    computation = program.computations[name]
    total, branches = Moved(), list[Moved]()
    channels: set[str] = set()  # an asynchronous collective stands in several instructions with one channel
    for entry in computation.instructions.values():
        total = total.plus(Moved(memory_bytes(program, computation, entry), _collectives(program, entry, channels)))
        if entry.opcode == "while":
            known = trip_count(program, computation, entry)
            body = _moved(program, entry.called("body") or "", turns if known is not None else turns[1:])[0]
            times = known if known is not None else (turns or (1,))[0]
            total = total.plus(body, times).plus(Moved(unknown_loops=int(known is None)))
        elif entry.opcode == "call":
            total = total.plus(_moved(program, entry.called("to_apply") or "", turns)[0])
        elif entry.opcode == "conditional":
            found = [_moved(program, branch, turns)[0] for branch in entry.branches]
            costliest = max(found, key=lambda branch: branch.memory_bytes, default=Moved())
            total, branches = (total, [*branches, costliest]) if apart else (total.plus(costliest), branches)
    return total, branches


def _collectives(program: Program, entry: Instruction, channels: set[str]) -> tuple[Collective, ...]:
    """The collectives that an instruction is or, as a fusion or an asynchronous call, holds; each channel once.

    Exchanges between slices are written as a `send` to the hosts with the name of the collective.
    """
    kind = entry.opcode.removesuffix("-start")
    hosts = re.search(r'_xla_megascale_transfer_type="(\w+)"', entry.attributes) if entry.opcode == "send" else None
    if hosts:
        sent = size_of(entry.type.partition("]")[0] + "]")
        return (Collective(hosts[1].lower().replace("_", "-"), sent, (), 1, entry.op_name, between_slices=True),)
    if kind in KINDS:
        channel = entry.attribute("channel_id")
        if channel and channel in channels:
            return ()
        channels.add(channel or entry.name)
        whole = max(size_of(entry.type) if kind == entry.opcode else _result_bytes(entry.type), 0.0)
        group = first_group(entry.attributes)
        if kind == "reduce-scatter":
            whole *= max(len(group), 1)
        return (Collective(kind, whole, group, 1, entry.op_name),)
    inner = entry.called("calls")
    if entry.opcode not in ("fusion", "async-start") or inner not in program.computations:
        return ()
    found = tuple(
        collective
        for inside in program.computations[inner].instructions.values()
        for collective in _collectives(program, inside, channels)
    )
    if "all-reduce-scatter" in inner or "all-reduce-scatter" in entry.name:  # an all-reduce of which each keeps a part
        return tuple(dataclasses.replace(collective, kind="reduce-scatter") for collective in found)
    return found


def _result_bytes(kind: str) -> float:
    """Of the (operands, results, ...) of a started collective, the results."""
    sizes = [size_of(f"{element}[{','.join(map(str, shape))}]") for element, shape, _ in arrays(kind)]
    half = len(sizes) // 2
    return max(sum(sizes[:half]), sum(sizes[half:]))


def memory_bytes(program: Program, computation: Computation, entry: Instruction) -> float:
    """Bytes that an instruction reads from and writes to the device's memory; loops and branches count their own.

    A slice reads what it takes, an update in place writes what it changes, and inside a fusion likewise.
    """
    if entry.opcode in FREE or entry.opcode.endswith("-done"):
        return 0.0
    if entry.opcode == "custom-call" and any(name in entry.attributes for name in MOVES_NOTHING):
        return 0.0
    written = size_of(entry.type, hbm_only=True)
    sources = [computation.instructions[name] for name in entry.operands if name in computation.instructions]
    if entry.opcode.endswith("-start"):  # of (operands, results, ...), what is moved is no larger than either
        return min((size_of(f"{kind}[{','.join(map(str, sizes))}]") for kind, sizes, _ in _large(entry)), default=0.0)
    if entry.opcode in READ_IN_PART:
        return 2 * written
    if entry.opcode in WRITTEN_IN_PART:
        return 2 * size_of(sources[-1 if entry.opcode == "scatter" else 1].type, hbm_only=True)
    inner = program.computations.get(entry.called("calls") or "") if entry.opcode == "fusion" else None
    if inner is None:
        return written + sum(size_of(source.type, hbm_only=True) for source in sources)
    parameters = inner.parameters
    read = sum(
        min(size_of(source.type, hbm_only=True), _read_inside(program, inner, parameters[place].name))
        for place, source in enumerate(sources)
        if place in parameters
    )
    return read + min(written, _written_inside(inner))


def _large(entry: Instruction) -> list[tuple[str, tuple[int, ...], str]]:
    """The arrays of an instruction's type without the few words that keep its state."""
    return [array for array in arrays(entry.type) if len(array[1]) > 0]


def _read_inside(program: Program, computation: Computation, name: str) -> float:
    """Bytes of one value that the instructions of a fusion look at."""
    total = 0.0
    for user in computation.users(name):
        if user.opcode == "bitcast":
            total += _read_inside(program, computation, user.name)
        elif user.opcode in READ_IN_PART and user.operands[0] == name:
            total += size_of(user.type)
        elif user.opcode in WRITTEN_IN_PART and user.operands[0] == name:
            total += 0.0
        elif user.opcode == "fusion" and user.called("calls") in program.computations:
            inner = program.computations[user.called("calls") or ""]
            places = [place for place, operand in enumerate(user.operands) if operand == name]
            total += sum(_read_inside(program, inner, inner.parameters[place].name) for place in places)
        else:
            return size_of(computation.instructions[name].type)
    return total


def _written_inside(computation: Computation) -> float:
    """Bytes that a fusion writes: of an update in place, the part that changes."""

    def written(entry: Instruction) -> float:
        if entry.opcode == "tuple":
            return sum(written(computation.instructions[name]) for name in entry.operands)
        if entry.opcode == "bitcast" and entry.operands[0] in computation.instructions:
            return written(computation.instructions[entry.operands[0]])
        if entry.opcode in WRITTEN_IN_PART:
            return size_of(computation.instructions[entry.operands[-1 if entry.opcode == "scatter" else 1]].type)
        return size_of(entry.type)

    return written(computation.root)


def largest_buffers(program: Program) -> tuple[Buffer, ...]:
    """The largest arrays in the device's memory that instructions make; one line per type and place.

    Arguments of the program and arrays that a loop merely carries are not made by an instruction and do not count.
    """
    found: dict[tuple[str, str], Buffer] = {}
    for name in _running(program, program.entry):
        for entry in program.computations[name].instructions.values():
            if entry.opcode in FREE or entry.opcode.endswith("-done"):
                continue
            for element, sizes, layout in arrays(entry.type):
                kind = f"{element}[{','.join(map(str, sizes))}]"
                if "S(" not in layout and size_of(kind) >= SMALLEST_LISTED:
                    found[kind, entry.op_name] = Buffer(size_of(kind), kind, entry.op_name)
    return tuple(sorted(found.values(), key=lambda buffer: -buffer.bytes)[:LARGEST])


def _running(program: Program, name: str) -> list[str]:
    """The computations whose instructions run by themselves: not those inside fusions."""
    names = [name]
    for entry in program.computations[name].instructions.values():
        if entry.opcode == "conditional":
            inner: Sequence[str | None] = entry.branches
        else:
            inner = [entry.called({"while": "body", "call": "to_apply"}.get(entry.opcode, "-"))]
        names += [deeper for target in inner if target for deeper in _running(program, target)]
    return names
