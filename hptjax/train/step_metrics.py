"""What a step says of itself, as values that `diagnostics.metrics` knows how to reduce."""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from hptjax.hpt.assemble import Update
from hptjax.hpt.gate import group_rollouts
from hptjax.records import FinishReason, Objective, Question
from hptjax.train.open_step import OpenStep
from hptjax.train.phases import Gated


def rollout_metrics(
    step: OpenStep, gated: Gated, updates: Sequence[Update], *, group_size: int, reward_names: Sequence[str]
) -> dict[str, Any]:
    """What the host knows of a step before its updates: rewards, lengths, the gate, the packing.

    Values are as `diagnostics.metrics` declares their reduction: (total, count) pairs, counts per bin, or numbers.

    Args
      reward_names: of the reward functions, in the order of a sample's verdicts.
    """
    rollouts = list(step.samples.values())
    demonstrations = sum(1 for sample in gated.live if sample.sample_id not in step.samples)
    batches = sum(len(update.micro_batches) for update in updates)
    to_sft = sum(objective == Objective.SFT for objective in gated.objectives)
    prompts = [len(question.prompt_tokens) for question in step.questions]
    row: dict[str, Any] = {
        "hpt/gate_sft_frac": (to_sft, len(step.questions)),
        "batch/failed": to_sft,
        "uni/on_data_ratio": (len(gated.live) - demonstrations, len(gated.live)),
        "uni/sft_data_ratio": (demonstrations, len(gated.live)),
        "prompt_length/mean": (sum(prompts), len(prompts)),
        "prompt_length/max": max(prompts),
        "prompt_length/min": min(prompts),
        "on_off_metrics/off_example_ratio": (demonstrations, len(gated.live)),
        "batch/live_rows": sum(len(update.samples) for update in updates),
        "batch/rollouts": len(rollouts),
        "batch/micro_batches": batches,
        "batch/fill": (sum(update.fill * len(update.micro_batches) for update in updates), batches),
    }
    if not rollouts:
        return row
    rewards = np.asarray([sample.reward for sample in rollouts], np.float64)
    lengths = np.asarray([len(sample.completion_tokens) for sample in rollouts], np.float64)
    free = [sample.reward or 0.0 for sample in rollouts if sample.prefix_len == 0]
    if len(free) < len(rollouts):
        row |= {"critic/free_score/mean": (sum(free), len(free)), "batch/continued": len(rollouts) - len(free)}
    groups = group_rollouts(rollouts).values()
    reasons = [verdict.reason for verdicts in step.verdicts.values() for verdict in verdicts]
    for place, name in enumerate(reward_names):
        values = [verdicts[place].reward for verdicts in step.verdicts.values()]
        row[f"rewards/{name}/mean"] = (sum(values), len(values))
    return (
        row
        | _advantage_metrics(updates)
        | {
            "critic/score/mean": (rewards.sum(), rewards.size),
            "critic/score/max": rewards.max(),
            "critic/score/min": rewards.min(),
            "batch/solve_none": np.sum(gated.solved == 0),
            "batch/solve_all": np.sum(gated.solved == group_size),
            "batch/solved": np.sum(gated.solved > 0),
            "group/zero_std_frac": (
                sum(len({sample.reward for sample in group}) == 1 for group in groups),
                len(groups),
            ),
            "response_length/mean": (lengths.sum(), lengths.size),
            "response_length/max": lengths.max(),
            "response_length/min": lengths.min(),
            "response_length/clip_ratio": (
                sum(sample.finish_reason == FinishReason.LENGTH for sample in rollouts),
                len(rollouts),
            ),
            "verifier/timeouts": sum(reason == "timeout" for reason in reasons),
            "verifier/failures": sum(reason == "crashed" or reason.startswith("raised") for reason in reasons),
            "hpt/rate_hist": np.bincount(np.asarray(gated.solved, np.int64), minlength=group_size + 1).tolist(),
        }
    )


def _advantage_metrics(updates: Sequence[Update]) -> dict[str, Any]:
    """Advantages of the live rollout tokens, as they were packed."""
    planes = [micro.planes["rl"] for update in updates for micro in update.micro_batches if "rl" in micro.planes]
    values = np.concatenate(
        [np.asarray(plane.advantages)[np.asarray(plane.weights) > 0] for plane in planes] or [np.zeros(0)]
    )
    if not values.size:
        return {}
    return {
        "critic/advantages/mean": (values.sum(dtype=np.float64), values.size),
        "critic/advantages/max": values.max(),
        "critic/advantages/min": values.min(),
    }


def visit_metrics(gated: Gated, questions: Sequence[Question], history: dict[str, list[int]]) -> dict[str, int]:
    """Questions whose gate decision changed since their last visit, and those that left rate 0; updates `history`.

    Args
      history: question id (text, for JSON) -> [objective, solved] of its last visit.
    """
    flips = first_solved = 0
    for question, objective, solved in zip(questions, gated.objectives, gated.solved, strict=True):
        last = history.get(str(question.question_id))
        if last is not None:
            flips += int(last[0] != int(objective))
            first_solved += int(last[1] == 0 and solved > 0)
        history[str(question.question_id)] = [int(objective), int(solved)]
    return {"hpt/flips": flips, "hpt/first_solved": first_solved}


def staleness_metrics(step: OpenStep) -> dict[str, int]:
    """How old the samples are that a step has learnt from: steps and optimizer updates since their weights."""
    if step.weights is None:
        return {"rollout/staleness": 0, "rollout/staleness_updates": 0}
    steps, updates = step.weights
    first = step.ledger_rows[0]
    before = first["optimizer_step"] - int(first["status"] == "updated")
    return {"rollout/staleness": step.step - steps, "rollout/staleness_updates": before - updates}


def merge_stats(totals: dict[str, list[float]], stats: Mapping[str, Any]) -> None:
    """Adds sums and counts, and takes the larger peak, over the updates of a step.

    A term of the objective has its denominators in its weights: what its micro-batches add up to is the update's value,
    which counts once, however many they were.
    """
    for name, stat in stats.items():
        leaves = [float(leaf) for leaf in jax.tree.leaves(stat)]
        if name.startswith("loss/"):
            leaves[1] = 1.0
        before = totals.get(name)
        if before is None:
            totals[name] = leaves
        elif len(leaves) == 1:
            totals[name] = [max(before[0], leaves[0])]
        else:
            totals[name] = [before[0] + leaves[0], before[1] + leaves[1]]


def update_metrics(
    step: OpenStep, updates: Sequence[Update], seconds: Mapping[str, float], beside: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """What the updates of a step say: losses, norms, the witness, times and throughput.

    Args
      seconds: of the main thread, by phase; they make up the step's time. beside: of the step's rollouts and verdicts,
        where they were made beside the step before; what the main thread has not waited for of it was hidden.
    """
    row: dict[str, Any] = {
        name: parts[0] if len(parts) == 1 else (parts[0], parts[1])
        for name, parts in step.stats.items()
        if len(parts) == 1 or parts[1] > 0  # what no token was counted for is absent, not NaN
    }
    rows = step.ledger_rows
    trained = sum(int(update.planned_tokens.sum()) for update in updates)
    generated = sum(len(sample.completion_tokens) - sample.prefix_len for sample in step.samples.values())
    contexts = {  # each different one is prefilled once
        (sample.sample_id.question, sample.prefix_len): len(sample.prompt_tokens) + sample.prefix_len
        for sample in step.samples.values()
        if sample.prefix_len < len(sample.completion_tokens)
    }
    row |= {
        **{
            f"{'actor' if name == 'policy' else name}/grad_norm": max(entry["grad_norm"][name] for entry in rows)
            for name in rows[0]["grad_norm"]
        },
        "actor/lr": rows[-1]["learning_rate"],
        "actor/skipped_updates": sum(entry["status"] != "updated" for entry in rows),
        "witness/ok": int(all(entry["witness_ok"] for entry in rows)),
        "train/optimizer_step": rows[-1]["optimizer_step"],
        "train/updates": len(rows),
        "perf/trained_tokens": trained,
        "perf/generated_tokens": generated,
        "perf/total_num_tokens": trained + generated,
        "perf/cpu_memory_used_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "perf/packed_tokens": sum(update.packed_tokens for update in updates),
        "perf/prefilled_tokens": sum(contexts.values()),
        "perf/time_per_step": sum(seconds.values()),
        "perf/throughput": (trained + generated, sum(seconds.values()) * jax.device_count()),
        "perf/update_tokens_per_s": (trained, seconds["update"]),
    }
    checked = [entry["checksum"] for entry in rows if entry["checksum"] is not None]
    if checked:
        row["witness/checksum"] = max(checked)
    if "rollout" in seconds and (beside or step.weights is None):  # else they were made before a stop
        row["perf/rollout_tokens_per_s"] = (generated, (beside or seconds)["rollout"])
    if beside:
        row["perf/rollout_ahead_s"] = max(sum(beside.values()) - seconds["rollout"], 0.0)
    return row | {f"timing_s/{name}": value for name, value in seconds.items()}
