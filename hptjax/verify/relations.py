"""Equations and inequalities: what they name, the interval that they mean, whether two say the same."""

from __future__ import annotations

from fractions import Fraction

from hptjax.verify import nodes
from hptjax.verify.equal import Value, divided, points, same_value, value_at
from hptjax.verify.evaluate import Approximate
from hptjax.verify.nodes import Node

_LESS = {"<": "<", "<=": "<=", ">": "<", ">=": "<="}
_INFINITY = nodes.Name("oo")


def named_value(node: Node) -> Node | None:
    """The value in x = 5, 5 = x, f(x) = 5, (x, y) = (1, 2) and x in S; None for any other relation."""
    if not isinstance(node, nodes.Relation) or len(node.operators) != 1:
        return None
    left, right = node.sides
    if node.operators[0] == "in" or (node.operators[0] == "=" and _is_name(left)):
        return right if _is_name(left) and not _mentions(right, left) else None
    return left if node.operators[0] == "=" and _is_name(right) and not _mentions(left, right) else None


def _is_variable(node: Node) -> bool:
    return isinstance(node, nodes.Name) and node.name not in nodes.CONSTANTS


def _is_name(node: Node) -> bool:
    match node:
        case nodes.Name():
            return _is_variable(node)
        case nodes.Mul(factors=(nodes.Name(), nodes.Name())):  # f(x), or x times y: a product is no answer by itself
            return True
        case nodes.Items(brackets="()", items=items):
            return all(isinstance(item, nodes.Name) for item in items)
    return False


def _mentions(node: Node, name: Node) -> bool:
    """Whether a name's own letter stands in its value, as in x = x + 1; f(x) = x does not count."""
    return isinstance(name, nodes.Name) and name.name in nodes.variables(node)


def is_interval(node: Node) -> bool:
    """Whether a node can be a set of real numbers with endpoints, or a union of such sets."""
    if isinstance(node, nodes.Union):
        return all(is_interval(part) for part in node.parts)
    return isinstance(node, nodes.Items) and (
        (node.brackets in ("()", "[]", "[)", "(]") and len(node.items) == 2) or node.brackets == "{}"
    )


def means_interval(node: Node) -> bool:
    """Whether it can be nothing else: (1, 2) may be a point, but [1, 2), (1, oo) and unions may not."""
    if isinstance(node, nodes.Union):
        return True
    endless = any(item in (_INFINITY, nodes.Neg(_INFINITY)) for item in nodes.children(node))
    return isinstance(node, nodes.Items) and is_interval(node) and (node.brackets != "()" or endless)


def interval_of(node: Node) -> Node | None:
    """The interval of an inequality in one lone variable, as 1 < x <= 2 or x > 3; a union where an or joins some."""
    if isinstance(node, nodes.Items):
        parts = [interval_of(item) for item in node.items] if node.brackets == "or" else [None]
        if None in parts or len(nodes.variables(node)) != 1:
            return None
        return nodes.Union(tuple(part for part in parts if part is not None))
    if not isinstance(node, nodes.Relation):
        return None
    if node.operators == ("in",) and _is_variable(node.sides[0]) and is_interval(node.sides[1]):
        return node.sides[1]
    if any(operator not in _LESS for operator in node.operators):
        return None
    names = [place for place, side in enumerate(node.sides) if _is_variable(side)]
    if len(node.sides) > 3 or len(names) != 1 or (len(node.sides) == 3 and names != [1]):
        return None
    if len({operator[0] for operator in node.operators}) != 1:  # 1 < x > 2
        return None
    sides, operators = list(node.sides), [_LESS[operator] for operator in node.operators]
    if node.operators[0][0] == ">":
        sides, operators = sides[::-1], operators[::-1]
    if _is_variable(sides[0]):
        sides, operators = [nodes.Neg(_INFINITY), *sides], ["<", *operators]
    if len(sides) == 2:
        sides, operators = [*sides, _INFINITY], [*operators, "<"]
    brackets = ("(" if operators[0] == "<" else "[") + (")" if operators[1] == "<" else "]")
    return nodes.Items(brackets, (sides[0], sides[2]))


def equal_relations(gold: nodes.Relation, answer: nodes.Relation) -> bool | None:
    """Whether two relations of two sides hold for the same values: left - right of one is a multiple of the other's.

    The multiple is a number, above 0 for inequalities written as less-than. Other equal relations, such as x^2 = 4 and
    |x| = 2, are not found: None.
    """
    if len(gold.operators) != 1 or len(answer.operators) != 1:
        return None
    kind, other = gold.operators[0], answer.operators[0]
    if "in" in (kind, other):
        return None
    if _LESS.get(kind, kind) != _LESS.get(other, other):
        return False if {kind, other} <= {"=", "!="} else None
    left, right = _difference(gold), _difference(answer)
    if not all(isinstance(side, nodes.EXPRESSIONS) for side in (*gold.sides, *answer.sides)):
        return None
    pairs = []
    for at in points(nodes.variables(gold) | nodes.variables(answer)):
        values = value_at(left, at), value_at(right, at)
        if values[0] is not None and values[1] is not None:
            pairs.append((values[0], values[1]))
    return _proportional(pairs, ordered=kind in _LESS) if len(pairs) >= 5 else None


def _difference(relation: nodes.Relation) -> Node:
    """left - right, or right - left for a greater-than, so that the relation is left < right, = or !=."""
    left, right = relation.sides if relation.operators[0] not in (">", ">=") else relation.sides[::-1]
    return nodes.Add((left, nodes.Neg(right)))


def _proportional(pairs: list[tuple[Value, Value]], *, ordered: bool) -> bool | None:
    """Whether the first of every pair is the same multiple of the second."""
    if any(isinstance(value, Approximate) for pair in pairs for value in pair):
        ratios: list[Value] = []
        for first, second in pairs:
            ratio = divided(first, second)
            if ratio is None:
                return None
            ratios.append(ratio)
        said = [same_value(ratios[0], ratio) for ratio in ratios[1:]]
        positive = not ordered or _real_part(ratios[0]) > 0
        return None if None in said else all(said) and positive
    exact = [(first, second) for first, second in pairs if isinstance(first, Fraction) and isinstance(second, Fraction)]
    if any((first == 0) != (second == 0) for first, second in exact):
        return False
    found = {first / second for first, second in exact if second != 0}
    return len(found) == 1 and (not ordered or next(iter(found)) > 0) if found else None


def _real_part(value: Value) -> Fraction:
    return value if isinstance(value, Fraction) else Fraction(value.value.real)
