"""`hptjax plan` on programs that the CPU compiler made: loops against the same program unrolled, layers against time,
what does not fit, the search, and, where libtpu is installed, a small model on an absent TPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from hptjax.build import policy
from hptjax.build.frozen import make_score
from hptjax.cli import as_switch
from hptjax.config import BatchConfig, Config, DataConfig, MeshConfig, ModelConfig, RolloutConfig
from hptjax.config_batch import stage_list
from hptjax.config_lora import LoraConfig
from hptjax.config_mesh import RuleConfig
from hptjax.model_shape import asked_adapter
from hptjax.models import decoder
from hptjax.models.lora import adapted
from hptjax.models.shape import DecoderConfig
from hptjax.plan import command
from hptjax.plan.chips import CHIPS, Slices, parse_topology
from hptjax.plan.compiled import compile_program, from_json, kept
from hptjax.plan.environment import WITHOUT_CHIPS
from hptjax.plan.estimate import roofline
from hptjax.plan.operations import program_flops
from hptjax.plan.plan import held_bytes, make_plan
from hptjax.plan.programs import run_programs
from hptjax.plan.report import print_plan, to_json
from hptjax.plan.search import Candidate, candidates, judged, largest_multiple, with_choice
from hptjax.plan.topology import compile_only_devices, mesh_for, mesh_on

MIB = 2**20
EIGHT = Slices(CHIPS["v5e"], "2x4")
MESH = MeshConfig(fsdp=4, tensor=2)


def shape_of(layers: int) -> DecoderConfig:
    """Wide enough for matmuls to outweigh what the arithmetic count leaves out."""
    return DecoderConfig(
        vocab_size=512,
        hidden_size=256,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        mlp_size=1024,
        tie_embeddings=True,
    )


def config_of(**changes) -> Config:
    config = Config(
        model=ModelConfig(remat="full", logprob_chunk_tokens=1 << 20),
        data=DataConfig(questions_per_step=8),
        rollout=RolloutConfig(slots=8, prefill_rows=8, tokens_per_call=4),
        batch=BatchConfig(rows=8, row_tokens=256, max_segments=8, max_micro_batches=2),
        mesh=MESH,
    )
    return dataclasses.replace(config, **changes)


def read(lowered, devices):
    """(the compiled program, what the plan reads of it)."""
    compiled = lowered.compile()
    lowered_again: Any = SimpleNamespace(compile=lambda: compiled)
    found = compile_program(lambda: lowered_again, slice_of=[0] * len(devices), turns=(), has_update=True)
    return compiled, found


def train_step(config: Config, shape: DecoderConfig, devices):
    """The whole train step."""
    mesh = mesh_on(config, devices)
    return read(run_programs(config, stage_list(config)[-1], shape, mesh).lower["train step"](), devices)


def gradient(config: Config, shape: DecoderConfig, devices):
    """Its forward and backward pass alone, which compile in a fraction of the time."""
    mesh = mesh_on(config, devices)
    programs = run_programs(config, stage_list(config)[-1], shape, mesh)
    score = make_score(policy.build_functions(config, shape, mesh).token_stats)
    params = programs.state.params["policy"]
    places = jax.tree.map(lambda leaf: leaf.sharding, params)
    program = jax.jit(jax.grad(lambda *inputs: jax.numpy.sum(score(*inputs))), out_shardings=places)
    return read(program.lower(params, programs.micro_batch), devices)


def adapter_gradient(config: Config, shape: DecoderConfig, devices):
    """The same where adapters are trained: nothing is computed that only the gradient of a weight would need."""
    mesh, lora = mesh_on(config, devices), asked_adapter(config)
    programs = run_programs(config, stage_list(config)[-1], shape, mesh)
    score = make_score(policy.build_functions(config, shape, mesh).token_stats)
    adapters = programs.state.params["policy"]

    def total(adapters, base, micro_batch):
        return jax.numpy.sum(score(adapted(base, adapters, lora.scale), micro_batch))

    program = jax.jit(jax.grad(total), out_shardings=jax.tree.map(lambda leaf: leaf.sharding, adapters))
    return read(program.lower(adapters, programs.frozen["base"], programs.micro_batch), devices)


def sent(compiled) -> float:
    return sum(entry.ici_bytes for entry in compiled.exchanged if not entry.update)


@pytest.mark.parametrize(
    ("compiled", "remat"),
    [
        (gradient, "full"),
        pytest.param(adapter_gradient, "full", marks=pytest.mark.slow),
        pytest.param(gradient, "none", marks=pytest.mark.slow),
        pytest.param(train_step, "full", marks=pytest.mark.slow),
    ],
)
def test_plan_agrees_with_the_unrolled_program(eight_devices, monkeypatch, compiled, remat):
    """Operations by arithmetic, exchanges and traffic by trip counts: within 15 % of the program without a loop."""
    layers = 4
    config, shape = config_of(), shape_of(layers)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
    if compiled is adapter_gradient:
        config = dataclasses.replace(config, lora=LoraConfig(rank=16))
    _, rolled = compiled(config, shape, eight_devices)
    forward = decoder.forward
    monkeypatch.setattr(policy.decoder, "forward", lambda *args, **named: forward(*args, **named | {"unroll": layers}))
    program, unrolled = compiled(config, shape, eight_devices)
    counted = program_flops(config, shape, "train step", platform="cpu")
    assert counted.total / 8 == pytest.approx(program.cost_analysis()["flops"], rel=0.15)
    assert sent(rolled) == pytest.approx(sent(unrolled), rel=0.15)
    if (
        remat == "full"
    ):  # else a loop stacks what it keeps and takes it apart again, which a program without one need not
        assert rolled.memory_bytes == pytest.approx(unrolled.memory_bytes, rel=0.15)
    assert rolled.unknown_loops == unrolled.unknown_loops == 0


@pytest.mark.slow
def test_plan_time_grows_with_the_layers(eight_devices):
    """Each further pair of layers costs the same operations, traffic and exchanges, and so the same time."""
    config = config_of()
    times = []
    for layers in (2, 4, 6):
        shape = shape_of(layers)
        _, found = gradient(config, shape, eight_devices)
        flops = program_flops(config, shape, "train step", platform="cpu").total / 8
        times.append(roofline(CHIPS["v5e"], flops, found, update=False))
    for part in ("compute_s", "memory_s", "ici_s"):
        two, four, six = (getattr(time, part) for time in times)
        assert four > 1.2 * two
        assert six - four == pytest.approx(four - two, rel=0.05)


@pytest.fixture(scope="module")
def plan():
    """The whole plan of a small model on eight CPU devices, with the figures of v5e."""
    config = config_of(mesh=dataclasses.replace(MESH, rollout_rules="replicated"))
    return make_plan(config, shape_of(2), EIGHT, jax.devices()[:8], cache=None)


def test_plan_holds_what_the_shardings_say(plan):
    weights = plan.parameters
    assert plan.held["parameters"] < weights * 4 / 4  # cut over fsdp and tensor but for what cannot be
    assert plan.held["parameters"] > weights * 4 / 8
    assert plan.held["optimizer"] == pytest.approx(2 * plan.held["parameters"], rel=1e-3)
    assert plan.held["accumulator"] == pytest.approx(plan.held["parameters"], rel=1e-3)
    # [L slots capacity K E] twice, fp32, slots over fsdp and kv heads over tensor
    assert plan.held["KV cache"] == 2 * 2 * 8 * 48 * 2 * 64 * 4 / 8
    state = sum(plan.held[name] for name in ("parameters", "optimizer", "accumulator", "counters and checks"))
    train = plan.programs["train step"].compiled
    assert train.argument_bytes == pytest.approx(state + plan.held["micro-batch"], rel=0.01)
    assert plan.held["prefilled prompts"] == 2 * 2 * 8 * 24 * 2 * 64 * 4 / 8  # [L rows bucket K E] twice
    for name, beside in (("decode", "prefilled prompts"), ("prefill", "KV cache")):
        assert plan.programs[name].resident_bytes == pytest.approx(state + plan.held[beside], rel=1e-6)


def test_plan_prints_every_program_and_fits(plan):
    text = io.StringIO()
    print_plan(plan, text)
    for word in (
        "train step",
        "score",
        "reshard",
        "prefill",
        "enter",
        "decode",
        "optimizer",
        "KV cache",
        "FITS",
        "estimated",
    ):
        assert word in text.getvalue()
    values = json.loads(to_json([plan]))[0]
    assert values["fits"]
    assert values["programs"]["train step"]["largest"]
    assert {entry["kind"] for entry in values["programs"]["train step"]["exchanged"]} >= {"all-gather", "all-reduce"}
    assert values["step_estimated"]["seconds"] > 0


def test_plan_that_does_not_fit_says_which_numbers_clash(plan):
    tight = dataclasses.replace(EIGHT.chip, usable_bytes=MIB)
    large = dataclasses.replace(plan, topology=dataclasses.replace(EIGHT, chip=tight))
    assert "train step" in large.too_large()
    text = io.StringIO()
    print_plan(large, text)
    assert "DOES NOT FIT: train step needs" in text.getvalue()
    assert "mesh.fsdp" in text.getvalue()
    assert "batch.rows" in text.getvalue()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            config_of(batch=BatchConfig(rows=6, row_tokens=256)),
            r"batch.rows to be a multiple of mesh.fsdp \(4\), got 6",
        ),
        (config_of(rollout=RolloutConfig(slots=10)), r"rollout.slots to be a multiple"),
        (config_of(mesh=MeshConfig(tensor=8)), r"model.shape.num_heads: .* of size 4"),
        (config_of(mesh=MeshConfig(data=2, tensor=4), rollout=RolloutConfig(slots=8)), r"vocab_size: .* of size 510"),
    ],
)
def test_plan_refuses_what_does_not_divide(eight_devices, config, words):
    with pytest.raises(ValueError, match=words):
        make_plan(config, dataclasses.replace(shape_of(2), vocab_size=510), EIGHT, eight_devices, cache=None)


def test_plan_is_kept_between_calls(plan, tmp_path):
    compiled = plan.programs["train step"].compiled
    (tmp_path / "cache").mkdir()
    made = []

    def make():
        made.append(1)
        return compiled

    assert kept(tmp_path / "cache", "key", make) == compiled
    assert kept(tmp_path / "cache", "key", make) == compiled
    assert len(made) == 1
    (tmp_path / "cache" / "key.json").write_text("{cut sh")
    assert kept(tmp_path / "cache", "key", make) == compiled
    assert kept(tmp_path / "cache", "key", make) == compiled
    assert len(made) == 2
    assert from_json(json.loads(json.dumps(dataclasses.asdict(compiled)))) == compiled


@pytest.mark.parametrize(
    ("fixed", "per_row", "answer"),
    [(10.0, 1.0, (88, 96)), (0.0, 12.5, (8, 16)), (99.0, 1.0, (0, 8)), (1.0, 0.001, (96, None))],
)
def test_plan_largest_batch_by_few_looks(fixed, per_row, answer):
    looks = []

    def peak(rows: int) -> float:
        looks.append(rows)
        return fixed + per_row * rows

    assert largest_multiple(peak, fixed=fixed / 2, unit=8, start=16, room=100.0, most=100) == answer
    assert len(looks) <= 4
    assert all(rows % 8 == 0 for rows in looks)


def test_plan_largest_batch_says_where_it_stopped_looking():
    """A step in the memory that the line does not foresee: halfway, and what was not looked at is not claimed."""
    looks = []

    def peak(rows: int) -> float:
        looks.append(rows)
        return rows / 4 if rows < 48 else 200.0

    assert largest_multiple(peak, fixed=0.0, unit=8, start=16, room=100.0, most=400) == (16, 112)
    assert looks == [16, 400, 208, 112]


def test_plan_search_ranks_what_may_fit():
    config = config_of(
        batch=BatchConfig(rows=16, row_tokens=9216, max_segments=16, max_micro_batches=32),
        data=DataConfig(questions_per_step=128, max_prompt_tokens=1024),
        rollout=RolloutConfig(slots=64, prefill_rows=32, max_completion_tokens=8192, prompt_buckets=(1024,)),
        model=ModelConfig(preset="qwen2.5-math-1.5b", compute_dtype="bfloat16", remat="full"),
    )
    from hptjax.models.presets import PRESETS

    found = candidates(config, PRESETS["qwen2.5-math-1.5b"], Slices(CHIPS["v5e"], "4x4"), ("full", "none"))
    assert found
    speeds = [candidate.tokens_per_s for candidate in found]
    assert speeds == sorted(speeds, reverse=True)
    for candidate in found:
        mesh = candidate.config.mesh
        assert mesh.data * mesh.fsdp * mesh.sequence * mesh.tensor == 16
        assert candidate.config.batch.rows % (mesh.data * mesh.fsdp) == 0
        assert candidate.bytes < 15.75 * 2**30
        capacity = candidate.config.batch.rows * candidate.config.batch.max_micro_batches
        assert capacity >= 16 * 32  # an update still holds its samples
    with pytest.raises(
        ValueError, match=r"v5e:2x2 .* in 14.96 GiB per chip, got \d+.\d+ GiB .* batch.rows \d+ and remat"
    ):
        candidates(config, PRESETS["qwen2.5-math-7b"], Slices(CHIPS["v5e"], "2x2"), ("full",))
    uneven = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, slots=7))
    with pytest.raises(ValueError, match=r"28 heads, 4 kv heads, .* rollout.slots 7 .* multiples of 8"):
        candidates(uneven, PRESETS["qwen2.5-math-7b"], Slices(CHIPS["v5e"], "2x2", 2), ("full",))


def test_plan_counts_moments_in_host_memory_apart(eight_devices):
    config = config_of()
    host = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, host_memory=True))
    mesh, stage = mesh_on(config, eight_devices), stage_list(config)[-1]
    ours, theirs = (held_bytes(run_programs(one, stage, shape_of(1), mesh)) for one in (host, config))
    assert ours["optimizer"] < 0.01 * theirs["optimizer"]
    assert ours["on the host: optimizer"] == pytest.approx(theirs["optimizer"], rel=0.01)
    assert theirs["on the host: optimizer"] == 0
    assert ours["counters and checks"] == theirs["counters and checks"]


def test_plan_of_adapters_holds_state_for_them_alone(eight_devices):
    """By hand: one layer, adapters of rank 8 on q (256 to 256) and down (1024 to 256), the model beside them bf16."""
    config, shape = config_of(), shape_of(1)
    bf16 = dataclasses.replace(config.model, compute_dtype="bfloat16")
    config = dataclasses.replace(config, model=bf16, lora=LoraConfig(rank=8, targets=("q_proj", "down_proj")))
    mesh, stage = mesh_on(config, eight_devices), stage_list(config)[-1]
    programs = run_programs(config, stage, shape, mesh)
    held = held_bytes(programs)
    # A of q over fsdp (4), B of q over tensor (2); A of down over tensor, B of down over fsdp
    ours = 4 * 8 * (256 / 4 + 256 / 2 + 1024 / 2 + 256 / 4)
    assert held["parameters"] == ours
    assert held["optimizer"] == pytest.approx(2 * ours, abs=64)
    assert held["accumulator"] == pytest.approx(ours, abs=64)
    norms = 3 * 256 / 4
    matrices = (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 1024 + 512 * 256) / 8
    assert held["model beside the adapters"] == 2 * matrices + 4 * norms
    assert held["weights of rollouts"] == held["model beside the adapters"]
    assert {"train step", "score", "merge", "prefill", "enter", "decode"} == set(programs.lower)
    judged_all, judged_few = (
        judged(one, shape, EIGHT).bytes for one in (dataclasses.replace(config, lora=LoraConfig()), config)
    )
    assert judged_few < judged_all


@pytest.mark.slow
def test_plan_of_adapters_is_whole(eight_devices):
    config = config_of(lora=LoraConfig(rank=8), mesh=dataclasses.replace(MESH, rollout_rules="replicated"))
    plan = make_plan(config, shape_of(1), EIGHT, eight_devices, cache=None)
    assert set(plan.programs) == {"train step", "score", "merge", "reshard", "prefill", "enter", "decode"}
    train = plan.programs["train step"].compiled
    state = sum(plan.held[name] for name in ("parameters", "optimizer", "accumulator", "counters and checks"))
    state += plan.held["model beside the adapters"]
    assert train.argument_bytes == pytest.approx(state + plan.held["micro-batch"], rel=0.01)
    assert plan.programs["decode"].resident_bytes == pytest.approx(state + plan.held["prefilled prompts"], rel=1e-6)
    assert plan.programs["reshard"].resident_bytes == pytest.approx(state, rel=1e-6)
    text = io.StringIO()
    print_plan(plan, text)
    assert "0.00 B parameters + 0.05 M of adapters" in text.getvalue()
    assert plan.step is not None
    values = json.loads(to_json([plan]))[0]
    assert values["frozen_parameters"] == plan.frozen > 10 * values["parameters"]


def test_plan_looks_for_rows_that_the_table_divides(plan, monkeypatch):
    """Rows are cut by `mesh.axes`, not by the axes that usually cut them."""
    config = config_of(mesh=dataclasses.replace(MESH, axes=(RuleConfig("batch", ("data", "tensor")),)))
    asked = command.Asked(shape_of(1), EIGHT, [], None, lambda line: None)
    monkeypatch.setattr(command, "largest_multiple", lambda peak, *, unit, **rest: (unit, None))
    assert command.largest_rows(asked, config, plan) == (2, None)


def test_plan_refuses_a_folder_of_results_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="change --cache"):
        command.made_folder(tmp_path / "file")
    assert command.made_folder(tmp_path / "new" / "folder").is_dir()


def test_plan_search_goes_on_where_the_compiler_refuses(monkeypatch, capsys):
    """The first is too large; the third needs as much and is left out; the fourth keeps less and is compiled."""
    bytes_of = {"one": 9.0, "two": 8.0, "three": 9.5, "four": 9.5}
    remats: dict[str, Any] = {"one": "none", "two": "none", "three": "none", "four": "full"}
    config = config_of()
    found = [
        Candidate(
            dataclasses.replace(config, name=name, model=dataclasses.replace(config.model, remat=remats[name])),
            size,
            1.0,
        )
        for name, size in bytes_of.items()
    ]
    looks = []

    def plan(self, config, only=None):
        looks.append(config.name)
        large = ["train step"] if config.name == "one" else []
        step = SimpleNamespace(time=SimpleNamespace(seconds={"two": 2.0}.get(config.name, 1.0)))
        return SimpleNamespace(programs={"train step": step}, too_large=lambda: large, rows=8, row_tokens=16)

    monkeypatch.setattr(command, "candidates", lambda *given: found)
    monkeypatch.setattr(command, "print_ranking", lambda ranked, considered, file: None)
    monkeypatch.setattr(command.Asked, "plan", plan)
    command.best_plan.__wrapped__(command.Asked(shape_of(1), EIGHT, [], None, lambda line: None), config)
    assert looks == ["one", "two", "four", "four"]


def test_plan_search_counts_the_network_between_slices():
    """Over several slices a micro-batch of few rows waits for the gradients' way through the network."""
    slices = Slices(CHIPS["v5e"], "2x4", 2)
    small, large = (with_choice(config_of(), MeshConfig(replica=2, fsdp=8), rows, "full") for rows in (16, 64))
    speeds = [judged(config, shape_of(2), slices).tokens_per_s for config in (small, large)]
    assert speeds[1] > 3 * speeds[0]


LIBTPU = importlib.util.find_spec("libtpu") is not None


@pytest.mark.skipif(not LIBTPU, reason="needs libtpu: pip install 'hptjax[tpu]'")
@pytest.mark.parametrize(
    ("topology", "only"),
    [
        ("v5e:2x2", ("score", "prefill", "enter", "decode")),
        pytest.param("v5p:2x2x1", ("train step", "score"), marks=pytest.mark.slow),
        pytest.param("2xv6e:2x2", None, marks=pytest.mark.slow),
    ],
)
def test_plan_of_a_small_model_on_an_absent_tpu(monkeypatch, topology, only):
    """The compiler's memory analysis, exchanges over the mesh and, with two slices, gradients through the network."""
    for name, value in WITHOUT_CHIPS.items():
        monkeypatch.setenv(name, value)
    slices = parse_topology(topology)
    model = ModelConfig(compute_dtype="bfloat16", remat="full")
    config = mesh_for(config_of(mesh=MeshConfig(), model=model), slices)
    plan = make_plan(config, shape_of(2), slices, compile_only_devices(slices), cache=None, only=only)
    assert not plan.too_large()
    assert all(program.compiled.temp_bytes > 0 or program.compiled.exchanged for program in plan.programs.values())
    assert {entry.kind for entry in plan.programs["score"].compiled.exchanged} >= {"all-gather"}
    if slices.count > 1:
        assert plan.programs["train step"].time.dcn_s > 0
        assert plan.programs["score"].time.dcn_s == 0
        assert plan.step is not None


@pytest.mark.skipif(LIBTPU, reason="libtpu is here")
def test_plan_without_libtpu_says_what_to_install(tmp_path):
    config = tmp_path / "small.toml"
    config.write_text('[model]\npreset = "qwen3-0.6b"\n')
    command = [sys.executable, "-m", "hptjax.cli", "plan", str(config), "--topology", "v5e:2x2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "pip install 'hptjax[tpu]'" in done.stderr


def test_plan_search_is_a_switch():
    assert as_switch(["c.toml", "--search"], "--search") == ["c.toml", "--search", "true"]
    assert as_switch(["--search", "--json", "x"], "--search") == ["--search", "true", "--json", "x"]
    assert as_switch(["--search", "false"], "--search") == ["--search", "false"]


def test_plan_command_refuses_before_it_compiles(tmp_path):
    config = tmp_path / "small.toml"
    config.write_text('[model]\npreset = "qwen3-0.6b"\n[mesh]\nfsdp = 3\n')
    command = [sys.executable, "-m", "hptjax.cli", "plan", str(config), "--topology"]
    for topology, words in (("v5e:5x5", "v5e:4x4"), ("v5e:4x4", "expected a mesh of 16 devices")):
        done = subprocess.run([*command, topology], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 2
        assert words in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_plan_search_compiles_the_best_and_plans_the_first(eight_devices, monkeypatch, capsys):
    monkeypatch.setattr(command, "COMPILED_CANDIDATES", 2)
    asked = command.Asked(shape_of(1), EIGHT, eight_devices, None, lambda line: None)
    plan = command.best_plan(asked, config_of())
    printed = capsys.readouterr().out
    assert "these were compiled" in printed
    assert plan.step is not None
    assert set(plan.programs) >= {"train step", "score", "prefill", "enter", "decode"}


@pytest.mark.slow
def test_plan_finds_the_largest_batch_by_compiling(eight_devices):
    config = config_of()
    asked = command.Asked(shape_of(1), EIGHT, eight_devices, None, lambda line: None)
    plan = asked.plan(config, only=("train step",))
    roomy = command.train_peak(plan)
    tight = dataclasses.replace(EIGHT, chip=dataclasses.replace(EIGHT.chip, usable_bytes=int(1.5 * roomy)))
    asked = dataclasses.replace(asked, slices=tight)
    rows, _ = command.largest_rows(asked, config, dataclasses.replace(plan, topology=tight))
    assert rows >= config.batch.rows
    assert rows % 4 == 0
