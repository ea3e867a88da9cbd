"""The recipes of configs/: published values, headers that say what the fields say, and two updates of each, tiny."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest

from hptjax import cli
from hptjax.build.mesh import check_mesh
from hptjax.config import flatten, resolved
from hptjax.config_batch import mesh_devices, schedule_of, stage_list
from hptjax.config_check import check
from hptjax.config_load import load_config, read_file
from hptjax.config_text import inline_table
from hptjax.models import decoder
from hptjax.models.folder import save_folder
from hptjax.models.shape import DecoderConfig, Llama3RopeScaling
from hptjax.plan.chips import parse_topology
from hptjax.plan.model import decoder_shape
from hptjax.plan.plan import held_bytes
from hptjax.plan.programs import run_programs
from hptjax.plan.topology import mesh_for, mesh_on
from hptjax.train.jsonl import read_rows
from tests import tiny
from tests.chat_templates import CHAT, byte_tokenizer
from tests.openr1 import ten_rows

ROOT = Path(__file__).resolve().parent.parent
FAST = "hpt_qwen2.5_math_1.5b"

# What is published (spec/hpt.md 2.3, 3.1 to 3.3; spec/accumulation.md 2.1 and 2.2; spec/methods.md 4.2, 4.3)
COMMON = {
    "data.questions_per_step": 128,
    "data.max_prompt_tokens": 1024,
    "rollout.group_size": 8,
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "rollout.top_k": 0,
    "rollout.max_completion_tokens": 8192,
    "train.updates_per_rollout_batch": 2,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.999,
    "optimizer.eps": 1e-8,
    "optimizer.weight_decay": 0.01,
    "optimizer.clip_norm": 1.0,
    "hpt.kl_coefficient": 0.0,
    "hpt.mask_overlong": False,
    "eval.temperature": 0.6,
    "data.files": ["Elliott/Openr1-Math-46k-8192"],
    "data.fractions.base": 0.0,
    "data.fractions.train": 0.98,
}
QWEN = {"model.rope_theta": 40000.0, "model.max_positions": 16384, "prompt.end": "eos"}
LLAMA = {"model.rope_theta": None, "model.max_positions": None, "model.preset": "llama-3.1-8b"}
HPT_CODE = COMMON | {
    "train.steps": 500,
    "hpt.preset": "official_fixed",
    "hpt.entropy_coefficient": 0.001,
    "hpt.entropy_on_demonstrations": True,
    "prompt.system": "",
    "reward.functions": [{"name": "math_hpt", "weight": 1.0}],
}
HPT = HPT_CODE | {"method": "hpt", "optimizer.learning_rate": 5e-6, "hpt.clip_low": None, "hpt.clip_high": None}
BASELINE = HPT_CODE | QWEN | {"optimizer.learning_rate": 1e-6, "optimizer.skip_norm": 80.0}
SFT_THEN_RL = COMMON | {
    "method": "dr_grpo",
    "hpt.preset": "separate",
    "hpt.clip_low": 0.2,
    "hpt.clip_high": 0.28,
    "hpt.entropy_coefficient": 0.0,
    "prompt.template": "chat",
    "prompt.system": None,
    "prompt.end": "eos",
}
LONG_RL = {"train.steps": 500, "optimizer.learning_rate": 1e-6}
PUBLISHED = {
    "hpt_qwen2.5_math_1.5b": HPT | QWEN | {"hpt.gate": 0, "hpt.sft_coefficient": 0.3, "optimizer.skip_norm": 80.0},
    "hpt_qwen2.5_math_7b": HPT | QWEN | {"hpt.gate": 0, "hpt.sft_coefficient": 1.0, "optimizer.skip_norm": 80.0},
    "hpt_llama3.1_8b": HPT
    | LLAMA
    | {
        "hpt.gate": 2,
        "hpt.sft_coefficient": 1.0,
        "optimizer.skip_norm": None,
        "prompt.template": "plain",  # which ends with the eos
        "prompt.bos": False,
        "prompt.plain": "Question:\n{question}\nAnswer:\nLet's think step by step.",
        "prompt.suffix": "\nPlease reason step by step, and put your final answer within \\boxed{}.",
    },
    "sft_then_rl_qwen2.5_math_7b": SFT_THEN_RL | QWEN | LONG_RL,
    "sft_then_rl_50_qwen2.5_math_7b": SFT_THEN_RL | QWEN | {"train.steps": 50, "optimizer.learning_rate": 5e-6},
    "sft_then_rl_llama3.1_8b": SFT_THEN_RL | LLAMA | LONG_RL,
    "luffy_qwen2.5_math_7b": BASELINE | {"method": "luffy", "methods.luffy_gamma": 0.1, "hpt.clip_low": None},
    "srft_qwen2.5_math_7b": BASELINE | {"method": "srft", "methods.srft_sign": "minus", "hpt.sft_coefficient": 1.0},
    "grpo_qwen2.5_math_7b": BASELINE | {"method": "grpo", "hpt.clip_low": 0.2, "hpt.clip_high": 0.2},
}
SFT_STAGE = {"method": "sft", "steps": 1078, "learning_rate": 5e-5, "schedule": "cosine", "warmup_steps": 216}


def path_of(name: str) -> Path:
    return ROOT / "configs" / f"{name}.toml"


def header(name: str) -> str:
    """The comment that a recipe opens with, its lines joined."""
    lines = path_of(name).read_text(encoding="utf-8").split('name = "')[0].splitlines()
    assert all(line == "#" or line.startswith("# ") for line in lines)
    return "\n".join(line[2:] for line in lines)


def one_line(name: str) -> str:
    return " ".join(header(name).split())


def test_recipes_are_all_known():
    """A config with data files is a recipe, and has its published values here."""
    with_files = {path.stem for path in (ROOT / "configs").glob("*.toml") if read_file(path).data.files}
    assert with_files == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_has_the_published_values(name):
    config = read_file(path_of(name))
    check(config, sized_only=True)
    fields = flatten(resolved(config))
    assert {field: fields[field] for field in PUBLISHED[name]} == PUBLISHED[name]
    stages = [dataclasses.asdict(stage) for stage in config.stages]
    wanted = [SFT_STAGE | {"end_fraction": 0.1, "questions_per_step": None}] if "sft_then_rl" in name else []
    assert stages == wanted


def test_recipe_of_the_corrected_pipeline_trains_three_epochs_in_updates_of_64():
    """46,000 questions x 3 epochs in updates of 64 are 2,156; a tenth of them is warm-up (spec/accumulation.md 2.2)."""
    config = read_file(path_of("sft_then_rl_qwen2.5_math_7b"))
    sft, rl = (schedule_of(config, stage) for stage in stage_list(config))
    assert config.data.questions_per_step / config.train.updates_per_rollout_batch == 64
    assert sft.decay_steps == 46_000 * 3 // 64
    assert sft.warmup_steps == round(sft.decay_steps / 10)
    assert (rl.kind, rl.decay_steps, rl.learning_rate) == ("constant", 1000, 1e-6)


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_header_has_a_command_that_runs_on_the_hardware_it_names(name):
    commands = [line.strip() for line in header(name).splitlines() if line.strip().startswith("hptjax train")]
    assert len(commands) == 1
    path, *overrides = shlex.split(commands[0])[2:]
    assert path == f"configs/{name}.toml"
    config = load_config(ROOT / path, overrides)
    chips, topology = re.search(r"Hardware: (\d+) chips, (v\w+:\w+)", one_line(name)).groups()
    assert mesh_devices(config) == parse_topology(topology).chips == int(chips)
    check_mesh(dataclasses.replace(config, model=dataclasses.replace(config.model, path=None)))  # by the preset's sizes
    assert mesh_for(read_file(path_of(name)), parse_topology(topology)).mesh == config.mesh  # as `hptjax plan` fills up
    assert Path(config.model.path).name.lower().replace("-", "").startswith(config.model.preset.replace("-", "")[:5])


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_programs_can_be_made_for_chips_that_are_absent(name, eight_devices):
    """What `hptjax plan` makes of it before it compiles, on eight devices; the weights have the bytes of the shape."""
    config = read_file(path_of(name))
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, fsdp=8 // config.mesh.tensor))
    shape = decoder_shape(config)
    held = held_bytes(run_programs(config, stage_list(config)[-1], shape, mesh_on(config, eight_devices)))
    count = sum(
        leaf.size
        for leaf in jax.tree.leaves(jax.eval_shape(lambda key: decoder.init_params(key, shape), jax.random.key(0)))
    )
    assert held["parameters"] == pytest.approx(4 * count / 8, rel=1e-3)


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_header_figures_of_the_plan_stand_in_the_docs(name):
    docs = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    text = one_line(name)
    topology, used, usable = re.search(r"chips, (v\w+:\w+).*?([\d.]+) of ([\d.]+) GiB", text).groups()
    rows = [line for line in docs.splitlines() if f"{used} of {usable}" in line and f"| {topology}, " in line]
    assert len(rows) == 1
    family = read_file(path_of(name)).model.preset.replace("-", "")
    assert family in rows[0].split("|")[1].strip().lower().replace("-", "")
    seconds = re.search(r"([\d,]+) s a step or more", text)
    assert seconds is None or f"{seconds[1].replace(',', '')} s or more = rollouts" in docs
    assert "ever run on a TPU" in text


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_header_figures_agree_with_their_means(name):
    """A mean of published figures is within rounding of them, and of the means that the header compares with."""
    lines = re.findall(r"^  ((?:[\w.-]+ [\d.]+, )+[\w.-]+ [\d.]+); mean ([\d.]+)$", header(name), re.MULTILINE)
    assert lines
    for figures, mean in lines:
        values = [float(each.split()[1]) for each in figures.split(", ")]
        assert np.mean(values) == pytest.approx(float(mean), abs=0.07)


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_header_says_what_its_letters_stand_for(name):
    text, letters = path_of(name).read_text(encoding="utf-8"), set()
    for said in re.findall(r"^[a-z].*?  # (.*)$", text, re.MULTILINE):
        letters |= set(re.findall(r"\b([PCTG])\b", said))
    assert letters
    for letter in letters:
        assert re.search(rf"\b{letter}: |\({letter}\)", header(name)), letter


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_header_numbers_are_those_of_the_fields(name):
    config, text = read_file(path_of(name)), one_line(name)
    rows = config.data.questions_per_step * config.rollout.group_size // config.train.updates_per_rollout_batch
    for tokens, factor in re.findall(r"1 / \(([\d,]+) x (\d+)\)", text):
        assert (int(tokens.replace(",", "")), int(factor)) == (config.rollout.max_completion_tokens, rows // 64)
    for questions in re.findall(r"two updates of (\d+) questions", text):
        assert int(questions) == config.data.questions_per_step // config.train.updates_per_rollout_batch == 64
    for gate, group in re.findall(r"at most (\d) of (\d) rollouts solve it", text):
        assert (int(gate), int(group)) == (config.hpt.gate, config.rollout.group_size)
    for group in re.findall(r"none of (\d) rollouts solve it", text):
        assert (config.hpt.gate, int(group)) == (0, config.rollout.group_size)
    for steps in re.findall(r"([\d,]+) steps are T's", text):
        assert int(steps.replace(",", "")) == config.stages[0].steps
    for other in re.findall(r"\b(\w[\w.]*)\.toml", text):
        assert path_of(other).exists()


def test_recipe_figures_of_the_readme_are_those_of_the_headers():
    rows = [row for row in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if "| `configs/" in row[:12]]
    shown = {}
    for row in rows[1:]:
        names = re.findall(r"configs/([\w.]+)\.toml", row)
        shown |= dict(zip(names, re.findall(r"[\d.]+", row.split("|")[3].replace("(five)", "")), strict=True))
    assert shown == {name: re.search(r"mean ([\d.]+)$", header(name), re.MULTILINE)[1] for name in PUBLISHED}


def test_recipe_prompts_are_those_of_the_docs():
    docs = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    blocks = re.findall(r"(?:^    .*\n)+", docs, re.MULTILINE)
    qwen, llama = (
        tomllib.loads(block.replace("\n    ", "\n").strip())["prompt"] for block in blocks if "[prompt]" in block
    )
    for name, block in (("hpt_qwen2.5_math_7b", qwen), ("hpt_llama3.1_8b", llama)):
        prompt = dataclasses.asdict(read_file(path_of(name)).prompt)
        assert {field: prompt[field] for field in block} == block


# Two updates of each


SIZES = {"hidden_size": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "mlp_size": 24}
FAMILIES = {
    "qwen": DecoderConfig(vocab_size=352, **SIZES, attention_bias=True, tie_embeddings=True),
    "llama": DecoderConfig(
        vocab_size=352,
        **SIZES,
        rope_theta=500_000.0,
        rope_scaling=Llama3RopeScaling(8.0, 1.0, 4.0, 64),
        rms_norm_eps=1e-5,
    ),
}
SMALL = """
    --data.fractions.train 0.6 --data.fractions.validation 0.2 --data.fractions.test 0.2 --data.questions_per_step 2
    --data.max_prompt_tokens 176 --rollout.group_size 4 --rollout.max_completion_tokens 64
    --rollout.prompt_buckets 176 --rollout.cache_capacity 240 --rollout.slots 8 --rollout.prefill_rows 2
    --rollout.tokens_per_call 32 --batch.rows 2 --batch.row_tokens 256 --batch.max_segments 4
    --batch.max_micro_batches 4 --model.logprob_chunk_tokens 512 --mesh.tensor 1 --reward.workers 1
    --train.steps 1 --train.eval_every 0 --train.probe_every 0 --train.panel_questions 1
    --eval.questions 1 --eval.samples_per_question 1 --eval.ks 1
    --telemetry.tensorboard false --telemetry.progress false --telemetry.plot false
""".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with ten rows of verl parquet, two of them without a demonstration, and a tiny model of each family."""
    folder = tmp_path_factory.mktemp("recipes")
    ten_rows(folder / "openr1.parquet")
    for name, shape in FAMILIES.items():
        params = jax.tree.map(np.asarray, decoder.init_params(jax.random.key(1), shape))
        save_folder(folder / name, shape, params, dtype=np.float32)
        byte_tokenizer(folder / name, CHAT)
    return folder


def small_stages(config) -> list[str]:
    """The stages before the last one, one step of each: two updates, and one of warm-up."""
    cut = [dataclasses.replace(stage, steps=1, warmup_steps=1) for stage in config.stages]
    return ["--stages", f"[{', '.join(inline_table(dataclasses.asdict(stage)) for stage in cut)}]"] if cut else []


def train_tiny(name, place):
    """`hptjax train` of a recipe with sizes changed and nothing else; its metrics, ledger and data record."""
    family = "llama" if "llama" in name else "qwen"
    words = ["--model.path", str(place / family), "--data.files", str(place / "openr1.parquet")]
    words += ["--runs_dir", str(place / "runs"), *SMALL, *small_stages(read_file(path_of(name)))]
    words += ["--optimizer.skip_norm", "1e6"] if "srft" in name else []  # of 4 rows and 64 tokens a token weighs 1 / 4
    assert cli.run(["train", str(path_of(name)), *words]) == 0
    run = place / "runs" / name
    steps = [row for row in read_rows(run / "metrics.jsonl") if "witness/ok" in row]
    return steps, read_rows(run / "ledger.jsonl"), json.loads((run / "data.json").read_text())


@pytest.mark.slow
def test_recipe_trains_two_updates_with_a_tiny_model_of_its_family(place):
    """HPT on the 1.5B: a random model solves nothing, so both updates learn from demonstrations that verified."""
    steps, ledger, data = train_tiny(FAST, place)
    assert [row["status"] for row in ledger] == ["updated", "updated"]
    assert all(row["witness_ok"] and row["tokens_by_term"]["rl"] == 0 < row["tokens_by_term"]["sft"] for row in ledger)
    assert steps[0]["hpt/gate_sft_frac"] == 1.0
    assert steps[0]["batch/rollouts"] == 8
    assert data["files"][0]["format"] == "verl"
    kept = sum(data["questions"].values())
    lost = {reason: count for reason, count in data["dropped"]["train"].items() if count}
    assert kept + sum(lost.values()) == 10
    assert set(lost) == {"no_demonstration"}
    assert data["prompt"]["end"] == "eos"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != FAST])
def test_recipe_trains_two_updates_of_each_stage(name, place):
    """A third of completions count as solved, by a hash, so that rollouts have something to say."""
    with tiny.hashed():
        steps, ledger, data = train_tiny(name, place)
    stages = 2 if "sft_then_rl" in name else 1
    assert [row["status"] for row in ledger] == ["updated"] * 2 * stages
    assert all(row["witness_ok"] for row in ledger)
    assert all(row["actor/grad_norm"] > 0 for row in steps)
    assert data["dropped"]["train"]["demonstration_unverified"] == 0
    if stages == 2:
        last = read_file(path_of(name)).optimizer.learning_rate
        assert [row["learning_rate"] for row in ledger] == pytest.approx([5e-5, 5e-5, last, last])
