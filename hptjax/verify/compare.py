"""Whether two answers that were read are the same answer: True, False, or None where this module cannot tell.

Shapes are compared here (lists, sets, intervals, relations, units); the expressions inside by `equal`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from fractions import Fraction

from hptjax.verify import nodes
from hptjax.verify.equal import close, equal_expressions, is_written_out, rounds_to
from hptjax.verify.nodes import Node
from hptjax.verify.policy import Policy
from hptjax.verify.relations import equal_relations, interval_of, is_interval, means_interval, named_value
from hptjax.verify.units import LETTERS, unit_name

BARE = ("", "or")  # brackets of a list that has none
MAX_ITEMS = 32


def same_answer(gold: Node, answer: Node, policy: Policy) -> bool | None:
    """Whether the answer is the gold one under a policy.

    The two are not exchangeable: the gold answer decides what form is asked for, and which of two meanings is meant.
    """
    if isinstance(gold, nodes.About) or isinstance(answer, nodes.About):
        return _same_about(gold, answer, policy)
    gold, answer = spread(gold), spread(answer)
    if isinstance(gold, nodes.Words) or isinstance(answer, nodes.Words):
        return gold == answer
    if isinstance(gold, nodes.Numeral) or isinstance(answer, nodes.Numeral):
        return gold == answer
    if isinstance(gold, nodes.Quantity) or isinstance(answer, nodes.Quantity):
        return _same_quantity(gold, answer, policy)
    if isinstance(gold, nodes.Relation) or isinstance(answer, nodes.Relation):
        return _same_relation(gold, answer, policy)
    if isinstance(gold, nodes.Matrix) or isinstance(answer, nodes.Matrix):
        return _same_matrix(gold, answer, policy)
    if isinstance(gold, nodes.Items | nodes.Union) or isinstance(answer, nodes.Items | nodes.Union):
        return _same_items(gold, answer, policy)
    return _same_expression(gold, answer, policy)


def reason_for(gold: Node, answer: Node) -> str:
    """The name of the route by which two answers of these shapes are equal."""
    shapes = (nodes.Items, nodes.Union, nodes.Matrix)
    inner = [_unnamed(node) for node in (gold, answer)]
    if any(isinstance(node, shapes) for node in inner):
        return "set"
    values = [node.value if isinstance(node, nodes.Quantity) else node for node in inner]
    return "numeric" if all(is_written_out(value) for value in values) else "symbolic"


def spread(node: Node) -> Node:
    """A plus-minus sign as a list of the two values; anything else, and one that a root holds, as it is."""
    if not any(isinstance(part, nodes.PlusMinus) for part in nodes.walk(node)):
        return node
    if isinstance(node, nodes.Items) and node.brackets in (*BARE, "{}"):
        spread_items = [spread(item) for item in node.items]
        flat: list[Node] = []
        for item in spread_items:
            flat += item.items if isinstance(item, nodes.Items) and item.brackets in BARE else (item,)
        return nodes.Items(node.brackets, tuple(flat))
    upper, lower = _signed(node, 1), _signed(node, -1)
    if any(isinstance(part, nodes.PlusMinus) for part in nodes.walk(upper)):
        return node
    return nodes.Items("", (upper, lower))


def _signed(node: Node, sign: int) -> Node:
    """The node with the upper or the lower of its plus-minus signs."""
    match node:
        case nodes.PlusMinus(left=left, right=right, sign=own):
            right = _signed(right, sign)
            right = right if sign * own > 0 else nodes.Neg(right)
            return right if left is None else nodes.Add((_signed(left, sign), right))
        case nodes.Relation(sides=sides, operators=operators):
            return nodes.Relation(tuple(_signed(side, sign) for side in sides), operators)
        case nodes.Add(terms=terms):
            return nodes.Add(tuple(_signed(term, sign) for term in terms))
        case nodes.Mul(factors=factors):
            return nodes.Mul(tuple(_signed(factor, sign) for factor in factors))
        case nodes.Div(top=top, bottom=bottom):
            return nodes.Div(_signed(top, sign), _signed(bottom, sign))
        case nodes.Neg(value=value):
            return nodes.Neg(_signed(value, sign))
        case nodes.Quantity(value=value, unit=unit):
            return nodes.Quantity(_signed(value, sign), unit)
        case nodes.Items(brackets=brackets, items=items):
            return nodes.Items(brackets, tuple(_signed(item, sign) for item in items))
        case nodes.About(exact=exact, near=near):
            return nodes.About(None if exact is None else _signed(exact, sign), _signed(near, sign))
    return node  # inside a root or a function it stays, and nothing evaluates it


def _all(said: Iterable[bool | None]) -> bool | None:
    """False if one is, else None if one is, else True."""
    answers = list(said)
    return False if False in answers else None if None in answers else True


def _any(said: Iterable[bool | None]) -> bool | None:
    """True if one is, else None if one is, else False."""
    answers = list(said)
    return True if True in answers else None if None in answers else False


def _same_about(gold: Node, answer: Node, policy: Policy) -> bool | None:
    r"""An answer with \approx: what stands before it for the strict, either side for the lenient, if the two are near.

    A gold answer that says no more than "about 3.14" asks for 3.14.
    """
    if isinstance(answer, nodes.About) and answer.exact is not None and not close(_unnamed(answer.exact), answer.near):
        return False
    near = policy.rounding or (isinstance(gold, nodes.About) and gold.exact is None)
    pairs = itertools.product(_meant(gold, near=near), _meant(answer, near=near))
    return _any(same_answer(one, other, policy) for one, other in pairs)


def _meant(node: Node, *, near: bool) -> list[Node]:
    r"""The sides of an \approx that count; any other node as it is."""
    if not isinstance(node, nodes.About):
        return [node]
    return [side for side in (node.exact, node.near if near else None) if side is not None]


def _same_expression(gold: Node, answer: Node, policy: Policy) -> bool | None:
    if policy.final_form and is_written_out(gold) and not is_written_out(answer):
        return False
    if any(nodes.Name("oo") in nodes.walk(node) for node in (gold, answer)):
        return gold == answer
    same = equal_expressions(gold, answer)
    return True if same is False and policy.rounding and rounds_to(gold, answer) else same


def _same_quantity(gold: Node, answer: Node, policy: Policy) -> bool | None:
    (gold_value, gold_unit), (value, unit) = _with_unit(gold, answer), _with_unit(answer, gold)
    if gold_unit == unit:
        return same_answer(gold_value, value, policy)
    if not policy.units or (gold_unit and unit):
        return False
    golds, values = [gold_value], [value]
    for unit_of, found in ((gold_unit, golds), (unit, values)):
        if unit_of == "%" and isinstance(found[0], nodes.EXPRESSIONS):
            found.append(nodes.Div(found[0], nodes.Number(Fraction(100))))
    return _any(same_answer(one, other, policy) for one in golds for other in values)


def _with_unit(node: Node, other: Node) -> tuple[Node, str]:
    """The value and its unit; the m of 5m is a unit where the other answer is a number or has that unit."""
    if isinstance(node, nodes.Quantity):
        return node.value, node.unit
    match node:
        case nodes.Mul(factors=(nodes.Number() as value, nodes.Name(name=letter))) if letter in LETTERS:
            if isinstance(other, nodes.Quantity) and other.unit == unit_name(letter):
                return value, other.unit
    return node, ""


def _same_relation(gold: Node, answer: Node, policy: Policy) -> bool | None:
    if isinstance(gold, nodes.Relation) and isinstance(answer, nodes.Relation):
        return _both_relations(gold, answer, policy)
    if isinstance(answer, nodes.Relation):
        value = named_value(answer)
        if value is not None:
            return same_answer(gold, value, policy)
        if policy.brackets and set(answer.operators) == {"="}:  # 1+2=3: every side must be the gold value
            return _all(same_answer(gold, side, policy) for side in answer.sides)
        interval = interval_of(answer)
        if interval is None or not is_interval(gold):
            return False
        return same_answer(gold, interval, policy) if policy.brackets or means_interval(gold) else False
    assert isinstance(gold, nodes.Relation)
    value = named_value(gold)
    if value is not None:
        asked = policy.brackets or not nodes.variables(value)  # y = 2x + 1 asks for an equation, x = 5 for 5
        return same_answer(value, answer, policy) if asked else False
    interval = interval_of(gold)
    return same_answer(interval, answer, policy) if interval is not None and is_interval(answer) else False


def _both_relations(gold: nodes.Relation, answer: nodes.Relation, policy: Policy) -> bool | None:
    values = named_value(gold), named_value(answer)
    if None not in values:
        left, right = values
        assert left is not None
        assert right is not None
        constant = not (nodes.variables(left) | nodes.variables(right))
        if constant or not all(isinstance(value, nodes.EXPRESSIONS) for value in values):
            names = [_name_side(relation) for relation in (gold, answer)]
            return same_answer(left, right, policy) if names[0] == names[1] else False
    same = equal_relations(gold, answer)
    if same is not None:
        return same
    intervals = interval_of(gold), interval_of(answer)
    if intervals[0] is not None and intervals[1] is not None:
        if nodes.variables(gold) != nodes.variables(answer):
            return False
        return same_answer(intervals[0], intervals[1], policy)
    if gold.operators == answer.operators:
        sides = _all(same_answer(one, other, policy) for one, other in zip(gold.sides, answer.sides, strict=True))
        return True if sides else None
    return None


def _name_side(relation: nodes.Relation) -> Node:
    """The side of a relation that is a name; the left one where both could be."""
    value = named_value(relation)
    return relation.sides[0] if relation.sides[1] == value else relation.sides[1]


def _same_matrix(gold: Node, answer: Node, policy: Policy) -> bool | None:
    if isinstance(gold, nodes.Matrix) and isinstance(answer, nodes.Matrix):
        if [len(row) for row in gold.rows] != [len(row) for row in answer.rows]:
            return False
        pairs = zip(nodes.children(gold), nodes.children(answer), strict=True)
        return _all(same_answer(one, other, policy) for one, other in pairs)
    entries = [list(nodes.children(node)) for node in (gold, answer) if isinstance(node, nodes.Matrix | nodes.Items)]
    vector = any(isinstance(node, nodes.Matrix) and 1 in (len(node.rows), len(node.rows[0])) for node in (gold, answer))
    if policy.brackets and vector and len(entries) == 2:
        return _in_order(entries[0], entries[1], policy)
    return False


def _same_items(gold: Node, answer: Node, policy: Policy) -> bool | None:
    relations = [interval_of(node) if isinstance(node, nodes.Items) else None for node in (gold, answer)]
    if relations[0] is not None or relations[1] is not None:  # x < 1 or x > 2
        if nodes.variables(gold) and nodes.variables(answer) and nodes.variables(gold) != nodes.variables(answer):
            return False
        return same_answer(relations[0] or gold, relations[1] or answer, policy)
    if isinstance(gold, nodes.Union) or isinstance(answer, nodes.Union):
        return _same_unions(gold, answer, policy)
    if not (isinstance(gold, nodes.Items) and isinstance(answer, nodes.Items)):
        return _single_and_items(gold, answer, policy)
    one, other = gold.brackets, answer.brackets
    if len(gold.items) > MAX_ITEMS or len(answer.items) > MAX_ITEMS:
        return None
    if one in BARE and other in BARE:
        return _any_order(gold.items, answer.items, policy, repeated=not policy.brackets)
    if {one, other} <= {*BARE, "{}"}:
        return _any_order(gold.items, answer.items, policy, repeated=False)
    if one == other:
        return _in_order(gold.items, answer.items, policy)
    if not policy.brackets or "()[]" in (one + other, other + one) or ":" in (one, other):
        return False
    if {one, other} == {"{}", "()"} or {one, other} == {"{}", "[]"}:
        return _any_order(gold.items, answer.items, policy, repeated=False)
    if one in BARE or other in BARE:
        values = [[_unnamed(item) for item in node.items] for node in (gold, answer)]
        return _in_order(values[0], values[1], policy)
    return False


def _single_and_items(gold: Node, answer: Node, policy: Policy) -> bool | None:
    """One value beside a list: {5} is 5 for the lenient, and 3:4 is 3/4."""
    pair = next(node for node in (gold, answer) if isinstance(node, nodes.Items))
    if policy.brackets and len(pair.items) == 1:
        inner = [node.items[0] if node is pair else node for node in (gold, answer)]
        return same_answer(inner[0], inner[1], policy)
    if policy.brackets and pair.brackets == ":":
        ratio = nodes.Div(*pair.items)
        values = [ratio if node is pair else node for node in (gold, answer)]
        return same_answer(values[0], values[1], policy)
    other = answer if pair is gold else gold
    return None if isinstance(other, nodes.Name) and other.name in nodes.SETS and pair.brackets not in BARE else False


def _unnamed(node: Node) -> Node:
    """The value of x = 1; any other node as it is."""
    value = named_value(node)
    return node if value is None else value


def _same_unions(gold: Node, answer: Node, policy: Policy) -> bool | None:
    parts = [node.parts if isinstance(node, nodes.Union) else (node,) for node in (gold, answer)]
    if len(parts[0]) != len(parts[1]):
        sets = [
            part for found in parts for part in found if not (isinstance(part, nodes.Name) and part.name in nodes.SETS)
        ]
        return None if all(is_interval(part) for part in sets) else False
    return _any_order(parts[0], parts[1], policy, repeated=True)


def _in_order(golds: Sequence[Node], answers: Sequence[Node], policy: Policy) -> bool | None:
    if len(golds) != len(answers):
        return False
    return _all(same_answer(gold, answer, policy) for gold, answer in zip(golds, answers, strict=True))


def _any_order(golds: Sequence[Node], answers: Sequence[Node], policy: Policy, *, repeated: bool) -> bool | None:
    """Whether every item has its like on the other side; one each where `repeated` items count."""
    if repeated and len(golds) != len(answers):
        return False
    left = list(answers)
    sure = True
    for gold in golds:
        said = [same_answer(gold, answer, policy) for answer in left]
        if True in said:
            if repeated:
                del left[said.index(True)]
        elif None in said:
            sure = False
        else:
            return False
    if not repeated:
        for answer in answers:
            said = [same_answer(gold, answer, policy) for gold in golds]
            if True not in said:
                if None not in said:
                    return False
                sure = False
    return True if sure else None
