"""The countdown task: solver, generator, demonstrations and verifier, against routes that share no code with them."""

from __future__ import annotations

import doctest
import itertools
import operator
import subprocess
import sys
import time
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hptjax.tasks import countdown_verifier
from hptjax.tasks.countdown import (
    SYMBOLS,
    Countdown,
    countdown,
    enumerate_instances,
    generate,
    write_examples,
)
from hptjax.tasks.countdown_solver import Rules, random_chain, solve
from hptjax.tasks.countdown_verifier import FORM_REASONS, REASONS, verify, well_formed

FUNCTIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": lambda a, b: a / b if b else None}


def _trees(values):
    """Every expression over the values in every order and shape: (value as a fraction, steps), legal or not."""
    if len(values) == 1:
        yield Fraction(values[0]), ()
        return
    for cut in range(1, len(values)):
        for (a, left), (b, right) in itertools.product(_trees(values[:cut]), _trees(values[cut:])):
            for symbol, function in FUNCTIONS.items():
                result = function(a, b)
                if result is not None:
                    yield result, (*left, *right, (a, symbol, b, result))


def _brute_force(numbers, rules):
    """target -> set of distinct solutions, by permutations x shapes x operators over fractions."""
    found = {}
    for order in set(itertools.permutations(numbers)):
        for value, steps in _trees(order):
            results = [step[3] for step in steps]
            legal = all(r.denominator == 1 and abs(r) <= rules.max_value for r in results)
            legal = legal and (rules.negative or min(results) >= 0) and all(s[1] in rules.operators for s in steps)
            if legal:
                ordered = [(max(a, b), o, min(a, b), r) if o in "+*" else (a, o, b, r) for a, o, b, r in steps]
                found.setdefault(int(value), set()).add(tuple(sorted(ordered)))
    return found


def _steps(chain):
    """A chain's steps in the brute force's normal form, read without the verifier's parser."""
    steps = []
    for text in chain.split(","):
        head, result = text.split("=")
        symbol = next(c for c in head[1:] if c in "+-*/")
        place = head.index(symbol, 1)
        parts = (head[:place], head[place + 1 :], result)
        if any(part != str(int(part)) for part in parts):
            raise ValueError(f"a number that is not written plainly, in {text!r}")
        a, b = Fraction(int(parts[0])), Fraction(int(parts[1]))
        a, b = (max(a, b), min(a, b)) if symbol in "+*" else (a, b)
        steps.append((a, symbol, b, Fraction(int(result))))
    return tuple(sorted(steps))


@pytest.mark.parametrize(
    ("numbers", "rules"),
    [
        ((3, 7, 12), Rules()),
        ((2, 2, 4), Rules()),
        ((1, 1, 1), Rules()),
        ((6, 6, 12), Rules(max_value=50)),
        ((2, 5, 9), Rules(negative=True)),
        ((4, 6, 8), Rules(operators="+-")),
        ((1, 2, 3, 4), Rules()),
        ((2, 2, 6, 6), Rules(max_value=99)),
        ((1, 3, 4), Rules(negative=True, operators="-/")),
    ],
)
def test_solver_finds_exactly_what_brute_force_finds(numbers, rules):
    brute = _brute_force(numbers, rules)
    for target in {*brute, *range(-5, 40)}:
        chains = solve(numbers, target, rules)
        assert len(chains) == len(set(chains))
        assert Counter(map(_steps, chains)) == Counter(brute.get(target, ())), (target, chains)


def test_enumeration_lists_exactly_the_reachable_targets():
    for count, high, rules in ((3, 5, Rules()), (3, 4, Rules(negative=True, max_value=40)), (4, 3, Rules())):
        expected = {
            (numbers, target)
            for numbers in itertools.combinations_with_replacement(range(1, high + 1), count)
            for target in _brute_force(numbers, rules)
            if -3 <= target <= 30
        }
        found = enumerate_instances(count, 1, high, -3, 30, rules)
        assert {(i.numbers, i.target) for i in found} == expected
        assert len(found) == len(expected)
        assert found == sorted(found)
        assert len({i.canonical for i in found}) == len(found)


def test_solver_orders_the_simplest_solution_first():
    """3,3,9 to 9: one subtraction and no product beat 3*9/3; among such chains of one length the text decides."""
    chains = solve((3, 3, 9), 9)
    assert chains[0] == "3-3=0,9+0=9"
    assert [c.count("/") for c in chains] == sorted(c.count("/") for c in chains)


def test_demonstrations_all_verify_and_fit_the_expected_length():
    instances = enumerate_instances(3, 4, 12, 1, 60)[::15] + enumerate_instances(4, 4, 6, 1, 60)[::20]
    for style in ("random", "first"):
        examples = write_examples(instances, seed=5, style=style)
        verdicts = [verify(e.demonstration, e.answer) for e in examples]
        assert all(v.solved and v.reward == 1.0 and v.reason == "correct" for v in verdicts)
        assert all(well_formed(e.demonstration, e.answer).solved for e in examples)
        assert {c for e in examples for c in e.prompt + e.demonstration} <= set(SYMBOLS)
        assert [e.question_id for e in examples] == list(range(len(examples)))
        short = [e for e in examples if len(e.answer["numbers"]) == 3]
        assert max(len(e.prompt) for e in short) <= 13
        assert max(len(e.demonstration) for e in short) <= 18
    assert write_examples([Countdown((3, 7, 12), 28)], 0, shuffle=False)[0].prompt == "3,7,12=28:"


def test_prompts_hold_the_numbers_and_the_target():
    for example in write_examples(enumerate_instances(3, 1, 6, 1, 30), seed=1):
        head, target = example.prompt.removesuffix(":").split("=")
        numbers = sorted(map(int, head.split(",")))
        assert numbers == example.answer["numbers"]
        assert int(target) == example.answer["target"]
        assert example.canonical == f"{','.join(map(str, numbers))}={target}"


def test_examples_depend_on_seed_and_instance_only():
    instances = enumerate_instances(3, 1, 9, 1, 40)[:120]
    texts = {e.canonical: (e.prompt, e.demonstration) for e in write_examples(instances, seed=1)}
    backwards = write_examples(instances[::-2], seed=1)
    assert all(texts[e.canonical] == (e.prompt, e.demonstration) for e in backwards)
    other = write_examples(instances, seed=2)
    assert sum(texts[e.canonical] != (e.prompt, e.demonstration) for e in other) > 60


def test_random_style_shows_every_solution_and_first_shows_one():
    instance = Countdown((2, 2, 4), 4)
    solutions = set(solve(instance.numbers, instance.target))
    assert len(solutions) > 2
    shown = {write_examples([instance], seed)[0].demonstration for seed in range(100)}
    assert shown == solutions
    assert {write_examples([instance], seed, style="first")[0].demonstration for seed in range(20)} == {
        solve(instance.numbers, instance.target)[0]
    }


def test_generator_is_deterministic_distinct_and_solvable():
    knobs = {"numbers": 4, "low": 1, "high": 50, "target_low": 10, "target_high": 99}
    first, again, other = (generate(seed, 40, **knobs) for seed in (7, 7, 8))
    assert first == again
    assert first != other
    assert len(set(first)) == 40
    assert generate(7, 10, **knobs) == first[:10]
    assert all(10 <= i.target <= 99 and solve(i.numbers, i.target) for i in first[:5])
    small = {"numbers": 3, "low": 1, "high": 3, "target_low": 1, "target_high": 30}
    everything = enumerate_instances(3, 1, 3, 1, 30)
    assert set(generate(0, len(everything), **small)) == set(everything)
    with pytest.raises(ValueError, match=r"task\.low"):
        generate(0, len(everything) + 1, **small)


def test_random_chains_are_right_in_form_and_arithmetic():
    rng = np.random.default_rng(0)
    rules = Rules(max_value=999)
    for _ in range(200):
        numbers = rng.integers(1, 20, size=int(rng.integers(2, 5))).tolist()
        chain = random_chain(rng, numbers, rules)
        end = int(chain.rpartition("=")[2])
        assert verify(chain, {"numbers": numbers, "target": end}).solved
        assert verify(chain, {"numbers": numbers, "target": end + 1}).reason == "wrong_target"
    with pytest.raises(ValueError, match=r"task\.max_value"):
        random_chain(rng, [9, 9], Rules(operators="*", max_value=9))


def test_corrupt_corpus_misses_the_target_at_the_given_rate():
    instances = enumerate_instances(3, 1, 6, 1, 40)[::3]
    for rate, low, high in ((0.0, 0.0, 0.0), (0.3, 0.18, 0.42), (1.0, 0.98, 1.0)):
        reasons = Counter(verify(e.demonstration, e.answer).reason for e in write_examples(instances, 0, corrupt=rate))
        assert set(reasons) <= {"correct", "wrong_target"}
        assert low <= reasons["wrong_target"] / len(instances) <= high


ANSWER = {"numbers": [3, 7, 12], "target": 3}


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("12/3=4,7-4=3", "correct"),
        ("3+7=10,12-10=2", "wrong_target"),
        ("12/3=5,7-5=2", "bad_arithmetic"),
        ("12/7=1,1*3=3", "bad_arithmetic"),
        ("12/0=0,7-4=3", "bad_arithmetic"),
        ("12/3=4,7-4=2", "bad_arithmetic"),
        ("12/4=3", "wrong_numbers"),
        ("7-4=3", "wrong_numbers"),
        ("12/3=4", "wrong_numbers"),
        ("12/3=4,7-4=3,3*1=3", "wrong_numbers"),
        ("12-3=9,12-9=3", "wrong_numbers"),
        ("3-7=-4,-4+12=8", "forbidden"),
        ("", "unparsable"),
        (",", "unparsable"),
        ("12/3=4,7-4=3,", "unparsable"),
        (" 12/3=4,7-4=3", "unparsable"),
        ("12/3=4,7-4=3\n", "unparsable"),
        ("12/03=4,7-4=3", "unparsable"),
        ("+12/3=4,7-4=3", "unparsable"),
        ("12/3=4,7-4=-0", "unparsable"),
        ("12/3=4;7-4=3", "unparsable"),
        ("12//3=4,7-4=3", "unparsable"),
        ("12**3=4,7-4=3", "unparsable"),
        ("12/3==4,7-4=3", "unparsable"),
        ("12/3=4,7-4=3.0", "unparsable"),
        ("(12/3)=4,7-4=3", "unparsable"),
        ("12/3=4,7-4=\u0663", "unparsable"),  # Arabic-Indic three, which int() and \d accept
        ("\uff11\uff12/3=4,7-4=3", "unparsable"),  # full-width digits
        ("1\uff12/3=4,7-4=3", "unparsable"),
        ("12/3=4,7-4=1_0", "unparsable"),
        ("1" * 10_000, "unparsable"),
        ("9" * 10 + "-3=4,7-4=3", "unparsable"),
        ("__import__('os')", "unparsable"),
    ],
)
def test_verifier_gives_each_completion_its_reason(completion, reason):
    verdict = verify(completion, ANSWER)
    assert verdict.reason == reason
    assert verdict.reason in REASONS
    assert verdict.solved == (reason == "correct")
    assert verdict.reward == float(verdict.solved)


def test_verifier_follows_the_rules_in_the_answer():
    assert verify("3-7=-4,-4+12=8", {"numbers": [3, 7, 12], "target": 8, "negative": True}).solved
    assert verify("7-12=-5,3--5=8", {"numbers": [3, 7, 12], "target": 8, "negative": True}).solved
    assert verify("12/3=4,7-4=3", {**ANSWER, "operators": "+-"}).reason == "forbidden"
    assert verify("3*3=9", {"numbers": [3, 3], "target": 9}).solved
    assert verify("3*3=9", {"numbers": [3, 4], "target": 9}).reason == "wrong_numbers"


@settings(max_examples=100)
@given(st.data())
def test_verifier_rejects_every_single_character_change_that_is_not_a_solution(data):
    """A changed chain is accepted only if an independent reading finds it to be a solution as well."""
    example = data.draw(st.sampled_from(MUTABLE))
    text = example.demonstration
    place = data.draw(st.integers(0, len(text)))
    kind = data.draw(st.sampled_from(("replace", "insert", "delete")))
    new = data.draw(st.sampled_from(SYMBOLS)) if kind != "delete" else ""
    changed = text[:place] + new + text[place + (kind != "insert") :]
    accepted = verify(changed, example.answer).solved
    try:
        solution = _steps(changed) in _SOLUTIONS[example.canonical] and _is_in_order(changed, example)
    except (ValueError, StopIteration):
        solution = False
    assert accepted == solution


def _is_in_order(chain, example):
    """Whether every operand is given or the result of an earlier step, and the last result is the target."""
    seen = set(example.answer["numbers"])
    for text in chain.split(","):
        head, result = text.split("=")
        place = next(i for i, c in enumerate(head) if i and c in "+-*/")
        if not {int(head[:place]), int(head[place + 1 :])} <= seen:
            return False
        seen.add(int(result))
    return int(result) == example.answer["target"]


MUTABLE = write_examples(enumerate_instances(3, 2, 6, 1, 30)[::9], seed=0)
_SOLUTIONS = {e.canonical: _brute_force(tuple(e.answer["numbers"]), Rules())[e.answer["target"]] for e in MUTABLE}


@settings(max_examples=60)
@given(st.text(max_size=40) | st.text(alphabet=SYMBOLS, max_size=40))
def test_verifier_survives_any_text(text):
    for answer in (ANSWER, {**ANSWER, "negative": True}):
        assert verify(text, answer).reason in REASONS
        assert well_formed(text, answer).reason in FORM_REASONS


@pytest.mark.timed
def test_verifier_is_fast_on_long_text():
    pieces = ["1", "1-1=0,", "12/3=4,7-4=3,", "-", "=", ",", "9*9=81,", "(", "\u0663", "1+"]
    for piece in pieces:
        text = (piece * 10_000)[:10_000]
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            assert not verify(text, ANSWER).solved
            assert not well_formed(text, ANSWER).solved
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < 0.005


def test_well_formed_asks_for_the_form_only():
    for text, formed in (
        ("12/3=4,7-4=3", True),
        ("1+1=3,9*9=1", True),
        ("12/3=4", False),
        ("1+1=2,1+1=2,1+1=2", False),
        ("x", False),
    ):
        verdict = well_formed(text, ANSWER)
        assert (verdict.solved, verdict.reward, verdict.reason) == (formed, float(formed), FORM_REASONS[not formed])


@pytest.mark.timed
def test_solver_is_fast_enough_to_write_demonstrations():
    """Processor time per instance, without the type checks of the tests: below 1 ms with 3 numbers, 10 ms with 4."""
    program = (
        "import time; from hptjax.tasks.countdown import generate, solve\n"
        "for count, high in ((3, 20), (4, 20)):\n"
        "    instances = generate(0, 100, numbers=count, low=1, high=high, target_low=1, target_high=60)\n"
        "    start = time.process_time()\n"
        "    assert all(solve(i.numbers, i.target) for i in instances)\n"
        "    print((time.process_time() - start) / 100)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    three, four = map(float, result.stdout.split())
    assert three < 1e-3
    assert four < 1e-2


def test_task_carries_its_knobs():
    task = countdown(numbers=3, low=2, high=5, target_low=4, target_high=20, style="first", shuffle=False)
    instances = task.instances()
    assert set(task.generate(1, 10)) <= set(instances)
    assert task.symbols == SYMBOLS
    example = task.write(instances[:1], 0)[0]
    assert task.verify(example.demonstration, example.answer).solved
    assert example.demonstration == solve(instances[0].numbers, instances[0].target)[0]
    for knobs, field in (
        ({"numbers": 1}, "task.numbers"),
        ({"low": 0}, "task.low"),
        ({"low": 9, "high": 3}, "task.high"),
        ({"target_low": 5, "target_high": 4}, "task.target_low"),
        ({"operators": "+x"}, "task.operators"),
        ({"max_value": 3}, "task.max_value"),
        ({"style": "best"}, "task.style"),
    ):
        with pytest.raises(ValueError, match=field):
            countdown(**knobs)


def test_verifier_docstring_example_runs():
    assert doctest.testmod(countdown_verifier).attempted > 0
    assert doctest.testmod(countdown_verifier).failed == 0
