"""The config: what a file may say, what the command line may change, and what is refused with which words."""

from __future__ import annotations

import dataclasses
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hptjax import config_text
from hptjax.config import Config, StageConfig, changed_fields, flatten, resolved
from hptjax.config_batch import StageSchedule, micro_batches_needed, samples_per_update, schedule_of, stage_list
from hptjax.config_check import check
from hptjax.config_eval import CompareArm
from hptjax.config_load import load_config, read_file
from hptjax.config_mesh import RuleConfig
from hptjax.config_methods import MicroGroupRow, SoftRow
from hptjax.config_rollout import RewardFunction
from hptjax.config_server import ServerCall
from hptjax.explain import stage_lines
from hptjax.train.optimizer import make_schedule

SMALLEST = '[model]\ntokenizer = "somewhere"\n'


@pytest.fixture
def write(tmp_path):
    """Writes a config file and returns its path."""

    def write_text(text: str):
        path = tmp_path / "run.toml"
        path.write_text(text)
        return path

    return write_text


def changed(config: Config, **fields) -> Config:
    """A config with dotted fields (`train__steps=3`) replaced."""
    for name, value in fields.items():
        *sections, leaf = name.split("__")
        nodes = [config]
        for section in sections:
            nodes.append(getattr(nodes[-1], section))
        node = dataclasses.replace(nodes[-1], **{leaf: value})
        for section, parent in zip(reversed(sections), reversed(nodes[:-1]), strict=True):
            node = dataclasses.replace(parent, **{section: node})
        config = node
    return config


VALID = changed(Config(), model__tokenizer="somewhere")


def test_config_defaults_are_accepted():
    check(VALID)


def test_config_file_sets_fields_of_every_kind(write):
    config = load_config(
        write(
            SMALLEST
            + """
            remat = "full"
            [rollout]
            prompt_buckets = [8, 24]
            [optimizer]
            learning_rate = 1          # a whole number is a number
            skip_norm = 80.0
            [reward]
            functions = [{name = "verify"}, {name = "format", weight = 0.1}]
            [[stages]]
            method = "sft"
            steps = 3
            [data.fractions]
            base = 0.0
            """
        )
    )
    assert config.model.remat == "full"
    assert config.rollout.prompt_buckets == (8, 24)
    assert config.optimizer.learning_rate == 1.0
    assert isinstance(config.optimizer.learning_rate, float)
    assert config.optimizer.skip_norm == 80.0
    assert config.reward.functions == (RewardFunction("verify"), RewardFunction("format", 0.1))
    assert config.stages == (StageConfig("sft", 3),)
    assert config.data.fractions.base == 0.0
    assert config.train == Config().train


def test_config_overrides_win_over_the_file(write):
    path = write(SMALLEST + "[train]\nsteps = 7\neval_every = 3\n")
    config = load_config(path, ["--train.steps", "50", "--hpt.clip_low", "0.2", "--hpt.clip-high", "0.3"])
    assert (config.train.steps, config.train.eval_every) == (50, 3)
    assert (config.hpt.clip_low, config.hpt.clip_high) == (0.2, 0.3)


def other_value(hint: typing.Any, value: typing.Any) -> tuple[list[str], typing.Any]:
    """Command-line words that set a field of this type to something else, and what they should become."""
    while typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    if hint == tuple[StageConfig, ...]:
        return ['[{method = "sft", steps = 3, learning_rate = 1}]'], (StageConfig("sft", 3, 1.0),)
    if hint == tuple[RewardFunction, ...]:
        return ['[{name = "other", weight = 2.5}]'], (RewardFunction("other", 2.5),)
    if hint == tuple[CompareArm, ...]:
        entry = '[{name = "b", method = "hpt", gate = 1, sft_share = [0.5, 1]}]'
        return [entry], (CompareArm("b", "hpt", 1, sft_share=(0.5, 1.0)),)
    if hint == tuple[SoftRow, ...]:
        return ["[{rl = 0, off = 0.5, sft = 1}]"], (SoftRow(0.0, 0.5, 1.0),)
    if hint == tuple[MicroGroupRow, ...]:
        return ["[{count = 4, ratio = 0.5, below = 1}]"], (MicroGroupRow(4, 0.5, 1.0),)
    if hint == tuple[ServerCall, ...]:
        return ['[{path = "/take", body = "[]"}]'], (ServerCall("/take", "[]"),)
    if hint == tuple[RuleConfig, ...]:
        return ['[{axis = "embed", over = ["data", "fsdp"]}]'], (RuleConfig("embed", ("data", "fsdp")),)
    if hint == tuple[str, ...]:
        return ["one", "two"], ("one", "two")
    listed = next((option for option in (hint, *typing.get_args(hint)) if typing.get_origin(option) is tuple), None)
    if listed is not None:
        entry = typing.get_args(listed)[0]
        names = typing.get_args(entry)[1:3] if typing.get_origin(entry) is typing.Literal else ()
        return (list(names), names) if names else (["3", "5"], (3, 5))
    hint = next((option for option in typing.get_args(hint) if typing.get_origin(option) is typing.Literal), hint)
    if typing.get_origin(hint) is typing.Literal:
        choice = typing.get_args(hint)[-1]
        return [choice], choice
    kind = next((option for option in typing.get_args(hint) if option is not type(None)), hint)
    if kind is bool:
        return [str(not value).lower()], not value
    return {int: (["7"], 7), float: (["0.125"], 0.125), str: (["word"], "word")}[kind]


def fields_of(cls: type, prefix: str = "") -> list[tuple[str, typing.Any]]:
    """(dotted name, type) of every field that is not a section."""
    found = []
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            found += fields_of(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            found.append((prefix + name, hint))
    return found


def test_config_every_field_can_be_set_on_the_command_line():
    arguments, expected = [], {}
    for name, hint in fields_of(Config):
        words, value = other_value(hint, flatten_attributes(Config())[name])
        arguments += [f"--{name}", *words]
        expected[name] = value
    assert len(expected) > 80
    config = config_text.command_line(Config(), arguments, prog="test")
    assert flatten_attributes(config) == expected


def flatten_attributes(node: typing.Any, prefix: str = "") -> dict[str, typing.Any]:
    """Every field that is not a section, by dotted name."""
    flat = {}
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten_attributes(value, f"{prefix}{field.name}.")
        else:
            flat[prefix + field.name] = value
    return flat


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[train]\nstep = 3", ["unknown key 'step'", "[train]", "'train.steps'"]),
        ("[hpt]\ngroup_sise = 8", ["unknown key 'group_sise'", "[hpt]", "'rollout.group_size'"]),
        ("[optimiser]\nb1 = 0.9", ["unknown key 'optimiser'", "the top level", "'optimizer'"]),
        ("[data.fraction]\nbase = 0.9", ["unknown key 'fraction'", "[data]", "'data.fractions'"]),
        ("[[stages]]\nmethod = 'sft'\nsteps = 3\nlr = 1.0", ["unknown key 'lr'", "[stages.0]"]),
        ("[[stages]]\nmethod = 'sft'", ["'stages.0'", "needs the key 'steps'"]),
        ("[train]\nsteps = 3.5", ["'train.steps' takes a whole number, got float 3.5"]),
        ("[train]\nsteps = true", ["'train.steps' takes a whole number, got bool true"]),
        ("[train]\nsteps = '3'", ["'train.steps' takes a whole number, got str \"3\""]),
        ("[telemetry]\nplot = 1", ["'telemetry.plot' takes true or false, got int 1"]),
        ("[model]\nremat = true", ['\'model.remat\' takes one of "none", "full"', "got bool true"]),
        ("method = 'ddpo'", ["'method' takes one of", '"hpt"', '"luffy"', 'got str "ddpo"']),
        ("[rollout]\nprompt_buckets = 8", ["'rollout.prompt_buckets' takes a list", "got int 8"]),
        ("[rollout]\nprompt_buckets = [8, 'x']", ["'rollout.prompt_buckets.1' takes a whole number"]),
        ("[optimizer]\nclip_norm = 'none'", ["'optimizer.clip_norm' takes a number", 'got str "none"']),
        ("train = 3", ["'train' takes a section with keys steps", "got int 3"]),
        ("[train\nsteps = 3", ["not a TOML file", "line 1"]),
    ],
)
def test_config_file_errors_name_the_place(write, text, words):
    path = write(text)
    with pytest.raises(ValueError) as caught:
        read_file(path)
    for word in [str(path), *words]:
        assert word in str(caught.value), str(caught.value)


def test_config_absent_file_is_named_with_those_beside_it(tmp_path):
    (tmp_path / "other.toml").touch()
    with pytest.raises(FileNotFoundError, match=r"no config file at .*missing\.toml.*other\.toml"):
        read_file(tmp_path / "missing.toml")


@pytest.mark.parametrize("path", ["train.steps", "rollout.group_size", "optimizer.learning_rate", "hpt.mask_overlong"])
def test_config_nearest_key_survives_a_lost_letter(path):
    section, leaf = path.split(".")
    for i in range(len(leaf)):
        assert config_text.nearest_key(Config, f"{section}.{leaf[:i]}{leaf[i + 1 :]}") == path


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rollout__group_size": 0}, ["rollout.group_size at least 1", "got 0", "change rollout.group_size"]),
        ({"hpt__gate": 9}, ["hpt.gate in -1..8", "got 9", "change hpt.gate"]),
        ({"hpt__gate": -2}, ["hpt.gate in -1..8", "got -2"]),
        ({"batch__rows": 0}, ["batch.rows at least 1"]),
        ({"batch__row_tokens": 47}, ["batch.row_tokens of at least 48", "got 47"]),
        ({"batch__max_micro_batches": 3}, ["batch.max_micro_batches of at least 4", "got 3"]),
        ({"rollout__prompt_buckets": ()}, ["rollout.prompt_buckets"]),
        ({"rollout__prompt_buckets": (24, 12)}, ["ascending"]),
        ({"rollout__prompt_buckets": (12,)}, ["holds data.max_prompt_tokens (24)", "got 12"]),
        ({"rollout__cache_capacity": 47}, ["rollout.cache_capacity of at least 48", "got 47"]),
        ({"rollout__cache_positions": 63}, ["rollout.cache_positions of at least 64", "room for one sample", "got 63"]),
        ({"rollout__cache_page": 0}, ["rollout.cache_page at least 1"]),
        ({"method": "trapo"}, ["last prompt bucket of at least 36", "up to 12 tokens", "rollout.prompt_buckets"]),
        ({"method": "uft"}, ["last prompt bucket of at least 47", "got 24"]),
        (
            {"method": "trapo", "rollout__group_size": 4, "rollout__prompt_buckets": (24, 48)},
            ["rollout.group_size 8 for the last stage (trapo)", "got 4", "methods.trapo_groups"],
        ),
        ({"methods__trapo_groups": (MicroGroupRow(8, 0.5, 0.5),)}, ["a first micro-group that starts from the prompt"]),
        ({"methods__trapo_groups": (MicroGroupRow(0, 0.0, 0.5),)}, ["a count of at least 1", "got count 0"]),
        ({"methods__prefix_low": 0.99}, ["methods.prefix_low <= methods.prefix_high", "0.99 and 0.95"]),
        ({"methods__prefix_entropy_share": 0.0}, ["methods.prefix_entropy_share in (0, 1]"]),
        ({"methods__prefix_clip_bound": 1.0}, ["methods.prefix_clip_bound above 1"]),
        ({"rollout__temperature": 0.0}, ["rollout.temperature above 0"]),
        ({"rollout__temperature": float("nan")}, ["finite rollout.temperature"]),
        ({"rollout__top_p": 1.5}, ["rollout.top_p in (0, 1]"]),
        ({"train__updates_per_rollout_batch": 3}, ["multiple of train.updates_per_rollout_batch (3)", "got 64"]),
        ({"train__steps": 0}, ["train.steps at least 1"]),
        ({"data__train_questions": 63}, ["no batch can be filled", "63 for 64", "data.train_questions"]),
        ({"data__fractions__test": 0.0}, ["a test split that is not empty", "data.fractions.test"]),
        ({"data__fractions__train": 0.6}, ["sum to at most 1", "data.fractions"]),
        ({"reward__functions": ()}, ["one or more reward functions"]),
        ({"reward__functions": (RewardFunction("a"), RewardFunction("a"))}, ["distinct names"]),
        ({"reward__functions": (RewardFunction("a", 0.0),)}, ["reward weights, not all 0"]),
        ({"hpt__clip_low": 0.2}, ["both of hpt.clip_low and hpt.clip_high"]),
        ({"hpt__rl_estimator": "ppo"}, ["a clip range", "hpt.clip_low"]),
        ({"hpt__rl_estimator": "reinforce", "hpt__clip_low": 0.2, "hpt__clip_high": 0.2}, ["no clip range"]),
        ({"hpt__rl_estimator": "sapo", "hpt__clip_low": 0.2, "hpt__clip_high": 0.2}, ["no clip range"]),
        ({"hpt__clip_kind": "two_sided", "hpt__clip_bound": 1.0}, ["hpt.clip_bound above 1"]),
        ({"hpt__sampler_correction": "masked_is", "hpt__correction_floor": 1.5}, ["hpt.correction_floor <= 1"]),
        ({"hpt__kl_in": "reward"}, ["hpt.kl_coefficient for hpt.kl_in 'reward'"]),
        ({"method": "dpo", "hpt__top_entropy": 0.2}, ["advantages of +1 and -1 for dpo"]),
        ({"method": "dpo", "hpt__kl_in": "reward", "hpt__kl_coefficient": 0.1}, ["advantages of +1 and -1 for dpo"]),
        ({"methods__chord_peak": 1.5}, ["methods.chord_peak of at most 1", "got 1.5"]),
        ({"methods__chord_valley": -0.1}, ["methods.chord_valley at least 0"]),
        ({"methods__kdrl_end_beta": -1e-3}, ["methods.kdrl_end_beta at least 0"]),
        ({"methods__trsft_floor": 2.0}, ["methods.trsft_floor of at most 1"]),
        ({"methods__pear_gamma": 1.1}, ["methods.pear_gamma of at most 1"]),
        ({"method": "sft", "stages": (StageConfig("hpt_off_band", 2),), "hpt__gate": 2}, ["methods.gate_off in"]),
        (
            {"methods__soft_table": (SoftRow(1.0, 0.0, 0.0),)},
            ["a row of methods.soft_table for each of 0..8", "1 rows"],
        ),
        ({"methods__soft_table": (SoftRow(1.0, 0.0, -0.1),) * 9}, ["coefficients of at least 0", "for 0 solved"]),
        ({"methods__soft_table": (SoftRow(1.0, float("nan"), 0.0),) * 9}, ["finite coefficients", "nan"]),
        ({"methods__soft_table": (SoftRow(0.0, 0.0, 0.0),) * 9}, ["that is not 0"]),
        ({"method": "luffy", "hpt__rl_coefficient": 0.0}, ["an objective that is not 0", "luffy"]),
        ({"method": "sft", "hpt__sft_coefficient": 0.0}, ["an objective that is not 0"]),
        ({"method": "grpo", "hpt__rl_coefficient": 0.0}, ["an objective that is not 0"]),
        ({"hpt__gate": -1, "hpt__rl_coefficient": 0.0}, ["an objective that is not 0", "hpt.rl_coefficient 0.0"]),
        (
            {"stages": (StageConfig("sft", 2),), "hpt__sft_coefficient": 0.0},
            ["an objective that is not 0 in stages.0", "hpt.sft_coefficient 0.0"],
        ),
        (
            {"stages": (StageConfig("sft", 2),), "optimizer__schedule": "linear", "optimizer__warmup_steps": 2},
            ["warm-up shorter", "stages.0", "2 optimizer steps"],
        ),
        (
            {"stages": (StageConfig("sft", 2, schedule="cosine", warmup_steps=3),)},
            ["warm-up shorter", "stages.0", "2 optimizer steps", "stages.0.warmup_steps"],
        ),
        ({"stages": (StageConfig("sft", 2, end_fraction=1.5),)}, ["end_fraction in [0, 1]", "stages.0.end_fraction"]),
        ({"stages": (StageConfig("sft", 2, warmup_steps=-1),)}, ["at least 0 steps", "stages.0.warmup_steps"]),
        ({"optimizer__schedule": "cosine", "optimizer__warmup_steps": 60}, ["warm-up shorter", "60 optimizer steps"]),
        ({"optimizer__b2": 1.0}, ["optimizer.b2 in [0, 1)"]),
        ({"eval__ks": (1, 16)}, ["eval.ks within 1..8", "[1, 16]"]),
        ({"eval__questions": 513}, ["data.validation_questions (512)", "513"]),
        ({"checkpoint__metric": "test/pass@1"}, ["a validation metric", "checkpoint.metric"]),
        ({"model__shape__num_kv_heads": 3}, ["model.shape.num_heads to be a multiple"]),
        ({"model__tokenizer": None}, ["a tokenizer folder", "model.path or model.tokenizer"]),
        ({"name": "../elsewhere"}, ["a name of letters", "change name"]),
        ({"stages": (StageConfig("sft", 0),)}, ["at least 1 step", "stages.0.steps"]),
        (
            {"stages": (StageConfig("sft", 1, questions_per_step=5000),), "data__train_questions": 4096},
            ["4096 for 5000"],
        ),
        ({"data__test_files": ("a.jsonl",)}, ["data.files beside data.test_files"]),
        ({"data__files": ("a.jsonl",), "data__train_split": "base"}, ["data.train_split"]),
        ({"prompt__plain": "Question:"}, ["{question}", "prompt.plain"]),
        ({"prompt__date": "yesterday"}, ["2024-07-26", "prompt.date"]),
        ({"task__low": 21}, ["task.low <= task.high", "21 and 20"]),
        ({"task__numbers": 6}, ["task.numbers in 2..5"]),
    ],
)
def test_config_check_says_expected_got_and_what_to_change(fields, words):
    with pytest.raises(ValueError) as caught:
        check(changed(VALID, **fields))
    for word in [*words, "expected", "got", "change"]:
        assert word in str(caught.value), str(caught.value)


def test_config_check_accepts_a_teacher_alone():
    """KDRL without its rewards is on-policy distillation."""
    check(changed(VALID, method="kdrl", hpt__rl_coefficient=0.0))


@pytest.mark.parametrize("gate", [-1, 0, 8])
def test_config_check_accepts_every_gate_of_the_group(gate):
    check(changed(VALID, hpt__gate=gate))


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 48), min_size=1, max_size=60),
    max_segments=st.integers(1, 6),
    row_tokens=st.integers(48, 150),
    rows=st.integers(1, 5),
)
def test_config_micro_batches_needed_bounds_first_fit(lengths, max_segments, row_tokens, rows):
    """The bound against a packer run: first fit, in the order of arrival and longest first."""
    config = changed(VALID, batch__max_segments=max_segments, batch__row_tokens=row_tokens, batch__rows=rows)
    for order in (lengths, sorted(lengths, reverse=True)):
        packed: list[list[int]] = []
        for length in order:
            for row in packed:
                if len(row) < max_segments and sum(row) + length <= row_tokens:
                    row.append(length)
                    break
            else:
                packed.append([length])
        assert -(-len(packed) // rows) <= micro_batches_needed(config, samples=len(lengths))


def test_config_samples_per_update_counts_groups_and_demonstrations():
    config = changed(VALID, train__updates_per_rollout_batch=2)
    assert samples_per_update(config, method="hpt", questions=64) == 256  # 64 / 2 questions x 8 rollouts
    assert samples_per_update(config, method="sft", questions=64) == 32


def test_config_resolved_holds_every_field_as_json_values():
    values = resolved(VALID)
    assert values["rollout"]["prompt_buckets"] == [24]
    assert config_text.build(Config, values, source="config.json") == VALID
    assert flatten(values)["train.steps"] == 60


def test_config_changed_fields_names_them_and_forgives_telemetry():
    new = changed(VALID, train__steps=61, rollout__prompt_buckets=(24, 30), telemetry__wandb=True, runs_dir="x")
    assert changed_fields(resolved(VALID), resolved(new)) == [
        "rollout.prompt_buckets: [24] -> [24, 30]",
        "train.steps: 60 -> 61",
    ]
    assert changed_fields(resolved(VALID), resolved(changed(VALID, train__steps=61))) == []
    assert changed_fields(resolved(VALID), resolved(VALID)) == []
    fewer = changed(VALID, train__steps=59)
    assert changed_fields(resolved(VALID), resolved(fewer)) == ["train.steps: 60 -> 59"]
    linear = changed(VALID, optimizer__schedule="linear")  # its horizon is the number of steps
    longer = changed(linear, train__steps=61)
    assert changed_fields(resolved(linear), resolved(longer)) == ["train.steps: 60 -> 61"]
    older = resolved(VALID)
    del older["hpt"]["ranks"]  # a field that the recorded run did not have yet
    assert changed_fields(older, resolved(VALID)) == ["hpt.ranks: null -> 8"]


def test_stage_has_a_schedule_of_its_own_or_the_optimizers():
    """SFT at a cosine to a tenth after a warm-up, then RL at a constant rate: the corrected pipeline of the paper."""
    sft = StageConfig("sft", 100, learning_rate=5e-5, schedule="cosine", warmup_steps=20, end_fraction=0.1)
    config = changed(Config(), stages=(sft, StageConfig("sft", 7)), optimizer__learning_rate=1e-6)
    config = changed(config, train__updates_per_rollout_batch=2, optimizer__decay_steps=33)
    first, second, last = (schedule_of(config, stage) for stage in stage_list(config))
    assert first == StageSchedule("cosine", 5e-5, 20, 0.1, 200)
    assert second == last == StageSchedule("constant", 1e-6, 0, 0.0, 33)
    rate = make_schedule(
        first.kind,
        first.learning_rate,
        warmup_steps=first.warmup_steps,
        end_fraction=first.end_fraction,
        decay_steps=first.decay_steps,
    )
    half = 5e-5 * (0.1 + 0.9 * 0.5)  # cos(pi / 2) = 0 at the middle of what is left after the warm-up
    assert [float(rate(step)) for step in (19, 20 + 90, 200)] == pytest.approx([5e-5, half, 5e-6])
    assert "after 20 updates of warm-up, cosine to 0.1 of it after 200 updates" in stage_lines(config)[0]
