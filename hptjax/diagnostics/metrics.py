"""The one table of metric names: how each is reduced, its unit, and what it means.

A name is reduced as its row says, never by what it looks like. Names follow verl where it has one (users of HPT and
LUFFY come from there), `hpt/`, `grad/`, `group/`, `rollout/` and `witness/` are ours. `<...>` in a name stands for one
part that varies: `<n>` and `<k>` for a number, `<split>` for train, validation or test, any other for text without a
slash.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hptjax.masked import ratio


class Reduction(enum.Enum):
    """How the values of a metric from several phases, micro-batches, updates or processes become one."""

    SUM_RATIO = "sum_ratio"  # values are (total, count) pairs: both are added, then divided once
    SUM = "sum"
    MAX = "max"
    MIN = "min"
    LAST = "last"
    HISTOGRAM = "histogram"  # values are counts per bin, added bin by bin; shown as <name>_0, <name>_1, ...


@dataclasses.dataclass(frozen=True)
class Metric:
    """A row of the table."""

    name: str
    reduction: Reduction
    unit: str
    meaning: str


SUM_RATIO, SUM, MAX, MIN, LAST, HISTOGRAM = Reduction

METRICS: tuple[Metric, ...] = (
    # rewards and groups
    Metric("critic/score/mean", SUM_RATIO, "reward", "reward of a rollout, mean over the step's rollouts"),
    Metric("critic/free_score/mean", SUM_RATIO, "reward", "reward of rollouts that continue no prefix, where some do"),
    Metric("critic/score/max", MAX, "reward", "largest reward of a rollout"),
    Metric("critic/score/min", MIN, "reward", "smallest reward of a rollout"),
    Metric("critic/advantages/mean", SUM_RATIO, "reward", "advantage of a live rollout token, mean over tokens"),
    Metric("critic/advantages/max", MAX, "reward", "largest advantage"),
    Metric("critic/advantages/min", MIN, "reward", "smallest advantage"),
    Metric("critic/values/mean", SUM_RATIO, "reward", "the critic's value at sampling weights, mean over its tokens"),
    Metric("critic/returns/mean", SUM_RATIO, "reward", "what the critic is fitted to, mean over its tokens"),
    Metric("critic/vf_explained_var", LAST, "share", "variance of the returns that the critic's values explain"),
    Metric("critic/grad_norm", MAX, "1", "norm of the critic's summed gradient before clipping"),
    Metric("rewards/<function>/mean", SUM_RATIO, "reward", "one reward function's value before its weight, mean"),
    Metric("group/zero_std_frac", SUM_RATIO, "share of groups", "groups whose rollouts all have the same reward"),
    Metric("verifier/timeouts", SUM, "completions", "verdicts cut off at the deadline; reward 0"),
    Metric("verifier/failures", SUM, "completions", "verifiers that raised or crashed; reward 0"),
    # the batch
    Metric("batch/solve_none", SUM, "questions", "questions of which no rollout is solved"),
    Metric("batch/solve_all", SUM, "questions", "questions of which every rollout is solved"),
    Metric("batch/solved", SUM, "questions", "questions of which at least one rollout is solved"),
    Metric("batch/failed", SUM, "questions", "questions that the gate sends to SFT"),
    Metric("batch/live_rows", SUM, "samples", "samples that the updates learn from"),
    Metric("batch/rollouts", SUM, "samples", "samples that were rolled out"),
    Metric("batch/continued", SUM, "samples", "rollouts that continue a demonstration's prefix, or are all of it"),
    Metric("batch/micro_batches", SUM, "micro-batches", "forward and backward passes"),
    Metric("batch/fill", SUM_RATIO, "share of positions", "packed positions over all positions of the micro-batches"),
    Metric("response_length/mean", SUM_RATIO, "tokens", "completion length of a rollout, mean"),
    Metric("response_length/max", MAX, "tokens", "longest completion"),
    Metric("response_length/min", MIN, "tokens", "shortest completion"),
    Metric("response_length/clip_ratio", SUM_RATIO, "share of rollouts", "completions that met their limit"),
    Metric("prompt_length/mean", SUM_RATIO, "tokens", "prompt length, mean over questions"),
    Metric("prompt_length/max", MAX, "tokens", "longest prompt"),
    Metric("prompt_length/min", MIN, "tokens", "shortest prompt"),
    # the gate
    Metric("hpt/gate_sft_frac", SUM_RATIO, "share of questions", "questions that learn from their demonstration"),
    Metric("hpt/rate_hist", HISTOGRAM, "questions", "questions by the number of their rollouts that are solved"),
    Metric("hpt/rate_hist_<n>", SUM, "questions", "questions of which exactly n rollouts are solved"),
    Metric("hpt/flips", SUM, "questions", "questions whose gate decision changed since their last visit"),
    Metric("hpt/first_solved", SUM, "questions", "questions that left rate 0 since their last visit"),
    Metric("uni/on_data_ratio", SUM_RATIO, "share of samples", "live samples that are rollouts"),
    Metric("uni/sft_data_ratio", SUM_RATIO, "share of samples", "live samples that are demonstrations trained by SFT"),
    Metric(
        "on_off_metrics/off_example_ratio", SUM_RATIO, "share of samples", "live samples that the policy did not write"
    ),
    # losses and gradients
    Metric("loss/<term>", SUM_RATIO, "weighted nats", "value of one term of the objective, mean over updates"),
    Metric("sft/loss", SUM_RATIO, "nats per token", "-log p of demonstration tokens under the policy"),
    Metric("actor/entropy", SUM_RATIO, "nats per token", "entropy of the policy on live tokens"),
    Metric("actor/entropy_coefficient", LAST, "1", "coefficient of the entropy bonus in use, where it is steered"),
    Metric("actor/rollout_nll", SUM_RATIO, "nats per token", "-log p of rollout tokens under the policy"),
    Metric("actor/pg_clipfrac", SUM_RATIO, "share of tokens", "rollout tokens that the stability mask takes out"),
    Metric("actor/ppo_kl", SUM_RATIO, "nats per token", "log p at sampling time minus log p now, on rollout tokens"),
    Metric("actor/kl_loss", SUM_RATIO, "nats per token", "KL to the reference policy, by its k3 estimate"),
    Metric(
        "actor/grad_norm", MAX, "1", "norm of the summed gradient before clipping; the largest of the step's updates"
    ),
    Metric("actor/lr", LAST, "1", "learning rate of the last update"),
    Metric("actor/skipped_updates", SUM, "updates", "updates that were not applied: empty, not finite, or too large"),
    Metric("grad/norm_<term>", LAST, "1", "norm of one term's own summed gradient: norm_sft, norm_rl; every n steps"),
    Metric("grad/cos_sft_rl", LAST, "1", "cosine between the summed SFT and RL gradients; every n steps"),
    # evidence
    Metric(
        "witness/checksum",
        MAX,
        "ratio",
        "largest gap between a leaf's gradient sum and its checksum, as a share of what rounding may cause",
    ),
    Metric("witness/ok", MIN, "0 or 1", "1 where every update was the sum of all its micro-batches, once each"),
    Metric("actor/prefix_nll", SUM_RATIO, "nats", "negative log-prob of forced prefixes, mean over tokens"),
    Metric("rollout/logp_diff_mean", SUM_RATIO, "nats", "distance of sampler and trainer log-probs, mean over tokens"),
    Metric(
        "rollout/logp_diff_max",
        MAX,
        "nats",
        "the largest such distance; above 1e-4 in fp32 without int8 is an alarm, but for stale samples",
    ),
    Metric("rollout/staleness", MAX, "steps", "steps between the weights that drew the samples and those that learn"),
    Metric("rollout/staleness_updates", MAX, "updates", "the same in optimizer updates, up to the step's first one"),
    # progress, time, speed
    Metric("train/stage", LAST, "index", "which stage of the run the step belongs to, 0 upwards"),
    Metric("train/updates", SUM, "updates", "optimizer updates of the step, applied or not"),
    Metric("train/optimizer_step", LAST, "updates", "updates applied since the start of the run"),
    Metric(
        "timing_s/<phase>",
        SUM,
        "s",
        "time in one phase of the step; checkpoint: of the save before it; other: what is in no phase",
    ),
    Metric("perf/time_per_step", SUM, "s", "time of the whole step, with the save before it"),
    Metric("perf/total_num_tokens", SUM, "tokens", "tokens generated and trained on"),
    Metric("perf/trained_tokens", SUM, "tokens", "live tokens of the step's updates"),
    Metric("perf/generated_tokens", SUM, "tokens", "tokens that the rollout wrote"),
    Metric("perf/prefilled_tokens", SUM, "tokens", "prompt tokens that the rollout prefilled, once per group"),
    Metric("perf/packed_tokens", SUM, "tokens", "positions of the updates that hold a token, live or context"),
    Metric("perf/throughput", SUM_RATIO, "tokens/s/device", "tokens of the step over its time and devices"),
    Metric("perf/rollout_tokens_per_s", SUM_RATIO, "tokens/s", "generated tokens over the time of the rollout"),
    Metric(
        "perf/rollout_ahead_s",
        SUM,
        "s",
        "time of the step's rollouts and verdicts that passed while the step before was trained; in no timing_s/",
    ),
    Metric("perf/update_tokens_per_s", SUM_RATIO, "tokens/s", "trained tokens over the time of the updates"),
    Metric("perf/cpu_memory_used_gb", MAX, "GB", "largest resident set of this process so far"),
    # evaluation
    Metric("<split>/pass@<k>", LAST, "share of questions", "pass@k without bias, mean over the split's questions"),
    Metric("<split>/pass@<k>_se", LAST, "share of questions", "its question-level standard error"),
    Metric("<split>/pass@<k>_low", LAST, "share of questions", "lower end of its 95 % interval"),
    Metric("<split>/pass@<k>_high", LAST, "share of questions", "upper end of its 95 % interval"),
    Metric("<split>/solve_none", LAST, "share of questions", "questions of which no sample is solved"),
    Metric("<split>/response_length", LAST, "tokens", "completion length in the evaluation, mean"),
    Metric("<split>/length_clip_ratio", LAST, "share of samples", "completions of the evaluation that met their limit"),
    Metric("probe/heldout_demo_nll", LAST, "nats per token", "-log p of held-out demonstrations, token-weighted"),
)

HOLES = {"n": r"\d+", "k": r"\d+", "split": "(?:train|validation|test)"}  # any other is text without a slash


def lookup(name: str) -> Metric:
    """The row of a metric. Raises: no such name -> ValueError with the nearest one."""
    exact, patterns = index()
    if name in exact:
        return exact[name]
    for pattern, metric in patterns:
        if pattern.fullmatch(name):
            return metric
    near = difflib.get_close_matches(name, [metric.name for metric in METRICS], n=1, cutoff=0.0)
    raise ValueError(
        f"expected a metric of the table in hptjax/diagnostics/metrics.py, got '{name}'; did you mean '{near[0]}'?"
    )


@functools.cache
def index() -> tuple[dict[str, Metric], list[tuple[re.Pattern[str], Metric]]]:
    """The rows by exact name, and those with a part that varies as patterns of the whole name."""
    exact = {metric.name: metric for metric in METRICS if "<" not in metric.name}
    patterns = [(pattern_of(metric.name), metric) for metric in METRICS if "<" in metric.name]
    return exact, patterns


def pattern_of(name: str) -> re.Pattern[str]:
    """A name with `<...>` parts as a regular expression of the whole name."""
    parts = re.split(r"<(\w+)>", name)  # text and placeholders take turns
    texts = [re.escape(part) for part in parts[::2]]
    holes = [HOLES.get(part, r"[^/]+") for part in parts[1::2]]
    return re.compile("".join(text + hole for text, hole in zip(texts, [*holes, ""], strict=True)))


def check_names(names: Iterable[str]) -> None:
    """Raises ValueError at the first name that the table does not have."""
    for name in names:
        lookup(name)


def merge(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """One row of figures from the rows of several phases, micro-batches or updates; a name may be in any of them.

    Args
      rows: name -> (total, count) for `sum_ratio`, a sequence of counts for `histogram`, a number for the others.
    Returns name -> figure; a histogram becomes one entry per bin; NaN where a `sum_ratio` counted nothing.
    Raises: a name that the table does not have, or a value that its reduction does not take -> ValueError.
    """
    values: dict[str, list[Any]] = {}
    for row in rows:
        for name, value in row.items():
            values.setdefault(name, []).append(value)
    merged: dict[str, float] = {}
    for name, parts in values.items():
        merged |= reduce(name, lookup(name).reduction, parts)
    return merged


def reduce(name: str, reduction: Reduction, parts: Sequence[Any]) -> dict[str, float]:
    """The values of one metric as its figures."""
    if reduction is SUM_RATIO:
        if any(not isinstance(part, tuple | list) or len(part) != 2 for part in parts):
            raise ValueError(f"'{name}' is a {reduction.value}: expected (total, count) pairs, got {list(parts)}")
        return {name: ratio(sum(total for total, _ in parts), sum(count for _, count in parts))}
    if reduction is HISTOGRAM:
        if len({len(part) for part in parts}) != 1:
            raise ValueError(f"'{name}' is a {reduction.value}: expected counts of the same bins, got {list(parts)}")
        return {f"{name}_{place}": float(sum(counts)) for place, counts in enumerate(zip(*parts, strict=True))}
    numbers = [float(part) for part in parts]
    combine: dict[Reduction, Callable[[Sequence[float]], float]] = {
        SUM: sum,
        MAX: largest,
        MIN: smallest,
        LAST: last,
    }
    return {name: combine[reduction](numbers)}


def largest(numbers: Sequence[float]) -> float:
    """The largest, or NaN where any of them is: a NaN must not hide behind the order of the phases."""
    return next((number for number in numbers if number != number), max(numbers))


def smallest(numbers: Sequence[float]) -> float:
    """The smallest, or NaN where any of them is."""
    return next((number for number in numbers if number != number), min(numbers))


def last(numbers: Sequence[float]) -> float:
    """The last one."""
    return numbers[-1]


def as_markdown() -> str:
    """The table for the docs."""
    lines = ["| metric | reduction | unit | meaning |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| `{m.name}` | {m.reduction.value} | {m.unit} | {m.meaning} |" for m in METRICS])
