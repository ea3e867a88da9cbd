"""The commands: help that needs no jax, one clean message for bad input, and reports made by arithmetic."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from hptjax import cli, doctor
from hptjax import explain as explain_module
from hptjax.config import Config
from hptjax.config_load import load_config
from hptjax.config_model import ShapeConfig
from hptjax.explain import explain, rl_token_weight, sft_token_weight
from hptjax.explain_memory import parameter_count
from hptjax.records import Request, SampleId
from hptjax.rollout.requests import DecodeShape, finished_sample
from tests.test_config import changed


@pytest.fixture
def config_file(tmp_path):
    """A config of a model from scratch whose tokenizer folder holds three symbols."""
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "<eos>"}]})
    )
    path = tmp_path / "run.toml"
    path.write_text(f'name = "tiny"\nruns_dir = "{tmp_path / "runs"}"\n[model]\ntokenizer = "{tokenizer}"\n')
    return path


@pytest.fixture
def build(monkeypatch):
    """Stands for the composition root and notes what it was called with."""
    calls = []

    def note(name, answer):
        def function(*arguments, **keywords):
            calls.append((name, arguments, keywords))
            return answer

        return function

    module = types.ModuleType("hptjax.build")
    module.__path__ = [str(Path(cli.__file__).parent / "build")]  # its modules are there for commands that ask for them
    module.train = note("train", {})
    module.evaluate = note("evaluate", {"pass@1": 0.5})
    module.sample = note("sample", ["3+4=7"])
    monkeypatch.setitem(sys.modules, "hptjax.build", module)
    monkeypatch.setattr("hptjax.build", module, raising=False)
    comparison = types.ModuleType("hptjax.compare")
    comparison.compare = note("compare", None)
    monkeypatch.setitem(sys.modules, "hptjax.compare", comparison)
    monkeypatch.setattr("hptjax.compare", comparison, raising=False)
    return calls


def test_cli_help_names_every_command_and_loads_no_jax():
    code = (
        "import sys; from hptjax.cli import run; status = run(['--help']);"
        "heavy = {'jax', 'flax', 'transformers', 'numpy'} & sys.modules.keys();"
        "assert not heavy, heavy; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    for command in cli.COMMANDS:
        assert f"\n  {command} " in done.stdout


OPTION_OF = {  # of the commands that take no config
    "audit": "--inject-drop",
    "methods": "--toml",
    "export": "--checkpoint",
    "convert": "--shard-gb",
    "inspect": "--all",
    "bench": "--only",
}


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_cli_help_of_each_command_lists_its_options(command, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.run([command, "--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert f"hptjax {command}" in text
    assert OPTION_OF.get(command, "--runs_dir") in text


def test_cli_help_shows_the_values_of_the_file(config_file, capsys):
    with pytest.raises(SystemExit):
        cli.run(["train", str(config_file), "--help"])
    assert "(default: tiny)" in capsys.readouterr().out


def test_cli_train_gets_the_file_with_the_overrides(config_file, build):
    status = cli.run(["train", str(config_file), "--train.steps", "50", "--telemetry.tensorboard", "false"])
    ((name, (config,), keywords),) = build
    assert (status, name, keywords) == (0, "train", {"profile": False})
    assert (config.name, config.train.steps, config.telemetry.tensorboard) == ("tiny", 50, False)


def test_cli_eval_prints_json(config_file, build, capsys):
    assert cli.run(["eval", str(config_file), "--checkpoint", "best", "--eval.questions", "9"]) == 0
    ((_, (config,), keywords),) = build
    assert config.eval.questions == 9
    assert keywords == {"checkpoint": "best", "split": "test"}
    assert json.loads(capsys.readouterr().out) == {"pass@1": 0.5}


def test_cli_sample_prints_completions(config_file, build, capsys):
    assert cli.run(["sample", str(config_file), "--prompt", "3,4=7:", "--count", "1"]) == 0
    ((_, (_, prompt), keywords),) = build
    assert (prompt, keywords) == ("3,4=7:", {"count": 1, "checkpoint": "last"})
    assert capsys.readouterr().out == "3+4=7\n"


def test_cli_compare_splits_the_arms(config_file, build):
    assert cli.run(["compare", str(config_file), "--arms", "hpt,sft", "--seeds", "2"]) == 0
    ((_, _, keywords),) = build
    assert keywords == {"arms": ("hpt", "sft"), "seeds": 2}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["unknown command 'trian'", "train"]),
        (["train"], ["expected a config file first"]),
        (["train", "absent.toml"], ["no config file at 'absent.toml'"]),
        (["train", "CONFIG", "--hpt.gate", "9"], ["hpt.gate in -1..8", "got 9"]),
        (["train", "CONFIG", "--rollout.group_size", "0"], ["rollout.group_size at least 1"]),
        (["compare", "CONFIG", "--arms", "hpt,hpt"], ["distinct arms", "change --arms"]),
        (["compare", "CONFIG", "--seeds", "0"], ["change --seeds"]),
        (["sample", "CONFIG", "--count", "0"], ["change --count"]),
        (["eval", "CONFIG", "--samples", "3"], ["no --samples here", "with --suite or --data"]),
        (["eval", "CONFIG", "--rollout.top_p", "0.5"], ["no --rollout.top_p here", "eval.top_p"]),
        (
            ["explain", "CONFIG", "--model.tokenizer", "nowhere"],
            ["expected 'nowhere/tokenizer.json'", "model.tokenizer"],
        ),
    ],
)
def test_cli_bad_input_is_one_message_without_traceback(arguments, words, config_file, build, capsys):
    status = cli.run([str(config_file) if argument == "CONFIG" else argument for argument in arguments])
    text = capsys.readouterr().err
    assert status == cli.BAD_INPUT
    assert text.count("\n") == 1
    for word in words:
        assert word in text
    assert not build


@pytest.mark.parametrize(
    ("option", "words"),
    [(["--train.stepps", "3"], ["train.stepps", "--train.steps"]), (["--train.steps", "x"], ["--train.steps", "'x'"])],
)
def test_cli_mistyped_option_names_the_nearest(option, words, config_file, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.run(["train", str(config_file), *option])
    assert exit_info.value.code == 2
    text = capsys.readouterr().err
    for word in words:
        assert word in text


def test_cli_errors_of_others_keep_their_traceback(config_file, build, monkeypatch):
    """Only messages that hptjax wrote stand alone: an error from inside a library is a defect to be seen whole."""
    monkeypatch.setattr("hptjax.build.train", lambda config, profile: np.zeros(3).reshape(2, 2))
    with pytest.raises(ValueError, match="reshape"):
        cli.run(["train", str(config_file)])


def test_cli_policy_that_has_diverged_is_one_message(monkeypatch, capsys):
    """The sampler's own error for log-probs that are not finite is no bug report either."""
    request = Request(SampleId(0, 0, 0), np.zeros(1, np.int32), max_completion_tokens=1, stop_ids=frozenset({0}))

    def diverge(arguments):
        finished_sample(
            request, np.zeros(1, np.int32), np.full(1, np.nan, np.float32), DecodeShape(2, 1, 1, (1,), 2, 1, 1)
        )

    monkeypatch.setitem(cli.COMMANDS, "train", diverge)
    assert cli.run(["train"]) == cli.BAD_INPUT
    assert "the policy has diverged" in capsys.readouterr().err


def test_cli_traceback_on_request(monkeypatch):
    monkeypatch.setenv("HPTJAX_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        cli.run(["train", "absent.toml"])


def test_cli_train_profile_is_a_switch(config_file, monkeypatch):
    given = []
    monkeypatch.setattr("hptjax.build.train", lambda config, profile: given.append(profile))
    for words in ((), ("--profile",), ("--profile", "--train.steps", "3"), ("--train.steps", "3", "--profile")):
        assert cli.run(["train", str(config_file), *words]) == 0
    assert given == [False, True, True, True]


def test_cli_interrupt_says_how_to_continue(config_file, build, monkeypatch, capsys):
    def interrupted(config, profile):
        raise KeyboardInterrupt

    monkeypatch.setattr("hptjax.build.train", interrupted)
    assert cli.run(["train", str(config_file)]) == cli.INTERRUPTED
    assert "the same command continues" in capsys.readouterr().err


def test_explain_prints_batches_weights_and_bytes(config_file):
    text = explain(load_config(config_file))
    # By hand: 64 questions x 8 = 512 samples, two of at most 48 tokens per row of 128, 64 rows: 512 / 128 = 4.
    assert "at most 4 micro-batches needed, 16 allowed" in text
    assert "64 questions x 8 = 512 per step, in 256 slots, each filled 2 times" in text
    # 2 x 4 layers x 256 slots x 48 positions x 2 heads x 32 x 4 bytes = 25,165,824 bytes
    assert "KV cache" in text
    assert "24.0 MiB" in text


@pytest.mark.parametrize(
    ("preset", "rl", "sft"),
    [
        # L = 24, 64 questions x 8 rollouts = 512 rows, C = 512 / 64 = 8: 1 / (24 x 8). SFT: 0.3 / (16 x 10 tokens).
        ("official_fixed", 1 / 192, 0.3 / 160),
        # 8 ranks: 1 / (24 x 8). 16 demonstrations are 2 per rank: 0.3 / (2 x 10 x 8).
        ("official", 1 / 192, 0.3 / 160),
        # mean over 64 questions of the mean over 8 rollouts; and of the mean over 10 demonstration tokens
        ("paper", 1 / 512, 0.3 / 640),
        # 48 questions roll out 8 x 24 tokens each = 9216; 16 demonstrations of 10. Apart, and over 9376 together.
        ("separate", 1 / 9216, 0.3 / 160),
        ("joint", 1 / 9376, 0.3 / 9376),
    ],
)
def test_explain_token_weights_by_hand(preset, rl, sft):
    config = changed(Config(), hpt__preset=preset, hpt__sft_coefficient=0.3)
    counts = {"questions": 64, "demonstrations": 16, "demo_tokens": 10}
    assert rl_token_weight(config, **counts) == pytest.approx(rl, rel=1e-12)
    assert sft_token_weight(config, **counts) == pytest.approx(sft, rel=1e-12)


# 64 questions of 8 rollouts (7 for luffy) and a demonstration, all of 24 tokens; 512 rollouts of 12,288 tokens
WEIGHTS_BY_HAND = {
    "reinforce": {"one rollout token": 1 / 512},
    "dr_grpo": {"one rollout token": 1 / (512 * 24)},
    "grpo": {"one rollout token": 1 / (24 * 512), "one rollout token of kl": 0.04 / (24 * 512)},
    "dapo": {"one rollout token": 1 / 12_288},
    "dpo": {"one rollout token": 2 / 512},  # 256 pairs, and all 512 rollouts are in one
    "dft": {"one demonstration token": 1 / (64 * 24)},
    "luffy": {"one rollout token": 1 / (24 * 8), "one demonstration token of off": 1 / (24 * 8)},
    "srft": {
        "one demonstration token": 1 / (64 * 24),
        "one demonstration token of off": 1 / (24 * 8),
        "one rollout token": 1 / (24 * 8),
    },
    "hpt_soft": {  # half of each group is solved
        "one rollout token": 0.5 / (24 * 8),
        "one demonstration token": 0.5 / (64 * 24),
        "one demonstration token of off": 0.0,
    },
    "chord_mu": {"one rollout token": 0.1 / (24 * 512), "one demonstration token": 0.9 / (64 * 24)},
    "relift": {"one rollout token": 1 / (24 * 8), "one demonstration token": 1 / (128 * 24)},
    "kdrl": {"one rollout token": 1 / (24 * 512), "one rollout token of kd": 5e-3 / (24 * 512)},
    # the last two of the eight are given a prefix, half of 24 tokens and all; given and written tokens weigh the same
    "trapo": {"one rollout token": 1 / (24 * 8), "one prefix token": 1 / (24 * 8)},
}


@pytest.mark.parametrize("method", WEIGHTS_BY_HAND)
def test_explain_weighs_the_parts_of_every_method_by_hand(method):
    config = changed(Config(), method=method, model__teacher="teacher")
    shown = [line.split(": ") for line in explain_module.weight_lines(config) if line.startswith("one ")]
    assert {name: float(value.split()[0]) for name, value in shown} == {
        name: pytest.approx(value, rel=6e-4) for name, value in WEIGHTS_BY_HAND[method].items()
    }


def test_explain_of_official_shows_the_range_where_demonstrations_do_not_divide_by_ranks():
    """6 and 32 of 64 demonstrations on 8 ranks: one or none, then four on each; of 24 tokens."""
    lines = explain_module.weight_lines(changed(Config(), hpt__preset="official"))
    weights = [line.split(": ")[1].split(" with")[0] for line in lines if line.startswith("one demonstration")]
    assert weights == [f"{1 / (24 * 8):.3e}", f"{1 / (4 * 24 * 8):.3e}", f"{1 / (8 * 24 * 8):.3e}"]
    more = explain_module.weight_lines(changed(Config(), hpt__preset="official", data__questions_per_step=128))
    assert f"one demonstration token: {1 / (2 * 24 * 8):.3e} to {1 / (24 * 8):.3e} with 13 demonstrations" in more[2]


def test_explain_of_a_method_without_its_needs_lists_them():
    with pytest.raises(ValueError, match=r"'kdrl' needs what this config does not provide.*model\.teacher"):
        explain_module.weight_lines(changed(Config(), method="kdrl"))


@pytest.mark.parametrize("method", ["hpt", "sft", "grpo"])
def test_explain_of_token_means_compares_only_where_both_kinds_are(method):
    """6, then 32 of 64 questions gated; all completions have 24 tokens. Apart: 58 x 8 / 6 and 32 x 8 / 32 to 1."""
    ratios, rollout = {}, {}
    for preset in ("separate", "joint"):
        lines = explain_module.weight_lines(changed(Config(), method=method, hpt__preset=preset))
        ratios[preset] = [line.split(" = ")[1].split()[0] for line in lines if " = " in line]
        rollout[preset] = [line for line in lines if line.startswith("one rollout token: 8.138e-05")]  # 1 / 12,288
    both = method == "hpt"
    assert ratios == {"separate": ["77.3", "8"] if both else [], "joint": ["1", "1"] if both else []}
    assert all(len(found) == (method != "sft") for found in rollout.values())


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("attention_bias", [False, True])
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_explain_parameter_count_is_the_models(qk_norm, attention_bias, tie_embeddings):
    import jax

    from hptjax.models.decoder import init_params
    from hptjax.models.shape import DecoderConfig

    sizes = {"hidden_size": 12, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "mlp_size": 20}
    switches = {"qk_norm": qk_norm, "attention_bias": attention_bias, "tie_embeddings": tie_embeddings}
    decoder = DecoderConfig(vocab_size=11, **sizes, **switches)
    arrays = jax.eval_shape(lambda key: init_params(key, decoder), jax.random.key(0))
    counted = sum(leaf.size for leaf in jax.tree.leaves(arrays))
    assert parameter_count(ShapeConfig(**sizes, **switches), 11) == counted


def test_explain_reads_the_model_folder(tmp_path):
    values = {
        "model_type": "qwen2",
        "vocab_size": 100,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    shape, vocab_size = explain_module.model_shape(changed(Config(), model__path=str(tmp_path)))
    assert (vocab_size, shape.head_dim, shape.attention_bias, shape.qk_norm) == (100, 4, True, False)


def test_doctor_finds_this_machine_fit():
    findings = doctor.examine()
    by_name = {finding.what: finding for finding in findings}
    assert by_name["python"].status == by_name["packages"].status == by_name["devices"].status == "ok"
    assert "8 x cpu" in by_name["devices"].detail
    assert doctor.report(findings).endswith("this machine can train")


def test_doctor_names_what_is_lacking(tmp_path, monkeypatch):
    pins = tmp_path / "constraints.txt"
    pins.write_text("# pins\njax==0.0.1\nabsent-package==1.0\n")
    finding = doctor.pins_finding(pins)
    assert finding.status == "note"
    assert "pinned 0.0.1" in finding.detail
    assert "absent-package" not in finding.detail
    monkeypatch.setattr(doctor, "PACKAGES", ("jax", "absent-package"))
    assert doctor.packages_finding().status == "lacks"
    assert doctor.report([doctor.packages_finding()]).endswith("lacks: packages")


@pytest.mark.parametrize(
    ("tunables", "library", "modes", "status", "detail"),
    [
        ("glibc.malloc.hugetlb=1", "glibc 2.36", "always [madvise] never", "ok", "in use"),
        ("", "glibc 2.36", "[always] madvise never", "ok", "in use"),
        ("", "glibc 2.36", "always [madvise] never", "note", "GLIBC_TUNABLES=glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc 2.36", "always [madvise] never", "note", "not in use"),
        ("glibc.malloc.hugetlb=1", "glibc 2.36", "always madvise [never]", "note", "not in use"),
        ("glibc.malloc.hugetlb=1", "glibc 2.34", "always [madvise] never", "note", "not in use"),
        ("glibc.malloc.hugetlb=1", "musl 1.2", "always [madvise] never", "note", "not in use"),
        ("", "", "", "note", "not offered"),
    ],
)
def test_doctor_says_whether_the_heap_lies_in_huge_pages(tunables, library, modes, status, detail):
    finding = doctor.huge_pages_finding(tunables, library, modes)
    assert finding.status == status
    assert detail in finding.detail


def test_cli_reader_that_has_seen_enough_is_no_error():
    """`hptjax train --help | head -1`."""
    command = [sys.executable, "-m", "hptjax.cli", "train", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline().startswith(b"usage: hptjax train")
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
