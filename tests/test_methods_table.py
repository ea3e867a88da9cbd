"""What a user sees of the methods: the table, one method in full, and examples that run."""

from __future__ import annotations

import dataclasses
import io
import json
import tomllib

import pytest
from rich.console import Console

from hptjax import cli, methods_text
from hptjax.build.example import PROVIDES, example, overlay
from hptjax.build.method import REMEDY, build_recipe, met_needs, options
from hptjax.build.rows import chosen_row
from hptjax.build.unread import unread_choices
from hptjax.config import Config, DataConfig, HptConfig, flatten
from hptjax.config_check import check
from hptjax.config_load import read_file
from hptjax.config_methods import MethodsConfig
from hptjax.config_text import build, toml_text
from hptjax.hpt import schedules
from hptjax.hpt.method import all_needs
from hptjax.hpt.methods import METHODS
from hptjax.hpt.options import Options
from hptjax.losses import stability, table, weights
from hptjax.losses.estimator import Estimator, Need
from hptjax.losses.words import words_of

NAMES = methods_text.all_names()
ALWAYS_THERE = {Need.ROLLOUT_LOGPROBS, Need.SAMPLER_LOGPROBS, Need.ENTROPY}


def test_table_has_a_line_for_every_part_and_fits_140_columns():
    out = io.StringIO()
    methods_text.print_table(Console(width=140, file=out))
    assert max(map(len, out.getvalue().splitlines())) <= 140
    lines = out.getvalue().split("\n\n")[0].splitlines()  # without the legend
    starts = [place for place, line in enumerate(lines) if line[:1].strip() and line.split()[0] in METHODS]
    assert [lines[place].split()[0] for place in starts] == list(METHODS)
    for name, start, stop in zip(NAMES, starts, [*starts[1:], None], strict=True):
        parts = [part.name for part in METHODS[name](options(Config())).parts]
        column = [line[16:22].strip() for line in lines[start:stop]]
        assert [part for part in column if part] == parts


@pytest.mark.parametrize("name", NAMES)
def test_method_has_words_for_everything(name):
    words = methods_text.method_words(name)
    method = METHODS[name](options(Config()))
    assert [part["part"] for part in words["parts"]] == [part.name for part in method.parts]
    for part, said in zip(method.parts, words["parts"], strict=True):
        row = part.row
        if isinstance(row, Estimator):
            assert all(said[each] for each in ("mask", "denominator", "advantage", "formula", "source"))
            factors = (*row.select, *row.weights)
            assert said["extra"].count("x ") == len(factors) + (part.schedule is not None) + (part.coefficient != 1.0)
        else:
            assert said["extra"]
    assert words["source"] or words["parts"][0]["source"]
    text = methods_text.method_text(name)
    assert f"hptjax methods {name} --toml" in text
    assert max(map(len, text.splitlines())) <= 140
    assert all(Need[need.upper()].value in " ".join(text.split()) for need in words["needs"])
    assert json.loads(json.dumps(words)) == words


def test_words_hold_the_constants_that_are_used():
    assert words_of(table.GRPO((0.1, 0.3)).stability_mask) == "ratio in 0.9..1.3"
    assert words_of(table.DR_GRPO().stability_mask) == "1"
    assert words_of(table.CISPO(1.0, 4.0).denominator) == "p / clip(ratio, 0..5)"
    assert words_of(table.GSPO().stability_mask) == "s in 0.9997..1.0004"
    assert words_of(table.TRSFT(0.25).denominator) == "max(p, 0.25)"
    assert words_of(stability.dual_clip(0.2, 0.2, 3.0)) == "ratio in 0.8..1.2, 3 where A < 0"
    assert words_of(stability.two_sided_clip(0.2, 0.2, 4.0)) == "ratio in 0.8..1.2, ceiling 4"
    assert words_of(stability.band(0.5, 5.0)) == "p_rollout / p_sampler in 0.5..5"
    assert words_of(stability.sequence_band()) == "sequence's p_rollout / p_sampler in 0.999..1.001"
    assert words_of(weights.where_positive(weights.entropy_weight(0.1, 1))) == "0.1 exp(+H) where A > 0"
    assert words_of(weights.token_tis(2.0)) == "min(rho, 2)"
    assert words_of(weights.sequence_tis(5.0)) == "min(rho of the sequence, 5)"
    assert words_of(weights.masked_is(0.5, 2.0)) == "rho where within 0.5..2"
    assert words_of(weights.top_entropy(1.0)) == "1 where H is high"
    assert words_of(schedules.linear(0.2, 0.1, 7)) == "0.2 to 0.1 in 7 steps"
    with pytest.raises(ValueError, match="has no words"):
        words_of(lambda view, advantages: None)


def test_constants_are_the_options_that_a_method_reads():
    listed = {name: set(methods_text.method_words(name)["constants"]) for name in NAMES}
    constants = {f"methods.{field.name}" for field in dataclasses.fields(MethodsConfig)}
    assert constants <= set().union(*listed.values())
    assert {name for name in NAMES if "methods.luffy_gamma" in listed[name]} == {"luffy", "hpt_off_band", "hpt_soft"}
    assert {name for name in NAMES if "hpt.gate" in listed[name]} == {"hpt", "hpt_off_band", "random_gate"}
    assert {name for name in ("reinforce", "rloo", "sapo", "cispo") if "hpt.clip_low" in listed[name]} == {"cispo"}
    assert listed["sft"] == {"rollout.group_size"}
    assert {name for name in NAMES if "methods.pear_block_tokens" in listed[name]} == {"pear_block"}


def test_differences_and_advantages_are_those_of_the_method():
    """Only a method with GRPO's penalty speaks of it, and a demonstration alone has no union to be judged by."""
    of = {name: [part.get("difference", "") for part in methods_text.method_words(name)["parts"]] for name in NAMES}
    assert {name for name in NAMES if any("0.04" in text for text in of[name])} == {"grpo"}
    for name in ("hpt_off_band", "hpt_soft"):
        off = next(part for part in methods_text.method_words(name)["parts"] if part["part"] == "off")
        assert (off["advantage"], "union" in off["formula"]) == ("R", False)


@pytest.mark.parametrize(("row", "words"), [(table.DAPO(), "0.8..1.28"), (table.GRPO(), "0.8..1.2")])
def test_a_clip_kind_keeps_the_published_widths_of_the_row(row, words):
    mask = chosen_row(row, HptConfig(clip_kind="dual")).stability_mask
    assert words_of(mask) == f"ratio in {words}, 3 where A < 0"


@pytest.mark.parametrize("name", ["trapo", "uft", "prefix_rft"])
def test_prefixes_need_demonstrations_though_nothing_learns_from_them(name):
    config = dataclasses.replace(
        Config(), data=DataConfig(demonstrations=False), hpt=HptConfig(sft_coefficient=0.0, rl_coefficient=1.0)
    )
    with pytest.raises(ValueError, match=r"data\.demonstrations"):
        build_recipe(config, name, 64)


def test_hpt_soft_has_no_gate():
    method = METHODS["hpt_soft"](Options(group_size=8, gate=3, gate_off=1))
    assert [part.name for part in method.parts] == ["rl", "sft", "off"]


@pytest.mark.parametrize("name", NAMES)
def test_example_is_a_config_that_checks_and_trains_the_method(name, tmp_path):
    path = tmp_path / "example.toml"
    path.write_text(methods_text.toml(name))
    config = read_file(path)
    assert tomllib.loads(path.read_text()) == example(name)
    check(config)
    assert (config.method, config.model.path) == (name, "hptjax/base_model")
    assert build_recipe(config, name, config.data.questions_per_step).method.name == name


@pytest.mark.parametrize("name", NAMES)
def test_example_without_its_overlay_is_refused_with_the_list(name):
    """On a quickstart that provides nothing, the overlay supplies what the method needs, and nothing less does."""
    nothing = {
        "data.demonstrations": False,
        "rollout.group_size": 2 if name == "luffy" else 1,  # its demonstration takes the place of a rollout
        "model.reference": None,
        "model.teacher": None,
        "model.demonstration_author": None,
    }
    supplied = overlay(name)
    kept = {key: value for key, value in flatten(example(name)).items() if key not in supplied}
    needs = all_needs(METHODS[name](options(Config()))) - ALWAYS_THERE

    def config_of(fields):
        nested: dict = {}
        for field, value in {**kept, **nothing, **fields}.items():
            *sections, last = field.split(".")
            section = nested
            for each in sections:
                section = section.setdefault(each, {})
            section[last] = value
        return build(Config, nested, source="test")

    whole = config_of(supplied)
    check(whole)
    build_recipe(whole, name, 128)
    bare = config_of({})
    missing = needs - met_needs(bare)
    assert bool(missing) == bool(supplied) == (name not in ("reinforce", "reinforce_pp", "ppo"))
    if missing:
        with pytest.raises(ValueError, match=f"method '{name}' needs what this config does not provide") as error:
            build_recipe(bare, name, 128)
        assert all(need.value in str(error.value) and REMEDY[need] in str(error.value) for need in missing)
    for need in missing:  # each of them is needed
        less = {field: value for field, value in supplied.items() if field not in PROVIDES[need]}
        with pytest.raises(ValueError, match="needs what this config does not provide"):
            build_recipe(config_of(less), name, 128)


def test_toml_text_round_trips():
    values = {
        "name": "a b",
        "seed": 3,
        "stages": [{"method": "sft", "steps": 2}],
        "data": {"fractions": {"base": 0.5, "train": 1e-05}, "demonstrations": True},
        "rollout": {"prompt_buckets": [14, 20], "empty": []},
    }
    assert tomllib.loads(toml_text(values)) == values
    assert tomllib.loads(toml_text({"model": {"reference": None, "path": "x"}})) == {"model": {"path": "x"}}


def test_command_prints_table_method_toml_and_json(capsys):
    assert cli.run(["methods"]) == 0
    table_text = capsys.readouterr().out
    assert all(f"\n{name} " in table_text for name in NAMES)
    assert max(map(len, table_text.splitlines())) <= 140
    assert cli.run(["methods", "luffy"]) == 0
    text = capsys.readouterr().out
    assert "g p / (p + g)^2 A grad log pi" in text
    assert "methods.luffy_gamma = 0.1" in text
    assert cli.run(["methods", "luffy", "--toml"]) == 0
    only = capsys.readouterr().out
    assert text.endswith(only)
    assert tomllib.loads(only)["method"] == "luffy"
    assert cli.run(["methods", "--json"]) == 0
    assert [each["name"] for each in json.loads(capsys.readouterr().out)] == list(METHODS)
    assert cli.run(["methods", "kdrl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["overlay"]["model.teacher"] == "hptjax/base_model_longer"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lufy"], "unknown method 'lufy'; the nearest are luffy"),
        (["GRPO"], "unknown method 'GRPO'; the nearest are"),
        (["--toml"], "expected one method"),
        (["luffy", "--toml", "--json"], "no --json beside --toml"),
    ],
)
def test_command_refuses_what_it_cannot_print(arguments, words, capsys):
    assert cli.run(["methods", *arguments]) == cli.BAD_INPUT
    assert words in capsys.readouterr().err


SET = HptConfig(
    clip_low=0.1, clip_high=0.3, sampler_correction="token_tis", kl_coefficient=0.1, top_entropy=0.2, gate=1
)
UNREAD = {
    "grpo": ["hpt.gate"],
    "cispo": ["hpt.gate"],
    "hpt": [],
    "random_gate": [],
    "luffy": ["hpt.gate"],
    "rloo": ["hpt.gate", "hpt.clip_low", "hpt.clip_high"],
    "srft": ["hpt.gate", "hpt.clip_low", "hpt.clip_high"],
    "dpo": ["hpt.gate", "hpt.clip_low", "hpt.clip_high"],
    "sft": [
        "hpt.gate",
        "hpt.clip_low",
        "hpt.clip_high",
        "hpt.sampler_correction",
        "hpt.top_entropy",
        "hpt.kl_coefficient",
    ],
}


@pytest.mark.parametrize("name", UNREAD)
def test_choices_that_a_method_does_not_read_are_known(name):
    assert unread_choices(Config(hpt=SET), name) == UNREAD[name]
    assert unread_choices(Config(), name) == []
    assert unread_choices(Config(hpt=HptConfig(kl_coefficient=0.0, kl_in="loss")), name) == []


def test_unread_kl_choices_follow_the_coefficient_and_the_place():
    unread = {"hpt.kl_estimator", "hpt.kl_in"}
    assert set(unread_choices(Config(hpt=HptConfig(kl_estimator="k1")), "grpo")) == {"hpt.kl_estimator"}
    in_reward = HptConfig(kl_coefficient=0.1, kl_estimator="k1", kl_in="reward")
    assert set(unread_choices(Config(hpt=in_reward), "grpo")) == {"hpt.kl_estimator"}
    assert set(unread_choices(Config(hpt=in_reward), "sft")) == unread | {"hpt.kl_coefficient"}


def test_a_clip_of_another_kind_reads_the_widths_of_any_row_that_has_one():
    kind = HptConfig(clip_low=0.1, clip_high=0.3, clip_kind="dual")
    assert unread_choices(Config(hpt=kind), "hpt") == []
    assert unread_choices(Config(hpt=kind), "sft") == ["hpt.clip_low", "hpt.clip_high", "hpt.clip_kind"]
