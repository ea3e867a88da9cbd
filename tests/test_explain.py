"""`hptjax explain`, number by number: operations, bytes per device, who has set a field, and what is not known."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path

import numpy as np
import pytest

from hptjax import cli
from hptjax.build.method import options
from hptjax.config import Config, StageConfig, flatten, resolved
from hptjax.config_batch import rollouts_sampled, samples_left, stage_alone, stage_list
from hptjax.config_load import load_config, read_file
from hptjax.config_methods import MethodName, MicroGroupRow
from hptjax.config_sources import field_sources
from hptjax.explain import explain, folder_shape
from hptjax.explain_flops import Lengths, attention_share, flop_lines, stage_flops
from hptjax.explain_memory import held, parameter_count
from hptjax.hpt.gate import demonstration_sample
from hptjax.hpt.methods import METHODS
from hptjax.hpt.route import Judged
from hptjax.plan.plan import held_bytes
from hptjax.plan.programs import run_programs
from hptjax.plan.topology import mesh_on
from hptjax.records import Example, FinishReason, Question, Sample, SampleId, Source
from tests.test_config import changed

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30


def recipe(name: str, *words: str) -> Config:
    """A recipe with a model folder that is not on this machine."""
    return load_config(ROOT / "configs" / f"{name}.toml", ["--model.path", "absent", *words])


# Operations


def test_explain_operations_are_those_of_the_source():
    """arXiv 2604.23747, App. B, by `spec/accumulation.md` 2.3: N = 7e9, 4,200 tokens; rollouts of LUFFY 2,200."""
    lengths = Lengths(4200, 4200)
    config = changed(Config(), data__questions_per_step=128, rollout__group_size=8)
    sft = stage_flops(config, StageConfig("sft", 1), 7e9, lengths)
    per_question = sft.total[0] / 128
    assert per_question * 46_000 * 3 == pytest.approx(2.43e19, rel=3e-3)
    rl = stage_flops(config, StageConfig("dr_grpo", 50), 7e9, lengths)
    assert rl.total == (rl.total[1], rl.total[1])
    assert rl.total[0] * 50 == pytest.approx(1.20e19, rel=5e-3)
    assert rl.total[0] / 128 == pytest.approx(1.88e15, rel=3e-3)
    assert per_question * 46_000 * 3 + rl.total[0] * 50 == pytest.approx(3.63e19, rel=3e-3)
    luffy = stage_flops(config, StageConfig("luffy", 500), 7e9, Lengths(2200, 4200))
    assert luffy.total[0] * 500 == pytest.approx(6.65e19, rel=3e-3)


def test_explain_operations_by_hand():
    """10 questions; N = 100, rollouts of 3 tokens, demonstrations of 5; 2 N = 200 and 6 N = 600 per token."""
    config = changed(Config(), data__questions_per_step=10, rollout__group_size=4)
    lengths = Lengths(3, 5)
    hpt = stage_flops(config, StageConfig("hpt", 1), 100, lengths)
    assert hpt.sampled == (24_000, 24_000)  # 10 x 4 rollouts x 3 tokens x 200
    assert hpt.trained == (30_000, 72_000)  # 10 demonstrations x 5 x 600 to 40 rollouts x 3 x 600
    assert hpt.scored == (10_000, 24_000)
    srft = stage_flops(config, StageConfig("srft", 1), 100, lengths)
    assert (srft.sampled, srft.trained) == ((24_000, 24_000), (102_000, 102_000))
    dapo = stage_flops(changed(config, methods__dapo_draws=3), StageConfig("dapo", 1), 100, lengths)
    assert (dapo.sampled, dapo.trained) == ((24_000, 72_000), (0, 72_000))
    few = stage_flops(config, StageConfig("sft", 1, questions_per_step=2), 100, lengths)
    assert (few.sampled, few.trained) == ((0, 0), (6_000, 6_000))


def test_explain_operations_of_adapters_by_hand():
    """As above with n = 7: 4 N + 6 n = 442 per token that is trained on, 2 N + 2 n = 214 to score it, 200 to sample."""
    config = changed(Config(), data__questions_per_step=10, rollout__group_size=4)
    hpt = stage_flops(config, StageConfig("hpt", 1), 100, Lengths(3, 5), 7)
    assert hpt.sampled == (24_000, 24_000)
    assert hpt.trained == (50 * 442, 120 * 442)
    assert hpt.scored == (50 * 214, 120 * 214)
    text = explain(changed(Config(), model__preset="qwen3-0.6b", lora__rank=4, lora__targets=("k_proj",)))
    # 28 layers, D 1024, 8 kv heads of 128
    assert f"n = {28 * 4 * (1024 + 1024):,} in adapters; 2 N for a token that is sampled, 4 N + 6 n for one" in text


def test_explain_operations_of_the_pipeline_by_hand():
    """Both stages of the truncated recipe on 7,615,616,512 parameters and 4,200 tokens a sample."""
    config = recipe("sft_then_rl_50_qwen2.5_math_7b")
    shape = folder_shape(changed(config, model__path=None))
    count = 7_615_616_512
    assert parameter_count(shape, shape.vocab_size) == count
    lines = flop_lines(config, shape, count, Lengths(4200, 4200))
    sft, rl = 6 * count * 4200 * 128 * 1078, 8 * count * 4200 * 128 * 8 * 50
    assert f"{sft:.3g} in all 1,078 steps" in lines[2]
    assert f"{rl:.3g} in all 50 steps" in lines[3]
    assert f"1 score pass(es) over what is trained on, {2 * count * 4200 * 1024:.3g} per step" in lines[4]
    assert lines[5] == f"in all {sft + rl:.3g}"
    assert "sampling 0 + training" in lines[2]


def test_explain_share_of_attention_by_pairs():
    """Scores and mixing are 2 E operations each per pair and head, counted one by one, over 2 N per token."""
    shape = folder_shape(recipe_shape := changed(recipe("hpt_qwen2.5_math_1.5b"), model__path=None))
    assert recipe_shape.model.preset == "qwen2.5-math-1.5b"
    tokens, count = 50, parameter_count(shape, shape.vocab_size)
    pairs = sum(query + 1 for query in range(tokens))
    operations = sum(pairs * 2 * 2 * 128 for _ in range(28 * 12))  # layers x heads
    assert attention_share(shape, count, tokens) == pytest.approx(operations / (2 * count * tokens), rel=1e-12)


# What a question leaves, against the routes themselves


def judged_group(solved: int, size: int, config: Config) -> Judged:
    tokens = np.zeros(3, np.int32)
    question = Question(Example(1, prompt="", demonstration="", answer={}, canonical="1"), tokens, tokens)
    group = [
        Sample(
            sample_id=SampleId(1, 0, index),
            group_id=1,
            source=Source.ROLLOUT,
            prompt_tokens=tokens,
            completion_tokens=tokens,
            sampler_logprobs=np.zeros(3, np.float32),
            reward=float(index < solved),
            solved=index < solved,
            finish_reason=FinishReason.STOP,
        )
        for index in range(size)
    ]
    return Judged(
        questions=[question],
        groups={1: group},
        solved=np.asarray([solved], np.int64),
        visit=0,
        demonstrations={1: dataclasses.replace(demonstration_sample(question), reward=1.0)},
        bank={1: question},
        wanted=1,
    )


@pytest.mark.parametrize("gate", [-1, 0, 2, 4])
@pytest.mark.parametrize("name", typing.get_args(MethodName))
def test_explain_knows_what_the_routes_leave(name, gate):
    """One question with 0 to 4 of 4 solved, through the method's own route; a buffer of one demonstration."""
    groups = (MicroGroupRow(2, 0.0, -1.0), MicroGroupRow(2, 0.5, 0.9))
    config = changed(
        Config(),
        method=name,
        rollout__group_size=4,
        hpt__gate=gate,
        methods__gate_off=max(gate, 0),
        methods__relift_buffer=1,
        methods__trapo_groups=groups,
    )
    method = METHODS[name](options(config))
    seen = set()
    for solved in range(method.rollouts + 1):
        routed = method.route(judged_group(solved, method.rollouts, config))
        sources = [sample.source for sample in (*routed.live, *routed.apart)]
        seen.add((sources.count(Source.ROLLOUT), sources.count(Source.DEMONSTRATION)))
    ways = samples_left(config, name)
    assert rollouts_sampled(config, name)[0] == method.rollouts
    if name == "dpo":  # pairs: anything from none to all
        assert ({min(seen), max(seen)}) == set(ways)
    else:
        assert seen == set(ways)


def test_explain_stage_alone_is_the_stage():
    stage = StageConfig("sft", 7, learning_rate=0.5, schedule="cosine", warmup_steps=3, questions_per_step=6)
    config = changed(Config(), stages=(stage,), optimizer__learning_rate=0.25, train__updates_per_rollout_batch=2)
    alone = stage_alone(config, stage)
    assert (alone.method, alone.train.steps, alone.data.questions_per_step, alone.stages) == ("sft", 7, 6, ())
    assert (alone.optimizer.learning_rate, alone.optimizer.warmup_steps, alone.optimizer.decay_steps) == (0.5, 3, 14)
    last = stage_alone(config, StageConfig("hpt", 9))
    assert (last.optimizer.learning_rate, last.data.questions_per_step) == (0.25, 64)


# Bytes per device


def by_name(config: Config) -> dict[str, typing.Any]:
    return {row.name: row for row in held(config, folder_shape(config))}


def test_explain_bytes_per_device_by_hand():
    """Qwen2.5-Math-1.5B on fsdp 2 x tensor 2: D 1536, L 28, H 12, K 2, E 128, F 8960, V 151,936."""
    config = changed(recipe("hpt_qwen2.5_math_1.5b", "--mesh.fsdp", "2", "--mesh.tensor", "2"), model__path=None)
    rows = by_name(config)
    matrices = 28 * (2 * 1536 * 1536 + 2 * 1536 * 256 + 3 * 1536 * 8960)  # query, output; key, value; the mlp
    cut_by_all = matrices + 151_936 * 1536  # the embedding is the unembedding
    norms, biases = (2 * 28 + 1) * 1536, 28 * (1536 + 2 * 256)  # cut by fsdp alone; by tensor alone
    assert rows["parameters, fp32"].whole == 4 * (cut_by_all + norms + biases) == 4 * 1_543_714_304
    device = 4 * (cut_by_all / 4 + norms / 2 + biases / 2)
    for name in ("parameters, fp32", "accumulator, fp32", "gradient of a micro-batch, fp32"):
        assert rows[name].device == device
    assert rows["optimizer (two moments), fp32"].device == 2 * device
    # rollouts: replicated over fsdp, bf16 but for the norms
    assert rows["weights of rollouts"].device == 2 * cut_by_all / 2 + 2 * biases / 2 + 4 * norms
    # 256 slots x 9,216 positions x 2 heads x 128, keys and values of 28 layers in bf16; fsdp cuts slots, tensor heads
    assert rows["KV cache"].whole == 2 * 28 * 256 * 9216 * 2 * 128 * 2
    assert rows["KV cache"].device == rows["KV cache"].whole / 4
    assert rows["logits of a chunk, fp32"].device == 16_384 * 151_936 * 4 / 4
    # remat "full": the input of every layer, bf16, rows over fsdp
    assert rows["activations of a micro-batch (about)"].device == 16 * 9216 * 28 * 1536 * 2 / 2


def test_explain_bytes_of_int8_rollouts_by_hand():
    """The same model and mesh: matrices of a byte with a float32 per output, and one per key or value of a head."""
    config = changed(recipe("hpt_qwen2.5_math_1.5b", "--mesh.fsdp", "2", "--mesh.tensor", "2"), model__path=None)
    rows, plain = by_name(changed(config, rollout__weights_dtype="int8", rollout__cache_dtype="int8")), by_name(config)
    matrices = 28 * (2 * 1536 * 1536 + 2 * 1536 * 256 + 3 * 1536 * 8960)
    scales = 4 * 28 * ((1536 + 2 * 256 + 2 * 8960) / 2 + 2 * 1536)  # those of output and down lie whole everywhere
    assert rows["weights of rollouts"].device == plain["weights of rollouts"].device - matrices / 2 + scales
    assert rows["KV cache"].whole == 2 * 28 * 256 * 9216 * 2 * (128 + 4)
    assert rows["KV cache"].device == rows["KV cache"].whole / 4


def test_explain_bytes_of_adapters_by_hand():
    """Rank 8 on q and down beside Qwen2.5-Math-1.5B in bf16, fsdp 2 x tensor 2; the rank is not cut."""
    config = changed(recipe("hpt_qwen2.5_math_1.5b", "--mesh.fsdp", "2", "--mesh.tensor", "2"), model__path=None)
    rows = by_name(changed(config, lora__rank=8, lora__targets=("q_proj", "down_proj")))
    assert rows["adapters, fp32"].whole == 4 * 28 * 8 * (1536 + 1536 + 8960 + 1536)
    # q: A over fsdp, B over tensor; down: A over tensor, B over fsdp
    device = 4 * 28 * 8 * (1536 + 1536 + 8960 + 1536) / 2
    kept = by_name(changed(config, lora__rank=8, lora__targets=("q_proj", "down_proj"), hpt__kl_coefficient=0.01))
    assert kept.keys() - rows.keys() == {"adapters at the start (KL reference)"}  # without a KL nobody reads them
    for name in ("adapters, fp32", "adapters at the start (KL reference)", "accumulator, fp32"):
        assert kept[name].device == device
    assert rows["optimizer (two moments), fp32"].device == 2 * device
    whole = by_name(config)
    assert rows["the model, bfloat16"].device < 0.51 * whole["parameters, fp32"].device
    assert rows["weights of rollouts"] == whole["weights of rollouts"]
    assert not [name for name in rows if name.startswith("parameters")]


@pytest.mark.parametrize(
    ("remat", "entries", "device"),
    [
        # D 6, heads 4 x 2 = 8, kv 2 x 2 = 4, mlp 10, scores 4 x 8 positions = 32; tensor 2 cuts all but D
        ("none", 4 * 6 + 2 * 8 + 32 + 2 * 4 + 3 * 10, 24 + (16 + 32 + 8 + 30) / 2),
        ("full", 6, 6),
        ("offload", 0, 0),
        ("attention", 6, 6),  # the plain form names nothing that could be kept
        ("dots", 3 * 6 + 8 + 32 + 2 * 4 + 2 * 10, 18 + (8 + 32 + 8 + 20) / 2),
        ("dots_no_batch", 3 * 6 + 8 + 2 * 4 + 2 * 10, 18 + (8 + 8 + 20) / 2),
    ],
)
def test_explain_activations_by_hand(remat, entries, device):
    config = changed(Config(), model__remat=remat, mesh__tensor=2, batch__rows=3, batch__row_tokens=8)
    small = dataclasses.replace(
        folder_shape(changed(Config(), model__preset="qwen3-0.6b")),
        hidden_size=6,
        num_layers=5,
        num_heads=4,
        num_kv_heads=2,
        head_dim=2,
        mlp_size=10,
        vocab_size=16,
    )
    row = next(row for row in held(config, small) if row.name.startswith("activations"))
    assert (row.whole, row.device) == (4 * 24 * 5 * entries, 4 * 24 * 5 * device)


def test_explain_moments_in_the_hosts_memory_are_on_no_device():
    config = changed(recipe("hpt_qwen2.5_math_1.5b"), model__path=None, optimizer__host_memory=True)
    row = by_name(config)["optimizer (two moments), fp32, on the host"]
    assert (row.whole, row.device) == (8 * 1_543_714_304, 0)


@pytest.mark.parametrize("name", ["hpt_qwen2.5_math_1.5b", "hpt_qwen2.5_math_7b", "hpt_llama3.1_8b"])
def test_explain_bytes_are_those_of_the_plan(name):
    """docs/scale.md has what `hptjax plan` printed, from the shardings of the lowered programs."""
    docs = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    text = docs[docs.index(f"    hptjax plan configs/{name}.toml") :]
    fsdp = re.search(r"mesh fsdp=(\d+)", text)[1]
    rows = by_name(changed(recipe(name, "--mesh.fsdp", fsdp), model__path=None))
    planned = {
        "parameters": "parameters, fp32",
        "optimizer": "optimizer (two moments), fp32",
        "accumulator": "accumulator, fp32",
        "weights of rollouts": "weights of rollouts",
        "KV cache": "KV cache",
    }
    for line, row in planned.items():
        shown = re.search(rf"^    {line} +│ +([\d.]+) ", text, re.MULTILINE)[1]
        assert f"{rows[row].device / GIB:.2f}" == shown, line


def test_explain_refuses_a_mesh_that_does_not_divide(capsys):
    path = str(ROOT / "configs" / "hpt_qwen2.5_math_7b.toml")
    assert cli.run(["explain", path, "--mesh.fsdp", "3"]) == cli.BAD_INPUT
    assert "expected batch.rows to be a multiple of mesh.fsdp (3), got 16" in capsys.readouterr().err


# Who has set a field, and the whole report


def fields_of(text: str) -> dict[str, tuple[str, str]]:
    """Field -> (value, source), of the report's last section."""
    lines = text.split("Fields, and who has set them")[1].splitlines()[1:]
    found = [
        re.fullmatch(r"  (\S+) +(.*?)  +(\S.*)", line) or re.fullmatch(r"  (\S+) +(.*) (\S+)", line) for line in lines
    ]
    return {each[1]: (each[2], each[3]) for each in found}


def test_explain_says_who_has_set_every_field(capsys):
    path = str(ROOT / "configs" / "grpo_qwen2.5_math_7b.toml")
    words = ["--train.steps", "500", "--hpt.gate=1", "--methods.luffy-gamma", "0.2", "--model.path", "absent"]
    assert cli.run(["explain", path, *words]) == 0
    shown = fields_of(capsys.readouterr().out)
    assert set(shown) == set(flatten(resolved(Config())))
    assert shown["train.steps"] == ("500", "command line")  # said again with the value of the file
    assert shown["hpt.gate"] == ("1", "command line")
    assert shown["methods.luffy_gamma"] == ("0.2", "command line")
    assert shown["optimizer.learning_rate"] == ("1e-06", "file")
    assert shown["data.fractions.train"] == ("0.98", "file")
    assert shown["hpt.clip_kind"] == ('"row"', "default")
    assert shown["methods.srft_sign"] == ('"minus"', "default, not read")
    assert shown["optimizer.decay_steps"] == ("1000", "the stage's updates")
    assert shown["mesh.devices"] == ("not set", "default")


@pytest.mark.parametrize(
    ("method", "field", "shown"),
    [
        ("grpo", "hpt.kl_coefficient", ("0.04", "method grpo")),
        ("grpo", "hpt.clip_low", ("ratio in 0.8..1.2", "method grpo")),
        ("dr_grpo", "hpt.clip_high", ("no mask", "method dr_grpo")),
        ("dr_grpo", "hpt.kl_coefficient", ("0", "method dr_grpo")),
        ("luffy", "methods.luffy_gamma", ("0.1", "method luffy")),
        ("relift", "methods.relift_clip_norm", ("0.7", "method relift")),
        ("sft", "hpt.clip_low", ("not set", "default")),
    ],
)
def test_explain_says_what_the_method_decides(method, field, shown):
    config = changed(read_file(ROOT / "configs" / "quickstart.toml"), method=method, model__path=None)
    text = explain(changed(config, model__preset="qwen3-0.6b"))
    assert fields_of(text)[field] == shown
    assert fields_of(text)["hpt.sft_coefficient"] == ("2.5", "set")
    assert fields_of(text)["model.rope_theta"] == ("1000000.0", "model.preset")


def test_explain_sources_know_files_and_options(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('name = "x"\n[data.fractions]\nbase = 0.1\n[[stages]]\nmethod = "sft"\nsteps = 1\n')
    given = field_sources(path, ["--name", "y", "--data.train-questions=5", "--rollout_tokens", "9"])
    assert given == {
        "name": "command line",
        "data.fractions.base": "file",
        "stages": "file",
        "data.train_questions": "command line",
    }


def test_explain_of_a_recipe_needs_neither_data_nor_model_and_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = str(ROOT / "configs" / "sft_then_rl_llama3.1_8b.toml")
    assert (
        cli.run(["explain", path, "--mesh.fsdp", "4", "--rollout_tokens", "3000", "--demonstration_tokens", "5000"])
        == 0
    )
    text = capsys.readouterr().out
    assert "no model.path is set: the sizes are those of model.preset 'llama-3.1-8b'" in text
    assert "Elliott/Openr1-Math-46k-8192: not opened" in text
    assert "One update of stage 1, sft" in text
    assert "What one token of stage 2, dr_grpo weighs" in text
    assert "a rollout has 3,000 tokens, a demonstration 5,000, prompt included: as said" in text
    # stage 1: 64 demonstrations of at most 9,216 tokens an update; stage 2: 512 rollouts
    assert "tokens       at most 589,824 per update, 1,179,648 per step, 1,271,660,544 in all 1,078 steps" in text
    assert "tokens       at most 4,718,592 per update, 9,437,184 per step, 4,718,592,000 in all 500 steps" in text
    sft = 6 * 8_030_261_248 * 5000 * 128
    assert f"1. sft: sampling 0 + training {sft:.3g} = {sft:.3g} per step, {sft * 1078:.3g} in all 1,078 steps" in text
    assert cli.run(["explain", path, "--model.path", "absent"]) == 0
    assert (
        "'absent' holds no config.json: the sizes are those of model.preset 'llama-3.1-8b'" in capsys.readouterr().out
    )


@pytest.mark.parametrize("words", [["--rollout_tokens", "0"], ["--demonstration_tokens", "-3"]])
def test_explain_refuses_lengths_that_are_none(capsys, words):
    path = str(ROOT / "configs" / "hpt_llama3.1_8b.toml")
    assert cli.run(["explain", path, *words]) == cli.BAD_INPUT
    assert f"change {words[0]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rank", "positions", "dtype"),
    [
        (None, None, "compute_dtype"),
        (8, None, "compute_dtype"),
        (None, 600, "compute_dtype"),
        (None, None, "int8"),
        (8, 600, "int8"),
    ],
)
def test_explain_bytes_are_those_of_the_lowered_programs(eight_devices, rank, positions, dtype):
    """A mesh of eight, rollouts in another layout, bf16: the shapes and shardings that `hptjax plan` compiles."""
    config = changed(
        Config(),
        model__preset="qwen3-0.6b",
        model__compute_dtype="bfloat16",
        lora__rank=rank,
        mesh__fsdp=2,
        mesh__sequence=2,
        mesh__tensor=2,
        mesh__rollout_rules="decode",
        batch__rows=4,
        rollout__slots=16,
        rollout__prefill_rows=4,
        rollout__cache_positions=positions,
        rollout__cache_page=16,
        rollout__weights_dtype=dtype,
        rollout__cache_dtype=dtype,
    )
    shape = folder_shape(config)
    programs = run_programs(config, stage_list(config)[-1], shape, mesh_on(config, eight_devices))
    rows, planned = by_name(config), held_bytes(programs)
    names = {
        "parameters": "parameters, fp32",
        "optimizer": "optimizer (two moments), fp32",
        "accumulator": "accumulator, fp32",
        "weights of rollouts": "weights of rollouts",
        "KV cache": "KV cache",
    }
    if rank is not None:
        names |= {"parameters": "adapters, fp32", "model beside the adapters": "the model, bfloat16"}
    for name, row in names.items():  # beside the moments and the sums there are a few counters
        assert 0 <= planned[name] - rows[row].device <= 200, name
    if positions is not None:  # 600 // (16 x 2 devices that slots are cut over) pages on each of the two
        head = shape.head_dim * 2 if dtype != "int8" else shape.head_dim + 4
        assert rows["KV cache"].whole == 2 * shape.num_layers * 2 * 18 * 16 * shape.num_kv_heads * head
        assert all(programs.lower[name]() is not None for name in ("reshard", "prefill", "enter", "decode"))
