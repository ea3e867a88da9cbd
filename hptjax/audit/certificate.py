"""A proof, read from the traced program, that `micro_step` adds every micro-batch's gradient exactly once.

The program is what `jax.make_jaxpr` gives for `micro_step(state, micro_batch, is_last)`; nothing is run or compiled.
For every leaf of every chain's sums, the witness included:

1. what the final `cond` on is_last gets is `add(sums as they came, addend)`: one fp32 add, under no condition, with no
   select, product, update in place or other operation between the state's leaf and the add, or the add and the `cond`;
2. the addend depends on the micro-batch and the parameters, and not on is_last, the sums or anything else of the state;
   a gradient does not depend on the micro-batch's place in its window either, and the witness on nothing but this place
   and the live tokens. So a flag by position or a stale term has nowhere to come from;
3. the other micro-batches' branch returns sums, parameters and optimizer states as they came; the last one's returns
   zeros, not a product with zero, which would keep a NaN;
4. the last one's new parameters depend on every leaf of their chain's sums, and are computed from nothing but
   parameters, sums and optimizer states; everything else can only decide whether there is an update.

What cannot be followed is refused. Not shown: that the addend is the right gradient (a constant factor inside it is
structure like any other; the influence tests measure it), masks and labels, and what the compiler does.

Source: accumulation spec 4.2, P1; on `micro_step`, as design contract 2 has no scan over micro-batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np

from hptjax.audit.dataflow import Operation, Reads, Value, arguments, results

PLAN = ("micro_index", "planned_tokens", "planned_digest")  # a micro-batch's place in its window, and the window's plan
WITNESS_READS = ("completion_mask", "micro_index")
PARAMETERS, IS_LAST = "params", "is_last"

Path = tuple[str, ...]


class CertificateError(ValueError):
    """The traced program does not show what was to be proved; the message names the leaf and what was found."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of the sums, proved.

    Args
      name: its path in the state. reads: fields of the micro-batch that its addend may depend on, and `params`.
    """

    name: str
    reads: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Certificate:
    """All leaves of all chains' sums, each added to by one unconditional fp32 add."""

    leaves: tuple[Leaf, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class _Program:
    """A traced step: the path of every leaf of its state, the name of every argument, and its final `cond`.

    Args
      stay, last: results of the branches, by place of the leaf in the state; on the `cond`'s operands as arguments.
    """

    paths: tuple[Path, ...]
    names: tuple[str, ...]
    final: Operation
    stay: Mapping[int, Value]
    last: Mapping[int, Value]

    def operand(self, place: int) -> Value:
        """What the final `cond` was given as this operand."""
        return self.final.operands[1 + place]

    def named(self, reads: Reads) -> list[str]:
        """The names of arguments, sorted; parameters are not told apart."""
        return sorted({PARAMETERS if self.names[i].startswith("params.") else self.names[i] for i in _places(reads)})


def certify(
    micro_step: Callable[[Any, Any, Any], Any],
    state: Any,
    micro_batch: Any,
    *,
    gradients_read: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
) -> Certificate:
    """The certificate of a step function.

    Args
      micro_step: jitted or not. state, micro_batch: a `TrainState` and a `MicroBatch`, of arrays or of shapes.
      gradients_read: what every gradient must depend on: fields of the micro-batch such as `planes.rl.weights`, and
        `params`; by default the parameters, the target tokens and the weights of every plane. Where chains read
        different ones, as a policy and its critic do: by the name of the chain.

    Raises CertificateError naming the leaf and what was found instead.
    """
    fields = [".".join(path) for path in _paths(micro_batch)]
    if gradients_read is None:
        weights = [name for name in fields if name.startswith("planes.") and name.endswith(".weights")]
        gradients_read = [PARAMETERS, "target_tokens", *weights]
    program = _traced(micro_step, state, micro_batch)
    sums = [place for place, path in enumerate(program.paths) if _part(path) == "sums"]
    added = {place: _added(program, place) for place in sums}
    leaves = []
    for place in sums:
        addend = _addend(program, place, added[place])
        name, reads = program.names[place], program.named(addend.reads)
        if program.paths[place][3:] == ("witness",):
            _witness_reads(name, reads)
        else:
            chain = program.paths[place][1]
            required = gradients_read[chain] if isinstance(gradients_read, Mapping) else gradients_read
            _gradient_reads(name, reads, fields, required)
        if not _is_zero(program.last[place]):
            _refuse(name, "a literal zero from the last micro-batch's branch", _described(program.last[place]))
        leaves.append(Leaf(name, tuple(reads)))
    for place, path in enumerate(program.paths):
        if _part(path) in ("params", "optimizer"):
            _kept_until_last(program, place)
            _updated_from_sums(program, place, added)
    return Certificate(tuple(leaves))


def _traced(micro_step: Callable[[Any, Any, Any], Any], state: Any, micro_batch: Any) -> _Program:
    """The program, its final `cond` found and both of its branches followed."""
    after: Any
    traced, after = jax.make_jaxpr(micro_step, return_shape=True)(state, micro_batch, jax.ShapeDtypeStruct((), bool))
    paths = tuple(_paths(state))
    if _paths(after) != list(paths):
        _refuse("state", "the tree that went in", f"leaves {', '.join(map('.'.join, _paths(after)))}")
    names = (*map(".".join, paths), *map(".".join, _paths(micro_batch)), IS_LAST)
    for name, path, before, now in zip(names, paths, jax.tree.leaves(state), jax.tree.leaves(after), strict=False):
        if _part(path) == "sums" and {str(before.dtype), str(now.dtype)} != {"float32"}:
            _refuse(name, "float32 sums", f"{before.dtype} in, {now.dtype} out")
    outputs = dict(enumerate(results(traced, arguments(len(names)))))
    kept = {place: outputs[place] for place, path in enumerate(paths) if _part(path) is not None}
    if not {"params", "sums"} <= {_part(path) for path in paths}:
        _refuse("state", "parameters and sums", f"leaves {names[: len(paths)]}")
    final = _final_cond(names, kept)
    on_operands = arguments(len(final.operands) - 1)
    stay, last = (results(branch, on_operands) for branch in final.equation.params["branches"])
    return _Program(
        paths=paths,
        names=names,
        final=final,
        stay={place: stay[value.output] for place, value in kept.items()},
        last={place: last[value.output] for place, value in kept.items()},
    )


def _final_cond(names: Sequence[str], kept: Mapping[int, Value]) -> Operation:
    """The one `cond` on is_last from which sums, parameters and optimizer states come."""
    final = next(iter(kept.values())).operation
    for place, value in kept.items():
        if value.operation is None or value.operation.name != "cond" or value.operation is not final:
            _refuse(names[place], "the result of the final cond on is_last", _described(value))
    if final is None or len(final.equation.params["branches"]) != 2:
        _refuse("is_last", "a final cond of two branches", "another number of branches")
    decides = final.operands[0]
    if decides.operation is not None and decides.operation.name == "convert_element_type":
        decides = decides.operation.operands[0]
    if decides.argument is None or names[decides.argument] != IS_LAST:
        _refuse(IS_LAST, "the final cond to be decided by is_last itself", _described(decides))
    return final


def _added(program: _Program, place: int) -> Value:
    """What the final `cond` gets for a leaf of the sums, and returns as it is where the micro-batch is not the last."""
    stays = program.stay[place]
    if stays.argument is None:
        _refuse(program.names[place], "the other branch to return the sums as they came", _described(stays))
    return program.operand(stays.argument)


def _addend(program: _Program, place: int, added: Value) -> Value:
    """The operand of the add that is not the leaf itself."""
    name = program.names[place]
    if added.operation is None or added.operation.name != "add":
        _refuse(name, "one unconditional add to be what the final cond gets", _described(added))
    atoms: list[Any] = [*added.operation.equation.invars, *added.operation.equation.outvars]
    dtypes = {str(atom.aval.dtype) for atom in atoms}
    if dtypes != {"float32"}:
        _refuse(name, "a float32 add", f"one of {', '.join(sorted(dtypes))}")
    others = [value for value in added.operation.operands if value.argument != place]
    if len(others) != 1:
        found = " and ".join(map(_described, added.operation.operands))
        _refuse(name, "the add of the sums as they came in and one addend", f"the add of {found}")
    _known(name, "the addend", others[0].reads)
    return others[0]


def _gradient_reads(name: str, reads: Sequence[str], fields: Sequence[str], required: Iterable[str]) -> None:
    allowed = {PARAMETERS, *fields} - set(PLAN)
    wrong = [field for field in reads if field not in allowed]
    if wrong:
        _refuse(name, "an addend that depends on micro-batch and parameters alone", f"that it reads {', '.join(wrong)}")
    missing = [field for field in required if field not in reads]
    if missing:
        found = f"that it reads {', '.join(reads) or 'nothing'}"
        _refuse(name, f"an addend that depends on {', '.join(missing)}", found)


def _witness_reads(name: str, reads: Sequence[str]) -> None:
    if tuple(reads) != WITNESS_READS:
        found = f"that it reads {', '.join(reads) or 'nothing'}"
        _refuse(name, f"an addend that depends on {' and '.join(WITNESS_READS)} alone", found)


def _kept_until_last(program: _Program, place: int) -> None:
    """Raises unless the other branch returns this leaf of parameters or optimizer as it came into the step."""
    stays = program.stay[place]
    came = stays if stays.argument is None else program.operand(stays.argument)
    if came is stays or came.argument != place:
        _refuse(program.names[place], "the other branch to return it as it came", _described(came))


def _updated_from_sums(program: _Program, place: int, added: Mapping[int, Value]) -> None:
    """Raises unless the last branch computes it from parameters, optimizers and sums; a parameter from all its sums."""
    name, path, new = program.names[place], program.paths[place], program.last[place]
    _known(name, "its new value", new.reads)

    def sums_in(reads: Reads) -> set[int]:
        operands = [program.operand(operand) for operand in _places(reads)]
        return {leaf for leaf, value in added.items() if any(value is operand for operand in operands)}

    def may_enter(value: Value) -> bool:
        if value.argument is not None and value.argument < len(program.paths):
            return _part(program.paths[value.argument]) in ("params", "optimizer")
        return not value.reads or any(value is total for total in added.values())

    for operand in _places(new.data):
        value = program.operand(operand)
        if not may_enter(value):
            found = f"{_described(value)}, which reads {', '.join(program.named(value.reads))}"
            _refuse(name, "a new value computed from parameters, sums and optimizer states", found)
    if path[0] != "params":
        return
    chain = {program.paths[leaf][3:]: leaf for leaf in added if program.paths[leaf][1] == path[1]}
    own = chain.get(("gradients", *path[2:]))
    if own is None or ("witness",) not in chain:
        _refuse(
            name, "a sum of its gradients and a witness", f"the sums {', '.join(map('.'.join, chain)) or 'of nothing'}"
        )
    for leaf in chain.values():
        if leaf not in sums_in(new.reads):
            _refuse(name, f"a new value that depends on {program.names[leaf]}", "that it does not read it")
    if own not in sums_in(new.data):
        _refuse(name, f"a new value computed from {program.names[own]}", "that it is not among its operands")


def _is_zero(value: Value) -> bool:
    """True of a constant zero, also one broadcast to a shape."""
    if value.operation is not None and value.operation.name == "broadcast_in_dim":
        value = value.operation.operands[0]
    return bool(value.constant) and not np.any(np.asarray(value.constant[0]))


def _part(path: Path) -> str | None:
    """`params`, `sums` or `optimizer`; None for the rest of the state."""
    if path[0] == "params":
        return "params"
    return path[2] if path[0] == "chains" and path[2] in ("sums", "optimizer") else None


def _paths(tree: Any) -> list[Path]:
    return [
        tuple(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path)
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _places(reads: Reads) -> list[int]:
    return sorted(read for read in reads if isinstance(read, int))


def _known(name: str, what: str, reads: Reads) -> None:
    """Raises where something was read through a primitive that cannot be followed."""
    unknown = sorted(read for read in reads if isinstance(read, str))
    if unknown:
        _refuse(name, f"{what} to come through operations that can be followed", f"`{'`, `'.join(unknown)}`")


def _described(value: Value) -> str:
    if value.operation is not None:
        return f"`{value.operation.name}`"
    if value.argument is not None:
        return "one of the program's arguments"
    return "a constant" if value.constant else "something unknown"


def _refuse(name: str, expected: str, found: str) -> NoReturn:
    raise CertificateError(f"{name}: expected {expected}, found {found}")
