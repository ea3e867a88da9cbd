"""What each result of a traced program is made of: its last operation, and the arguments that it may depend on.

Calls (jit, remat, custom_vjp ...) are followed as if they were written out, and what leaves a value as it is (sharding
constraints, optimization barriers, copies) is stepped over, so that an equation either computes something or is not
seen. Branches and loops stay single operations, but what each of their results depends on is followed inside.

A `shard_map` is one operation, followed inside: its body sees parts of its operands, so that nothing of it passes for
an operation on the whole, but what each result depends on is that of the body. A Pallas kernel is not followed, because
it writes to memory; each of its results depends on all of its operands and, if it does nothing but read and write its
own blocks, on nothing else.

Dependence is what may be: a value counts as reading an argument if any chain of operations leads there, also one that
multiplies by zero. An operation that could hold anything (a callback, a custom call, a primitive with a function among
its parameters that is not known here, an effect) makes its results depend on something unknown, by its name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

Reads = frozenset[int | str]
"""Positions of arguments; and names of primitives through which anything may have come in."""

NOTHING: Reads = frozenset()
UNCHANGED = frozenset({"sharding_constraint", "reshard", "mesh_cast", "optimization_barrier", "copy", "copy_p"})
CALLS = {  # primitive -> the parameter that holds what is called
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
# Their parameters hold functions (how two updates of one place combine; how random bits are made), but of their
# operands only.
PLAIN = frozenset(
    {"scatter", "scatter-add", "scatter_add", "scatter-mul", "scatter_mul", "scatter-min", "scatter_min"}
    | {"scatter-max", "scatter_max", "scatter-sub", "reduce", "reduce_and", "reduce_or"}
    | {"random_bits", "random_wrap", "random_unwrap", "random_seed", "random_fold_in", "random_split"}
)
OUTSIDE = (
    "callback",
    "ffi_call",
    "custom_call",
    "infeed",
    "rng_uniform",
)  # parts of names of what comes from elsewhere
OUTSIDE_KERNEL = ("prng", "dma", "semaphore", "barrier", "delay")  # likewise, in a Pallas kernel
OWN_BLOCKS = frozenset({"ReadEffect", "WriteEffect", "AccumEffect"})  # of a kernel on its own references
PLACES = frozenset({"NamedAxisEffect"})  # of a collective or an axis index inside a shard_map: none on values


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """One evaluation of an equation, on these operands."""

    equation: JaxprEqn
    operands: tuple[Value, ...]

    @property
    def name(self) -> str:
        return self.equation.primitive.name


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """One array of the program.

    Args
      reads: what it may depend on. data: the same, without what only decides which branch of a `cond` is taken.
      operation, output: what computes it, and which of its results it is; None for arguments and constants.
      argument: its position among the arguments. constant: in a tuple, so that there may be none.
    """

    reads: Reads = NOTHING
    data: Reads = NOTHING
    operation: Operation | None = None
    output: int = 0
    argument: int | None = None
    constant: tuple[Any, ...] = ()


def arguments(count: int) -> list[Value]:
    """The arguments of a program: each depends on itself."""
    return [Value(frozenset({place}), frozenset({place}), argument=place) for place in range(count)]


def results(program: ClosedJaxpr, operands: Sequence[Value]) -> list[Value]:
    """The results of the program on these operands."""
    jaxpr = program.jaxpr
    known = dict(zip(jaxpr.constvars, (Value(constant=(const,)) for const in program.consts), strict=True))
    known.update(zip(jaxpr.invars, operands, strict=True))

    def read(atom: Any) -> Value:
        return Value(constant=(atom.val,)) if isinstance(atom, Literal) else known[atom]

    for equation in jaxpr.eqns:
        values = _evaluate(equation, tuple(read(atom) for atom in equation.invars))
        known.update(zip(equation.outvars, values, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _evaluate(equation: JaxprEqn, operands: tuple[Value, ...]) -> Sequence[Value]:
    """The results of one equation."""
    name = equation.primitive.name
    if name in UNCHANGED or _converts_nothing(equation):
        return operands
    if name in CALLS:
        return results(_closed(equation.params[CALLS[name]]), operands)
    follow = BRANCHES_AND_LOOPS.get(name)
    if follow is not None:
        parts = follow(equation.params, operands)
    elif name == "pallas_call":
        parts = _kernel(equation.params, operands, len(equation.outvars))
    else:
        unknown: Reads = frozenset({name}) if _may_hold_anything(equation) else NOTHING
        whole = Value(_reads(operands) | unknown, _data(operands) | unknown)
        parts = [whole] * len(equation.outvars)
    operation = Operation(equation, operands)
    return [
        Value(part.reads, part.data, operation=operation, output=place)
        for place, part in zip(range(len(equation.outvars)), parts, strict=True)
    ]


def _cond(params: Mapping[str, Any], operands: tuple[Value, ...]) -> list[Value]:
    """Each result of either branch; which branch it is counts as read, but not as data."""
    index, *rest = operands
    branches = [results(branch, rest) for branch in params["branches"]]
    return [Value(_reads(ways) | index.reads, _data(ways)) for ways in zip(*branches, strict=True)]


def _scan(params: Mapping[str, Any], operands: tuple[Value, ...]) -> list[Value]:
    first, after = params["num_consts"], params["num_consts"] + params["num_carry"]
    consts, carry, slices = operands[:first], list(operands[first:after]), operands[after:]
    carry, last = _until_stable(
        carry, lambda carried: results(params["jaxpr"], [*map(_content, consts), *carried, *map(_content, slices)])
    )
    return [*carry, *last[len(carry) :]]


def _while(params: Mapping[str, Any], operands: tuple[Value, ...]) -> list[Value]:
    """Every result also depends on the condition: it says how often the body ran."""
    first, after = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    cond_consts, body_consts = operands[:first], operands[first:after]

    def turn(carried: Sequence[Value]) -> list[Value]:
        goes_on = results(params["cond_jaxpr"], [*map(_content, cond_consts), *carried])
        after_body = results(params["body_jaxpr"], [*map(_content, body_consts), *carried])
        return [Value(_reads((part, *goes_on)), _data((part, *goes_on))) for part in after_body]

    return _until_stable(list(operands[after:]), turn)[0]


def _shard_map(params: Mapping[str, Any], operands: tuple[Value, ...]) -> list[Value]:
    """Each result of the body on one device's parts; collectives mix the parts of their operand, not operands."""
    inside = results(_closed(params["jaxpr"]), [_content(value) for value in operands])
    return [_content(value) for value in inside]


def _kernel(params: Mapping[str, Any], operands: tuple[Value, ...], count: int) -> list[Value]:
    """Every result of a Pallas kernel on every operand, and on what it does besides reading and writing its blocks."""
    foreign = _foreign(params["jaxpr"])
    return [Value(_reads(operands) | foreign, _data(operands) | foreign)] * count


def _foreign(program: Any) -> Reads:
    """Names of a kernel's operations, at any depth, through which something else than its operands may come in."""
    found: set[str] = set()
    for equation in _closed(program).jaxpr.eqns:
        name = equation.primitive.name
        effects = {type(effect).__name__ for effect in equation.effects}
        if any(part in name for part in (*OUTSIDE, *OUTSIDE_KERNEL)) or effects - OWN_BLOCKS:
            found.add(name)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program):
            if _is_program(inner):
                found |= {str(name) for name in _foreign(inner)}
    return frozenset(found)


def _is_program(entry: Any) -> bool:
    return isinstance(entry, (Jaxpr, ClosedJaxpr))


BRANCHES_AND_LOOPS: dict[str, Callable[[Mapping[str, Any], tuple[Value, ...]], list[Value]]] = {
    "cond": _cond,
    "scan": _scan,
    "while": _while,
    "shard_map": _shard_map,
}


def _until_stable(
    carry: list[Value], turn: Callable[[Sequence[Value]], list[Value]]
) -> tuple[list[Value], list[Value]]:
    """The carry's dependence after any number of turns, and all results of the last turn."""
    while True:
        out = turn([_content(value) for value in carry])
        grown = [
            Value(before.reads | now.reads, before.data | now.data)
            for before, now in zip(carry, out[: len(carry)], strict=True)
        ]
        if all((a.reads, a.data) == (b.reads, b.data) for a, b in zip(carry, grown, strict=True)):
            return grown, out
        carry = grown


def _content(value: Value) -> Value:
    """A value of which only the dependence is known: in a loop's body it is another one at every turn."""
    return Value(value.reads, value.data)


def _converts_nothing(equation: JaxprEqn) -> bool:
    """True of a conversion between equal dtypes (it only changes whether the type is weak)."""
    if equation.primitive.name != "convert_element_type":
        return False
    before, after = (_dtype(atom.aval) for atom in (*equation.invars, *equation.outvars))
    return before == after


def _dtype(aval: Any) -> Any:
    return aval.dtype


def _may_hold_anything(equation: JaxprEqn) -> bool:
    name = equation.primitive.name
    effects = {type(effect).__name__ for effect in equation.effects}
    if effects - PLACES or any(part in name for part in OUTSIDE):
        return True
    return name not in PLAIN and any(_holds_function(entry) for entry in equation.params.values())


def _holds_function(entry: Any) -> bool:
    """True where a parameter is, or contains, a program or something to call; types are not meant."""
    if isinstance(entry, (tuple, list)):
        return any(_holds_function(part) for part in entry)
    if isinstance(entry, dict):
        return any(_holds_function(part) for part in entry.values())
    return isinstance(entry, (Jaxpr, ClosedJaxpr)) or (callable(entry) and not isinstance(entry, type))


def _closed(program: Any) -> ClosedJaxpr:
    return program if isinstance(program, ClosedJaxpr) else ClosedJaxpr(program, ())


def _reads(values: Sequence[Value]) -> Reads:
    return NOTHING.union(*(value.reads for value in values))


def _data(values: Sequence[Value]) -> Reads:
    return NOTHING.union(*(value.data for value in values))
