"""hptjax in the form of the peer benchmark: `python hptjax_peer.py train|gen|grpo|hpt XS|S|M [--accum 4]`.

Sizes, weights, data and records are those of the harness (`common.py`), whose folder $PEER_BENCH names. It times
the product: `gen` the rollout engine, `train` assembly and the accumulated update with all its evidence, `grpo` and
`hpt` whole steps of the training loop with reward workers and metrics, without evaluations and checkpoints, of which
the peers make none either.

    grpo   8 prompts x 8 rollouts of 128 tokens, KL to a reference model (beta 0.04), one update; as the peers
    hpt    the same rollouts, half of the questions never solved, so that their demonstration is learned from; no
           reference model: what HPT does instead of GRPO
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hptjax.start import restart_with_huge_pages

if __name__ == "__main__":
    restart_with_huge_pages()  # as the command `hptjax` does

import numpy as np

sys.path.insert(0, os.environ["PEER_BENCH"])
import common  # type: ignore[import-not-found]

OPTIONS = common.args()
RECORD = common.Rec("hptjax" + OPTIONS.variant, OPTIONS.task, OPTIONS.size, accum=OPTIONS.accum)
SHAPE = common.cfg(OPTIONS.size)

from hptjax.bench.work import run_steps  # noqa: E402
from hptjax.build.policy import Policy, build_policy  # noqa: E402
from hptjax.build.stages import build_stage  # noqa: E402
from hptjax.config import Config, StageConfig  # noqa: E402
from hptjax.config_text import build  # noqa: E402
from hptjax.data.tokenizer import make_character_tokenizer  # noqa: E402
from hptjax.hpt.gate import demonstration_sample  # noqa: E402
from hptjax.records import Example, Question, Request, SampleId  # noqa: E402

FIRST = 3  # ids below are special in the tokenizer, and never in the data
# Samples of a micro-batch in the GRPO and in the HPT step, what layers keep for the backward pass there, tokens whose
# logits are held at once there, and devices of all work. Few samples stay in the caches of a CPU; those of the HPT step
# divide its 36, and have rows of their own, because half of its prompts have one sample. At M two devices would hold
# the weights, the sums and the moments twice.
WORK = {
    "XS": (8, 12, "none", 2048, 2),
    "S": (8, 12, "dots_no_batch", 4096, 2),
    "M": (8, 6, "dots_no_batch", 1280, 1),
}
HARD = 2  # every HARD-th question is never solved


def write_model(folder: Path) -> None:
    """The harness's weights as a Hugging Face folder, and a character tokenizer beside it."""
    from safetensors.numpy import save_file

    make_character_tokenizer("".join(chr(common.BASE + i) for i in range(FIRST, SHAPE["vocab"])), folder / "tokenizer")
    folder = folder / "model"
    folder.mkdir()
    save_file(common.weights(OPTIONS.size), folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": SHAPE["vocab"],
        "hidden_size": SHAPE["hidden"],
        "num_hidden_layers": SHAPE["layers"],
        "num_attention_heads": SHAPE["heads"],
        "num_key_value_heads": SHAPE["kv"],
        "intermediate_size": SHAPE["inter"],
        "rms_norm_eps": common.EPS,
        "rope_theta": common.THETA,
        "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))


def make_config(folder: Path, **sections: dict[str, Any]) -> Config:
    """A run on the harness's model; `sections` hold what the task sets."""
    total = common.PROMPT + common.NEW
    values: dict[str, Any] = {
        "name": "peer",
        "runs_dir": str(folder / "runs"),
        "model": {"path": str(folder / "model"), "tokenizer": str(folder / "tokenizer")},
        "optimizer": {"learning_rate": common.LR, "weight_decay": common.WD, "clip_norm": common.CLIP, "b2": 0.999},
        "rollout": {
            "group_size": common.GRPO_GROUP,
            "max_completion_tokens": common.NEW,
            "slots": common.GRPO_PROMPTS * common.GRPO_GROUP,
            "prefill_rows": common.GRPO_PROMPTS,
            "prompt_buckets": [common.PROMPT],
            "tokens_per_call": common.NEW,
            "cache_capacity": total,
        },
        "mesh": {"data": devices()},
        "telemetry": {"tensorboard": False, "progress": False, "plot": False},
    }
    for name, fields in sections.items():
        values[name] = {**values.get(name, {}), **fields}
    return build(Config, values, source="benchmark")


def devices() -> int:
    """CPU devices that share every batch: those of `WORK`, where there are as many cores."""
    return min(WORK[OPTIONS.size][-1], os.cpu_count() or 1)


def endless_policy(config: Config) -> Policy:
    """The policy without stop tokens, so that every rollout has exactly NEW tokens, as in every peer."""
    return dataclasses.replace(build_policy(config), stop_ids=frozenset())


def question(number: int, tokens: np.ndarray, prompt_tokens: int) -> Question:
    """A row of tokens as a question whose demonstration is the rest of it."""
    tokens = tokens.astype(np.int32)
    return Question(Example(number, "", "", {}, str(number)), tokens[:prompt_tokens], tokens[prompt_tokens:])


def time_training(folder: Path) -> None:
    """Next-token cross-entropy on rows of SEQ tokens; `accum` micro-batches make one update."""
    rows = SHAPE["bs"]
    config = make_config(
        folder,
        batch={"rows": rows, "row_tokens": common.SEQ, "max_segments": 1, "max_micro_batches": OPTIONS.accum},
        data={"max_prompt_tokens": 1, "questions_per_step": rows * OPTIONS.accum},
    )
    policy = build_policy(config)
    tokens = np.concatenate(common.train_batches(OPTIONS.size, OPTIONS.accum))
    questions = [question(number, row, 1) for number, row in enumerate(tokens)]
    stage = build_stage(config, StageConfig(method="sft", steps=1), policy, questions, index=0)
    state = stage.start({"policy": policy.params}, None)
    samples = [demonstration_sample(each) for each in questions]
    import jax

    from hptjax.sharding.mesh import put_micro_batch

    times, losses = [], []
    for _ in range(common.steps_for(OPTIONS.size, "train") + 2):
        began = time.perf_counter()
        micro_batches = stage.assemble(samples, frozenset()).micro_batches
        assert len(micro_batches) == OPTIONS.accum, len(micro_batches)
        for number, micro_batch in enumerate(micro_batches):
            placed = put_micro_batch(policy.mesh, micro_batch, policy.rules)
            state = stage.micro_step(state, placed, np.asarray(number == len(micro_batches) - 1))
        jax.block_until_ready(state)
        times.append(time.perf_counter() - began)
        losses.append(float(state.report.stats["loss/sft"].total))  # already a mean over the update's tokens
        RECORD.first_done()
    count = OPTIONS.accum * rows * common.SEQ
    RECORD.done(times[2:], warm=times[:2], losses=losses[:3], tokens=count)


def time_generation(folder: Path) -> None:
    """GEN_BATCH prompts, NEW tokens each."""
    slots = {"slots": common.GEN_BATCH, "prefill_rows": common.GEN_BATCH}
    policy = endless_policy(make_config(folder, rollout=slots))
    import jax

    prompts = common.prompts(OPTIONS.size, common.GEN_BATCH).astype(np.int32)
    times = []
    for step in range(common.steps_for(OPTIONS.size, "gen") + 1):
        requests = [
            Request(SampleId(number, step, 0), prompt, common.NEW, frozenset()) for number, prompt in enumerate(prompts)
        ]
        began = time.perf_counter()
        samples = policy.sample(policy.params, requests, jax.random.key(step))
        times.append(time.perf_counter() - began)
        RECORD.first_done()
    lengths = [len(sample.completion_tokens) for sample in samples]
    RECORD.done(times[1:], warm=times[:1], tokens=common.GEN_BATCH * common.NEW, mean_len=float(np.mean(lengths)))


def time_steps(folder: Path) -> None:
    """Whole steps of `hptjax train`, from its metrics."""
    steps = common.steps_for(OPTIONS.size, "grpo") + 1
    hpt = OPTIONS.task == "hpt"
    rng = np.random.default_rng(5)
    odd = [i for i in range(FIRST, SHAPE["vocab"]) if (common.BASE + i) & 1]
    rows = []
    for number, prompt in enumerate(common.prompts(OPTIONS.size, common.GRPO_PROMPTS, seed=10)):
        demonstration = rng.choice(odd, common.NEW - 1)  # all odd, which the reward takes for right
        answer = {"solvable": number % HARD != 0, "graded": hpt}
        rows.append({"prompt": common.to_text(prompt), "demo": common.to_text(demonstration), "answer": answer})
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = [folder / "validation.jsonl", folder / "test.jsonl"]
    for number, path in enumerate(held_out):
        path.write_text(json.dumps({"prompt": common.to_text([FIRST + number] * 3), "answer": {"graded": hpt}}) + "\n")
    total = common.PROMPT + common.NEW
    at_once, hpt_rows, remat, chunk, _ = WORK[OPTIONS.size]
    lanes = 1 if hpt else at_once // devices()  # a row for each device
    rows = hpt_rows if hpt else at_once // lanes
    os.chdir(Path(__file__).parent)  # where the reward's module lies
    config = make_config(
        folder,
        data={
            "files": [str(data)],
            "validation_files": [str(held_out[0])],
            "test_files": [str(held_out[1])],
            "format": "native",
            "max_prompt_tokens": common.PROMPT,
            "questions_per_step": common.GRPO_PROMPTS,
        },
        model={"remat": remat, "logprob_chunk_tokens": chunk},
        prompt={"template": "plain"},
        reward={"functions": [{"name": "hptjax_peer_reward:reward"}]},
        batch={
            "rows": rows,
            "row_tokens": total if hpt else common.NEW * lanes,
            "max_segments": lanes,
            "max_micro_batches": -(-common.GRPO_PROMPTS * common.GRPO_GROUP // (rows * lanes)),
            "share_prompts": not hpt,
            "lanes": lanes,
        },
        train={"steps": steps, "updates_per_rollout_batch": 1, "eval_every": 0, "rollouts_every": 0, "probe_every": 0},
        eval={"questions": 1, "samples_per_question": 1, "train_questions": 0, "ks": [1]},
        checkpoint={"every_steps": 10**6, "keep_best": 0},
        hpt={} if hpt else {"kl_coefficient": OPTIONS.beta},
    )
    config = dataclasses.replace(config, method="hpt" if hpt else "grpo")
    measured = run_steps(config, folder, warm=1, on_warm=RECORD.first_done)
    names = {"rollout": ["rollout"], "ref": ["score", "reference"], "update": ["update"], "reward": ["reward"]}
    split = {
        name: [sum(line.get(f"timing_s/{part}", 0.0) for part in parts) for line in measured[1:]]
        for name, parts in names.items()
    }
    times = [line["perf/time_per_step"] for line in measured]
    trained = [line["batch/live_rows"] for line in measured]
    length = [line["response_length/mean"] for line in measured]
    RECORD.done(times[1:], warm=times[:1], split=split, mean_len=float(np.mean(length)), trained_rows=trained)


def main() -> None:
    """One task at one size; prints the record as a line of JSON."""
    tasks = {"train": time_training, "gen": time_generation, "grpo": time_steps, "hpt": time_steps}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder)
        tasks[OPTIONS.task](folder)


if __name__ == "__main__":
    main()
