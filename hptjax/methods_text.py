"""What the methods are, from their rows: the table of `hptjax methods`, one method in full, and the same as JSON."""

from __future__ import annotations

import difflib
import inspect
import re
import textwrap
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from hptjax.build.example import example, overlay
from hptjax.build.method import REMEDY
from hptjax.build.unread import method_and_options_read
from hptjax.config import Config, resolved
from hptjax.config_methods import MethodName
from hptjax.config_text import toml_text, toml_value
from hptjax.hpt.method import CONTINUED, DEMONSTRATIONS, ROLLOUTS, Method, Part, all_needs
from hptjax.hpt.methods import METHODS
from hptjax.losses.estimator import Estimator, Need
from hptjax.losses.words import words_of

WIDTH = 140  # columns that everything fits in
NONE = "-"
COLUMNS = {
    "method": 15,
    "part": 6,
    "mask": 18,
    "denominator": 19,
    "advantage": 16,
    "reducer": 19,
    "extra": 14,
    "needs": 15,
    "source": 10,
}  # with a space between them: 140

SHORT = {
    Need.ROLLOUT_LOGPROBS: "p_rollout",
    Need.SAMPLER_LOGPROBS: "p_sampler",
    Need.REFERENCE_LOGPROBS: "reference",
    Need.TEACHER_LOGPROBS: "teacher",
    Need.DEMONSTRATION_LOGPROBS: "author",
    Need.ENTROPY: "entropy",
    Need.DEMONSTRATIONS: "demonstrations",
    Need.GROUPS: "groups",
    Need.PAIRS: "pairs",
    Need.VALUES: "critic",
}

ELSEWHERE = {
    "group_size": ("rollout.group_size",),
    "seed": ("seed",),
    "gate": ("hpt.gate",),
    "rollout_row": ("hpt.rl_estimator",),
    "clip": ("hpt.clip_low", "hpt.clip_high"),
}
"""Options of the methods that are not fields of `[methods]`, and the config fields they come from."""

LEARNERS = {ROLLOUTS: "rollouts", DEMONSTRATIONS: "demonstrations", CONTINUED: "forced prefixes"}

OF_THE_BUILD = {"dapo": ("dapo_draws", "dapo_cushion_frac"), "relift": ("relift_clip_norm",)}
"""Fields of `[methods]` that no option is made of: they act on the sampling, the rewards or an optimizer."""

LEGEND = """\
One line per part of a method; their losses add. A part's gradient on a token is
    reducer weight x mask x advantage x (p / denominator) x grad log p
p is the current policy's probability, p_rollout that at sampling weights, ratio p / p_rollout, s its geometric mean
over a sequence, R the reward, H a sequence's mean entropy; (both kinds): rollouts and demonstration share the mean and
std. Sources are arXiv numbers. What is needed comes from config fields, but for p_rollout, p_sampler and entropy.
`hptjax methods NAME` has the formula, the paper, what is done differently and a config that runs."""


def part_words(part: Part) -> dict[str, Any]:
    """One line of the table: what the part chose for each component, in words."""
    row = part.row
    factors = [f"{part.coefficient:g}"] if part.coefficient != 1.0 else []
    factors += [f"({words_of(part.schedule)})"] if part.schedule is not None else []
    words: dict[str, Any] = {
        "part": part.name,
        "learns_from": LEARNERS[part.sources],
        "reducer": part.reducer,
        "needs": [need.name.lower() for need in Need if need in row.needs],
    }
    if not isinstance(row, Estimator):
        term = words_of(row.token_loss)
        nothing = dict.fromkeys(("mask", "denominator", "advantage"), NONE)
        return {**words, **nothing, "extra": " x ".join([*factors, term]), "source": "", "difference": ""}
    advantage = words_of(row.advantage if row.token_advantage is None else row.token_advantage)
    factors += [words_of(factor) for factor in (*row.select, *row.weights)]
    return {
        **words,
        "mask": words_of(row.stability_mask),
        "denominator": words_of(row.denominator),
        "advantage": advantage + (" (both kinds)" if part.judged_with else ""),
        "extra": " ".join(f"x {factor}" for factor in factors),
        "formula": row.formula,
        "source": row.source,
        "difference": row.difference,
    }


def method_words(name: MethodName) -> dict[str, Any]:
    """Everything that is known of a method, as JSON values."""
    method, read = method_and_options_read(Config(), name)
    needs = all_needs(method)
    return {
        "name": name,
        "summary": (inspect.getdoc(METHODS[name]) or "").split("\n")[0],
        "parts": [part_words(part) for part in method.parts],
        "a_question_leaves": words_of(method.route),
        "rollouts_per_question": method.rollouts,
        "rollouts_start": words_of(method.plan) if method.plan is not None else "from the prompt",
        "beside": _beside(method),
        "source": method.source,
        "difference": method.difference,
        "needs": {need.name.lower(): {"what": need.value, "field": REMEDY.get(need)} for need in Need if need in needs},
        "constants": {
            field: value for option in (*read, *OF_THE_BUILD.get(name, ())) for field, value in _fields(option)
        },
        "overlay": overlay(name),
    }


def closest(name: str) -> MethodName:
    """`name`, if it is a method's. Raises ValueError otherwise, with the nearest names."""
    if name not in METHODS:
        near = ", ".join(difflib.get_close_matches(name, METHODS, n=3, cutoff=0.0))
        raise ValueError(f"unknown method '{name}'; the nearest are {near}. `hptjax methods` lists all of them.")
    return cast(MethodName, name)


def all_names() -> list[MethodName]:
    """The methods, in the order of the table."""
    return [cast(MethodName, name) for name in METHODS]


def print_table(console: Console) -> None:
    """The table of all methods."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for column, width in COLUMNS.items():
        table.add_column(column, overflow="fold", width=width)
    for name in all_names():
        method, _ = method_and_options_read(Config(), name)
        for place, part in enumerate(method.parts):
            words = part_words(part)
            needs = part.row.needs | (frozenset() if place else method.needs)
            source = words["source"] if place else method.source or words["source"]
            cells = (words[column] for column in ("mask", "denominator", "advantage", "reducer", "extra"))
            wanted = ", ".join(SHORT[need] for need in Need if need in needs)
            table.add_row("" if place else name, part.name, *cells, wanted, _short_source(source))
    console.print(table)
    console.print("\n" + LEGEND, highlight=False, markup=False, soft_wrap=True)


def method_text(name: MethodName) -> str:
    """One method in full."""
    words = method_words(name)
    lines = [f"{name}: {words['summary']}" if words["summary"] else name, ""]
    for part in words["parts"]:
        lines += _item(f"part {part['part']}", f"on {part['learns_from']}, shared by {part['reducer']}")
        if "formula" in part:
            chosen = ", ".join(f"{each} {part[each]}" for each in ("mask", "denominator", "advantage"))
            lines += _item("  gradient", part["formula"]) + _item("  components", chosen)
        for title, key in (("  extra", "extra"), ("  source", "source"), ("  differences", "difference")):
            lines += _item(title, part[key]) if part[key] else []
    lines += _item("a question leaves", words["a_question_leaves"])
    count = words["rollouts_per_question"]
    lines += _item("rollouts", f"{count} per question, {words['rollouts_start']}" if count else "none")
    for text in words["beside"]:
        lines += _item("beside", text)
    for title, key in (("source", "source"), ("differences", "difference")):
        lines += _item(title, words[key]) if words[key] else []
    for need in words["needs"].values():
        lines += _item("needs", f"{need['what']}: " + (f"set {need['field']}" if need["field"] else "always there"))
    for field, value in words["constants"].items():
        lines += _item(
            "constant", f"{field} = {toml_value(value)}" if value is not None else f"{field}: not set, as published"
        )
    command = f"hptjax methods {name} --toml > {name}.toml; hptjax train {name}.toml"
    return "\n".join([*lines, *_item("runs as", command), "", toml(name)])


def toml(name: MethodName) -> str:
    """The quickstart with this method and what it needs, as a config file."""
    first = f"# The quickstart, trained by {name}; `hptjax methods {name}` says what that is.\n"
    return first + toml_text(example(name))


def _fields(option: str) -> list[tuple[str, Any]]:
    """(config field, its default) of an option."""
    config = Config()
    if option not in ELSEWHERE:
        return [(f"methods.{option}", resolved(config)["methods"][option])]
    values = {
        "rollout.group_size": config.rollout.group_size,
        "seed": config.seed,
        "hpt.gate": config.hpt.gate,
        "hpt.rl_estimator": config.hpt.rl_estimator,
        "hpt.clip_low": config.hpt.clip_low,
        "hpt.clip_high": config.hpt.clip_high,
    }
    return [(field, values[field]) for field in ELSEWHERE[option]]


def _beside(method: Method) -> list[str]:
    """What a method does beside its parts and its route."""
    return [
        *(["completions that met their limit do not learn; their group keeps its baseline"] * method.mask_overlong),
        *(["questions that leave nothing are replaced by others"] * method.refills),
        *(["demonstrations are judged too"] * method.rewards_demonstrations),
        *([f"updates of {method.apart} demonstrations, with an optimizer of their own"] * (method.apart > 0)),
    ]


def _short_source(source: str) -> str:
    found = re.search(r"arXiv (\d{4}\.\d{5})", source)
    return found[1] if found else re.split("[;,]", source)[0]


def _item(name: str, text: str) -> list[str]:
    first, rest = f"{name:<18}", " " * 18
    return textwrap.wrap(text, WIDTH - 20, initial_indent=first, subsequent_indent=rest, break_long_words=False)
