"""Targets for the tests of `hptjax audit`: trainers with one mistake each, and functions that are none."""

from __future__ import annotations

import dataclasses
import itertools
import sys

import numpy as np

from hptjax.audit.job import Gradients, Job, LinearBatch, Unsupported, accepts
from hptjax.audit.problems import ROWS
from hptjax.audit.reference import clipped, live_tokens, summed_gradient
from hptjax.audit.simulated import mean_of_means, train

CALLS = itertools.count()


def bfloat16(values):
    """The values rounded to 8 significant bits, to even."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def token_mean(parts, counts, ranks):
    return np.sum(parts, axis=0) / np.float32(sum(counts))


def right(job: Job):
    return train(job, token_mean)


@accepts("tokens")
def right_tokens(job: Job):
    return train(job, token_mean)


def right_gradients(job: Job):
    """Of the linear model, whose gradient does not depend on the parameters."""
    means = [
        token_mean([summed_gradient(batch, job.parameters) for batch in window], counts_of(window), 1)
        for window in job.windows
    ]
    return Gradients([clipped(mean, job.clip_norm) for mean in means])


def skips_nan(job: Job):
    theta, after = job.parameters, []
    for window, rate in zip(job.windows, job.learning_rates, strict=False):
        gradient = token_mean([summed_gradient(batch, theta) for batch in window], counts_of(window), 1)
        if np.all(np.isfinite(gradient)):
            theta = theta - np.float32(rate) * clipped(gradient, job.clip_norm).astype(np.float32)
        after.append(theta)
    return after


def refuses_nan(job: Job):
    after = right(job)
    if not np.all(np.isfinite(after)):
        raise FloatingPointError("loss is NaN\nsecond line")
    return after


def counts_of(window):
    return [int(live_tokens(batch).sum()) for batch in window]


def repeated(job: Job):
    def combine(parts, counts, ranks):
        again = parts[ranks : 2 * ranks] if len(parts) > 2 * ranks else []
        return token_mean([*parts, *again], counts, ranks)

    return train(job, combine)


def first_missing_and_renormalised(job: Job):
    def combine(parts, counts, ranks):
        return token_mean(parts[ranks:] or parts, counts[ranks:] or counts, ranks)

    return train(job, combine)


def first_and_last_mean_of_means(job: Job):
    def combine(parts, counts, ranks):
        kept = [
            part if min(i // ranks, len(parts) // ranks - 1 - i // ranks) == 0 else 0 * part
            for i, part in enumerate(parts)
        ]
        return mean_of_means(kept, counts, ranks)

    return train(job, combine)


def extra_k(job: Job):
    return train(job, lambda parts, counts, ranks: token_mean(parts, counts, ranks) / np.float32(len(parts) // ranks))


def missing_k(job: Job):
    return train(job, lambda parts, counts, ranks: token_mean(parts, counts, ranks) * np.float32(len(parts) // ranks))


def sum_of_means(job: Job):
    return train(
        job, lambda parts, counts, ranks: mean_of_means(parts, counts, ranks) * np.float32(len(parts) // ranks)
    )


def extra_ranks(job: Job):
    return train(job, lambda parts, counts, ranks: token_mean(parts, counts, ranks) / np.float32(ranks))


def missing_ranks(job: Job):
    return train(job, lambda parts, counts, ranks: token_mean(parts, counts, ranks) * np.float32(ranks))


def rank_means(job: Job):
    def combine(parts, counts, ranks):
        return np.sum([token_mean(parts[r::ranks], counts[r::ranks], 1) for r in range(ranks)], axis=0) / np.float32(
            ranks
        )

    return train(job, combine)


def last_added_after_all_reduce(job: Job):
    """Worker 0 of DeepSpeed#7985: its own share of the last micro-batch, everybody's of the others."""

    def combine(parts, counts, ranks):
        return token_mean([*parts[:-ranks], parts[-ranks]], counts, ranks)

    return train(job, combine)


def plain_sum(job: Job):
    return train(job, lambda parts, counts, ranks: np.sum(parts, axis=0))


def half(job: Job):
    return train(job, lambda parts, counts, ranks: token_mean(parts, counts, ranks) * np.float32(0.77))


def padding_counted(job: Job):
    slots = job.windows[0][0].mask.size

    def combine(parts, counts, ranks):
        return np.sum(parts, axis=0) / np.float32(slots * len(parts) // ranks)

    return train(job, combine)


def bfloat16_sum(job: Job):
    def combine(parts, counts, ranks):
        total = np.zeros_like(parts[0])
        for part in parts:
            total = bfloat16(total + bfloat16(part))
        return total / np.float32(sum(counts))

    return train(job, combine)


@accepts("tokens")
def bfloat16_sum_tokens(job: Job):
    return bfloat16_sum(job)


def clip_before_sum(job: Job):
    def combine(parts, counts, ranks):
        return token_mean([clipped(part, job.clip_norm) for part in parts], counts, ranks)

    return train(without_clip(job), combine)


def clip_shares(job: Job):
    def combine(parts, counts, ranks):
        return np.sum([clipped(part / np.float32(sum(counts)), job.clip_norm) for part in parts], axis=0)

    return train(without_clip(job), combine)


def clip_never(job: Job):
    return train(without_clip(job), token_mean)


def clip_before_division(job: Job):
    def combine(parts, counts, ranks):
        return clipped(np.sum(parts, axis=0), job.clip_norm) / np.float32(sum(counts))

    return train(without_clip(job), combine)


def without_clip(job: Job) -> Job:
    return dataclasses.replace(job, clip_norm=None)


def schedule_per_micro_batch(job: Job):
    k, last = len(job.windows[0]), len(job.learning_rates) - 1
    rates = [job.learning_rates[min(s * k + k - 1, last)] for s in range(len(job.windows))]
    return train(dataclasses.replace(job, learning_rates=tuple(rates)), token_mean)


def one_rate(job: Job):
    rates = (job.learning_rates[0],) * len(job.windows)
    return train(dataclasses.replace(job, learning_rates=rates), token_mean)


def linear_loop(job: Job, change):
    """Parameters after every update; `change(s, window's mean gradient, theta)` is what an update subtracts."""
    theta, after = job.parameters, []
    for s, window in enumerate(job.windows):
        mean = token_mean([summed_gradient(batch, theta) for batch in window], counts_of(window), 1)
        theta = (theta - np.float32(job.learning_rates[s]) * change(s, clipped(mean, job.clip_norm), theta)).astype(
            np.float32
        )
        after.append(theta)
    return after


def never_reset(job: Job):
    sums = np.zeros_like(job.parameters)

    def change(s, mean, theta):
        nonlocal sums
        sums = sums + mean
        return sums

    return linear_loop(job, change)


def momentum(job: Job):
    velocity = np.zeros_like(job.parameters)

    def change(s, mean, theta):
        nonlocal velocity
        velocity = np.float32(0.9) * velocity + mean
        return velocity

    return linear_loop(job, change)


def weight_decay(job: Job):
    return linear_loop(job, lambda s, mean, theta: mean + np.float32(0.01) * theta)


def noise(job: Job):
    rng = np.random.default_rng(1)
    return linear_loop(job, lambda s, mean, theta: mean + rng.normal(scale=1e-3, size=theta.shape).astype(np.float32))


def small_noise(job: Job):
    rng = np.random.default_rng(1)
    return linear_loop(job, lambda s, mean, theta: mean + rng.normal(scale=1e-5, size=theta.shape).astype(np.float32))


def not_deterministic(job: Job):
    shift = np.float32(1 + 1e-6 * (next(CALLS) % 2))
    return linear_loop(job, lambda s, mean, theta: mean * shift)


def adam(job: Job):
    """Right accumulation, Adam with its usual constants: the update is normalised entry by entry."""
    return adam_loop(job, token_mean)


def adam_mean_of_means(job: Job):
    return adam_loop(job, mean_of_means)


def adam_first_and_last(job: Job):
    return adam_loop(job, lambda parts, counts, ranks: token_mean([parts[0], *parts[1:][-1:]], counts, ranks))


@accepts("tokens", own_optimizer=True)
def adam_tokens(job: Job):
    return adam_loop(job, token_mean)


@accepts("tokens", own_optimizer=True)
def adam_tokens_mean_of_means(job: Job):
    return adam_loop(job, mean_of_means)


def adam_loop(job: Job, combine):
    theta, after = job.parameters.astype(np.float64), []
    first, second = np.zeros_like(theta), np.zeros_like(theta)
    for s, window in enumerate(job.windows):
        gradient = combine([summed_gradient(batch, theta) for batch in window], counts_of(window), 1)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        theta = theta - 0.01 * (first / (1 - 0.9 ** (s + 1))) / (np.sqrt(second / (1 - 0.999 ** (s + 1))) + 1e-8)
        after.append(theta.astype(np.float32))
    return after


def drops_short_window(job: Job):
    after = right(job)
    return after[:-1] if len(job.windows[-1]) < len(job.windows[0]) else after


def leaves_short_window(job: Job):
    after = right(job)
    return [*after[:-1], after[-2]] if len(job.windows[-1]) < len(job.windows[0]) else after


def boundary_one_late(job: Job):
    """The first micro-batch of every next window is taken for the last of this one."""
    if len(job.windows[0]) == 1:
        return right(job)
    stream = [batch for window in job.windows for batch in window]
    lengths = [len(window) for window in job.windows]
    ends = [min(end + 1, len(stream)) for end in itertools.accumulate(lengths)]
    windows = tuple(tuple(stream[a:b]) for a, b in itertools.pairwise([0, *ends]))
    return train(dataclasses.replace(job, windows=windows), token_mean)


def update_per_micro_batch(job: Job):
    windows = tuple((batch,) for window in job.windows for batch in window)
    rates = (1.0,) * len(windows)
    return train(dataclasses.replace(job, windows=windows, learning_rates=rates), token_mean)


def masked(job: Job, change_mask):
    windows = tuple(
        tuple(LinearBatch(batch.features, change_mask(batch.mask), batch.index, batch.is_last) for batch in window)
        for window in job.windows
    )
    return train(dataclasses.replace(job, windows=windows), token_mean)


def last_token_masked(job: Job):
    return masked(job, lambda mask: mask & np.pad(mask, ((0, 0), (0, 1)))[:, 1:])


def prompt_trained(job: Job):
    return masked(job, lambda mask: mask | np.pad(mask, ((0, 0), (0, 1)))[:, 1:])


@accepts("tokens")
def padding_trained(job: Job):
    """Labels are the inputs, padding and prompts included."""
    windows = tuple(
        tuple(dataclasses.replace(batch, labels=batch.input_ids) for batch in window) for window in job.windows
    )
    return train(dataclasses.replace(job, windows=windows), token_mean)


def sequence_mean(job: Job):
    """Every row by its own tokens, then by the number of rows: the linear model."""
    theta, after = job.parameters, []
    for window, rate in zip(job.windows, job.learning_rates, strict=False):
        rows = [
            batch.features[row][mask].sum(axis=0) / np.float32(mask.sum())
            for batch in window
            for row, mask in enumerate(batch.mask)
            if mask.any()
        ]
        theta = theta - np.float32(rate) * clipped(np.sum(rows, axis=0) / np.float32(len(rows)), job.clip_norm)
        after.append(theta.astype(np.float32))
    return after


def poisoned_sums(job: Job):
    """Sums that are reset by a multiplication, as `optax.MultiSteps` does; returns the gradients."""
    sums, applied = np.zeros_like(job.parameters), []
    for window in job.windows:
        for batch in window:
            sums = sums + summed_gradient(batch, job.parameters)
        applied.append(clipped(sums / np.float32(sum(counts_of(window))), job.clip_norm))
        sums = sums * np.float32(0)
    return Gradients(applied)


def zero_filled(job: Job):
    def combine(parts, counts, ranks):
        return token_mean(
            [part if np.all(np.isfinite(part)) else 0 * np.nan_to_num(part) for part in parts], counts, ranks
        )

    return train(job, combine)


def stale_after_skip(job: Job):
    """Skips the update of a window with a NaN, but keeps what came before it in the sums."""
    theta, after, kept = job.parameters, [], []
    for window, rate in zip(job.windows, job.learning_rates, strict=False):
        parts = [summed_gradient(batch, theta) for batch in window]
        good = list(itertools.takewhile(lambda part: np.all(np.isfinite(part)), parts))
        if len(good) == len(parts):
            gradient = clipped(token_mean([*kept, *good], counts_of(window), 1), job.clip_norm)
            theta, kept = theta - np.float32(rate) * gradient.astype(np.float32), []
        else:
            kept = good
        after.append(theta)
    return after


def moves_early(job: Job):
    gradients = right_gradients(job)
    return Gradients(gradients.applied, between=[0.1 * gradient for gradient in gradients.applied])


def constant(job: Job):
    return [job.parameters - np.float32(s + 1) for s in range(len(job.windows))]


def nothing(job: Job):
    return [job.parameters for _ in job.windows]


def raises(job: Job):
    raise KeyError("theta")


def leaves(job: Job):
    raise SystemExit(0)


def returns_none(job: Job):
    return None


def returns_dict(job: Job):
    return {"theta": right(job)}


def returns_trees(job: Job):
    return [{"theta": array} for array in right(job)]


def returns_one_array(job: Job):
    return right(job)[-1]


def returns_generator(job: Job):
    return (array for array in right(job))


def returns_ints(job: Job):
    return [array.astype(np.int32) for array in right(job)]


def returns_complex(job: Job):
    return [array.astype(np.complex64) for array in right(job)]


def returns_objects(job: Job):
    return [array.astype(object) for array in right(job)]


def returns_float16(job: Job):
    return [array.astype(np.float16) for array in right(job)]


def returns_column(job: Job):
    return [array[:, None] for array in right(job)]


def returns_ragged_lists(job: Job):
    return [[1.0, [2.0]] for _ in job.windows]


def returns_too_few(job: Job):
    return right(job)[:1] if len(job.windows) > 1 else []


def returns_same_array(job: Job):
    theta, after = job.parameters.copy(), []
    for array in right(job):
        theta[:] = array
        after.append(theta)
    return after


def writes_into_batches(job: Job):
    after = right(job)
    features = job.windows[0][0].features
    features.setflags(write=True)
    features[:] = 0
    return after


def clean_nan(job: Job):
    return [array * np.float32(np.nan) for array in right(job)]


def supports_nothing(job: Job):
    raise Unsupported("this one cannot do anything")


def one_worker(job: Job):
    if job.ranks > 1:
        raise Unsupported("one worker only")
    return right(job)


def pairs_only(job: Job):
    if max(map(len, job.windows)) > 2:
        raise Unsupported("at most 2 micro-batches")
    return right(job)


def whole_windows_only(job: Job):
    """An own optimizer that never accumulates."""
    if max(map(len, job.windows)) > 1:
        raise Unsupported("no accumulation")
    return adam(job)


def third_call_raises():
    """A target that fails once, at its third job: that of the self-check."""
    calls = itertools.count(1)

    def target(job: Job):
        if next(calls) == 3:
            raise RuntimeError("third call")
        return right(job)

    return target


def bfloat16_parameters(job: Job):
    """Keeps its parameters as asked, sums in float32."""
    round_off = bfloat16 if job.parameter_dtype == "bfloat16" else np.asarray
    theta, after = round_off(job.parameters), []
    for s, window in enumerate(job.windows):
        mean = token_mean([summed_gradient(batch, theta) for batch in window], counts_of(window), 1)
        theta = round_off(theta - np.float32(job.learning_rates[s]) * clipped(mean, job.clip_norm).astype(np.float32))
        after.append(theta)
    return after


def bfloat16_sum_in_float32_parameters(job: Job):
    """Ignores what parameters are asked for, and sums in bfloat16 where they are."""
    return bfloat16_sum(job) if job.parameter_dtype == "bfloat16" else right(job)


def window_loop(job: Job, combine):
    """Parameters after every update; `combine(s, window's summed gradients, kept)` is the window's sum."""
    theta, after, kept = job.parameters, [], {}
    for s, window in enumerate(job.windows):
        total = combine([summed_gradient(batch, theta) for batch in window], kept)
        mean = clipped(np.asarray(total / np.float32(sum(counts_of(window)))), job.clip_norm).astype(np.float32)
        theta = (theta - np.float32(job.learning_rates[s]) * mean).astype(np.float32)
        after.append(theta)
    return after


def stale_after_short(job: Job):
    """Sums are reset only after windows that are not shorter than the one before."""

    def combine(parts, kept):
        total = np.sum(parts, axis=0) + kept.get("sums", np.float32(0))
        kept["sums"] = total if len(parts) < kept.get("k", 0) else np.float32(0)
        kept["k"] = len(parts)
        return total

    return window_loop(job, combine)


def tail_lost_after_short(job: Job):
    """A window that is longer than the one before is read to the length of the one before."""

    def combine(parts, kept):
        length, kept["k"] = kept.get("k", len(parts)), len(parts)
        return np.sum(parts[:length], axis=0)

    return window_loop(job, combine)


def previous_count(job: Job):
    """Divides by the token count of the window before."""
    counts = [sum(counts_of(window)) for window in job.windows]
    parts = iter([counts[0], *counts[:-1]])
    return train(job, lambda sums, _, ranks: np.sum(sums, axis=0) / np.float32(next(parts)))


@accepts("tokens")
def step_per_micro_batch(job: Job):
    """The right sum of gradients, each taken at the parameters that the one before has left."""
    if job.clip_norm is not None:
        return right(job)
    theta, after = job.parameters.astype(np.float64), []
    for window, rate in zip(job.windows, job.learning_rates, strict=False):
        for batch in window:
            theta = theta - rate * summed_gradient(batch, theta) / sum(counts_of(window))
        after.append(theta.astype(np.float32))
    return after


def masked_a_little(job: Job):
    """Masked positions with 1 % of the weight of live ones; the linear model's gradient adds up as it likes."""
    extra, after = np.zeros_like(job.parameters), []
    for window, updated, rate in zip(job.windows, right(job), job.learning_rates, strict=False):
        for batch in window:
            extra = extra + np.float32(0.01 * rate / sum(counts_of(window))) * batch.features[~batch.mask].sum(axis=0)
        after.append((updated - extra).astype(np.float32))
    return after


def momentum_one_percent(job: Job):
    velocity = np.zeros_like(job.parameters)

    def change(s, mean, theta):
        nonlocal velocity
        velocity = np.float32(0.01) * velocity + mean
        return velocity

    return linear_loop(job, change)


def one_percent_too_much(job: Job):
    return train(job, lambda parts, counts, ranks: token_mean(parts, counts, ranks) * np.float32(1.01))


def second_at_99_percent(job: Job):
    def combine(parts, counts, ranks):
        weighted = [part * np.float32(0.99 if i // ranks == 1 else 1) for i, part in enumerate(parts)]
        return token_mean(weighted, counts, ranks)

    return train(job, combine)


def rates_too_high(job: Job):
    """Rates 1.5 % above a schedule that is not constant."""
    high = len(set(job.learning_rates)) > 1
    rates = tuple(rate * (1.015 if high else 1) for rate in job.learning_rates)
    return train(dataclasses.replace(job, learning_rates=rates), token_mean)


def row_weighted_means(job: Job):
    """verl#5625: means over the micro-batches' tokens, weighted by their rows."""
    theta, after = job.parameters, []
    for window, rate in zip(job.windows, job.learning_rates, strict=False):
        rows = [int(batch.mask.any(axis=1).sum()) for batch in window]
        means = [
            summed_gradient(batch, theta) * np.float32(n / max(count, 1))
            for batch, n, count in zip(window, rows, counts_of(window), strict=True)
        ]
        gradient = clipped(np.sum(means, axis=0) / np.float32(sum(rows)), job.clip_norm)
        theta = (theta - np.float32(rate) * gradient).astype(np.float32)
        after.append(theta)
    return after


def normalised(job: Job):
    return linear_loop(job, lambda s, mean, theta: mean / np.linalg.norm(mean))


def adamw(job: Job):
    """Adam with weight decay, at the job's rates."""
    start, after = job.parameters.astype(np.float64), []
    for s, theta in enumerate(adam(job)):
        after.append((theta - 1e-3 * (s + 1) * start).astype(np.float32))
    return after


@accepts("linear", own_optimizer=True)
def adam_drops_of_16(job: Job):
    return adam_loop(
        job,
        lambda parts, counts, ranks: token_mean([part for i, part in enumerate(parts) if i != 9], counts, ranks),
    )


def stuck_after_nan(job: Job):
    """Never updates again after a NaN, and returns one array for all the updates that it did not make."""
    theta, after, bad = job.parameters, [], False
    for window, rate in zip(job.windows, job.learning_rates, strict=False):
        gradient = clipped(token_mean([summed_gradient(b, theta) for b in window], counts_of(window), 1), job.clip_norm)
        bad = bad or not np.all(np.isfinite(gradient))
        if not bad:
            theta = (theta - np.float32(rate) * gradient).astype(np.float32)
        after.append(theta)
    return after


def shared_zeros(job: Job):
    """The same zeros for what moved before every window's end."""
    zeros = np.zeros_like(job.parameters)
    return Gradients(right_gradients(job).applied, between=[zeros] * len(job.windows))


def zeros_of_another_run(job: Job):
    zeros = np.zeros_like(job.parameters)
    return Gradients(right_gradients(job).applied, between=[zeros] * 50)


def huge(job: Job):
    return [np.full(job.parameters.shape, 1e308 * (-1) ** s) for s in range(len(job.windows))]


def replaces_parameters(job: Job):
    object.__setattr__(job, "parameters", np.zeros(3, np.float32))
    return [np.zeros(3, np.float32)] * len(job.windows)


def replaces_windows(job: Job):
    object.__setattr__(job, "windows", ())
    return []


def replaces_rates(job: Job):
    after = right(job)
    object.__setattr__(job, "learning_rates", (0.0,) * 9)
    return after


def sets_numpy_errors(job: Job):
    """Makes NumPy raise from here on, and returns what NumPy warns of."""
    after = huge(job)
    np.seterr(all="raise")
    return after


def closes_stdout(job: Job):
    sys.stdout.close()
    return right(job)


assert ROWS == 2
not_a_function = 3
