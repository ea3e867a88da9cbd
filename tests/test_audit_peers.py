"""Adapters of other libraries' trainers: the weight that each gives every token of an update, solved for in float64.

Each needs its own library; where that is not installed, its tests are skipped. They need no jax but for tunix, so they
also run in an environment without it: pytest --noconftest -p no:cacheprovider tests/test_audit_peers.py
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from hptjax.audit.job import IGNORED, Gradients, Job, LinearBatch, Target, TokenBatch, Unsupported
from hptjax.audit.kit import audit
from hptjax.audit.peers import unpadded_rows, window_length

pytestmark = pytest.mark.filterwarnings("default")  # what other libraries deprecate is not ours to fail on

NEEDS = {
    "torch_loop": "torch",
    "transformers_trainer": "torch",
    "trl_sft": "trl",
    "tunix_trainer": "tunix",
}
TOKEN_PEERS = ["transformers_trainer", "trl_sft", "tunix_trainer"]
ROWS, LENGTH, VOCABULARY = 2, 6, 96
MEAN_OF_MEANS = "0.1.7"  # the tunix whose accumulation averages the micro-batches' means


@pytest.fixture(autouse=True)
def usual_promotion() -> Iterator[None]:
    """jax as other libraries expect it: conftest forbids the mixed dtypes and ranks that tunix's own code relies on."""
    if "jax" not in sys.modules:
        yield
        return
    import jax

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def peer(name: str) -> Target:
    """The adapter's target; skips the test where its library is not installed."""
    pytest.importorskip(NEEDS[name], reason=f"{NEEDS[name]} is not installed: an extra of the audit")
    return importlib.import_module(f"hptjax.audit.peers.{name}").target


def token_windows(rng: np.random.Generator, lengths: list[int]) -> tuple[tuple[TokenBatch, ...], ...]:
    """Windows of the given lengths, whose live tokens all follow another token of their own.

    Rows are padded on the right, micro-batches have unequal numbers of live tokens, and one of every long window has
    just one.
    """
    spare = iter(rng.permutation(VOCABULARY))
    windows = []
    for length in lengths:
        window = []
        for index in range(length):
            live = np.zeros((ROWS, LENGTH), bool)
            if index == 1:
                live[0, 2] = True
            else:
                for row in range(ROWS):
                    live[row, 1 : 2 + int(rng.integers(1, 3 if length > 4 else 4))] = True
            real = np.zeros((ROWS, LENGTH), bool)
            input_ids = np.zeros((ROWS, LENGTH), np.int32)
            for row in range(ROWS):
                real[row, : np.flatnonzero(live[row]).max(initial=1) + 1] = True
                last = np.flatnonzero(live[row]).max(initial=0)
                input_ids[row, :last] = [next(spare) for _ in range(last)]
                input_ids[row, last:] = rng.integers(0, VOCABULARY, LENGTH - last)
            window.append(
                TokenBatch(
                    input_ids=np.where(real, input_ids, 0),
                    labels=np.where(live, input_ids, IGNORED),
                    attention_mask=real.astype(np.int32),
                    index=index,
                    is_last=index == length - 1,
                )
            )
        windows.append(tuple(window))
    return tuple(windows)


def token_job(lengths: list[int], **changes: object) -> Job:
    """A job of the table model with small random parameters."""
    rng = np.random.default_rng(sum(lengths))
    job = Job(
        model="tokens",
        parameters=rng.normal(0.0, 0.5, (VOCABULARY, VOCABULARY)).astype(np.float32),
        windows=token_windows(rng, lengths),
        learning_rates=(1.0,) * len(lengths),
    )
    return dataclasses.replace(job, **changes)


def token_gradients(parameters: np.ndarray, batch: TokenBatch) -> list[tuple[int, np.ndarray]]:
    """Each live token's gradient as (the only row of theta that it touches, that row's gradient); float64."""
    found = []
    for row, place in zip(*np.nonzero(batch.labels[:, 1:] != IGNORED), strict=True):
        source, wanted = int(batch.input_ids[row, place]), int(batch.labels[row, place + 1])
        logits = parameters[source].astype(np.float64)
        gradient = np.exp(logits - logits.max())
        gradient /= gradient.sum()
        gradient[wanted] -= 1.0
        found.append((source, gradient))
    return found


def token_weights(job: Job, after: list[np.ndarray]) -> tuple[list[list[np.ndarray]], float]:
    """[window][micro-batch] -> each live token's weight times the window's number of live tokens; right: all 1.

    Returns
      the weights; the largest entry of any update that no token's gradient explains, over the largest entry.
    """
    before, weights, unexplained = job.parameters, [], 0.0
    for window, rate, now in zip(job.windows, job.learning_rates, after, strict=True):
        applied = (before.astype(np.float64) - now.astype(np.float64)) / rate
        gradients = [token_gradients(before, batch) for batch in window]
        sources = [source for batch in gradients for source, _ in batch]
        assert len(set(sources)) == len(sources), "every live token must have a row of theta to itself"
        rest = applied.copy()
        found = []
        for batch in gradients:
            solved = [applied[source] @ gradient / (gradient @ gradient) for source, gradient in batch]
            for weight, (source, gradient) in zip(solved, batch, strict=True):
                rest[source] -= weight * gradient
            found.append(np.array(solved) * len(sources))
        weights.append(found)
        unexplained = max(unexplained, np.abs(rest).max() / max(np.abs(applied).max(), 1e-30))
        before = now
    return weights, unexplained


def live_counts(window: tuple[TokenBatch, ...]) -> list[int]:
    """Number of live tokens of each micro-batch."""
    return [int((batch.labels[:, 1:] != IGNORED).sum()) for batch in window]


def run(target: Target, job: Job) -> list[np.ndarray]:
    """The target's parameters after every update; as many as windows, in the job's shape, of float32."""
    after = target(job)
    assert not isinstance(after, Gradients)
    assert len(after) == len(job.windows)
    for parameters in after:
        assert parameters.shape == job.parameters.shape
        assert parameters.dtype == np.float32
    return list(after)


def test_unpadded_rows_keep_real_tokens_alone():
    batch = TokenBatch(
        input_ids=np.array([[5, 6, 7, 0], [0, 0, 0, 0]], np.int32),
        labels=np.array([[IGNORED, 6, 7, IGNORED], [IGNORED] * 4], np.int32),
        attention_mask=np.array([[1, 1, 1, 0], [0, 0, 0, 0]], np.int32),
        index=0,
        is_last=True,
    )
    assert unpadded_rows(batch) == [
        {"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]},
        {"input_ids": [0], "labels": [IGNORED]},
    ]
    for attention_row in ([0, 1, 1, 1], [1, 1, 0, 1], [1, 1, 0, 0]):  # left; a hole; a live token outside
        attention = np.array([attention_row, [0] * 4], np.int32)
        with pytest.raises(Unsupported, match="padded"):
            unpadded_rows(dataclasses.replace(batch, attention_mask=attention))


def test_window_length_is_one_for_all_but_a_shorter_last_window():
    for lengths, expected in (([4], 4), ([3, 3], 3), ([3, 3, 1], 3)):
        assert window_length(token_job(lengths)) == expected
    for lengths in ([2, 3], [3, 2, 3], [3, 2, 2]):
        with pytest.raises(Unsupported, match="windows"):
            window_length(token_job(lengths))


@pytest.mark.parametrize("name", ["transformers_trainer", "trl_sft"])
@pytest.mark.parametrize("lengths", [[1], [2, 2], [3, 3], [4, 4], [7], [3, 3, 2]], ids=str)
def test_token_peers_weigh_every_token_alike(name, lengths):
    target = peer(name)
    job = token_job(lengths)
    assert max(lengths) == 1 or len(set(live_counts(job.windows[0]))) > 1
    weights, unexplained = token_weights(job, run(target, job))
    for window in weights:
        for batch in window:
            np.testing.assert_allclose(batch, 1.0, rtol=0, atol=1e-4)
    assert unexplained < 1e-4


@pytest.mark.parametrize("lengths", [[1], [2, 2], [3, 3], [4, 4], [7]], ids=str)
def test_tunix_weighs_tokens_by_their_micro_batch(lengths):
    target = peer("tunix_trainer")
    if importlib.metadata.version("google-tunix") != MEAN_OF_MEANS:
        pytest.skip(f"what is expected here was seen of google-tunix {MEAN_OF_MEANS}")
    job = token_job(lengths)
    weights, unexplained = token_weights(job, run(target, job))
    for window, found in zip(job.windows, weights, strict=True):
        counts = live_counts(window)
        for count, batch in zip(counts, found, strict=True):
            np.testing.assert_allclose(batch, sum(counts) / (len(counts) * count), rtol=1e-4)
    assert unexplained < 1e-4


def test_tunix_leaves_a_shorter_last_window_open():
    target = peer("tunix_trainer")
    whole, open_window = token_job([3, 2]), token_job([3, 2])
    whole = dataclasses.replace(whole, windows=whole.windows[:1])
    (only,) = target(open_window)
    np.testing.assert_array_equal(only, run(target, whole)[0])


@pytest.mark.parametrize("name", TOKEN_PEERS)
def test_token_peers_show_an_injected_drop(name):
    target = peer(name)
    job = token_job([4])
    blank = dataclasses.replace(job.windows[0][2], labels=np.full((ROWS, LENGTH), IGNORED, np.int32))
    seen = dataclasses.replace(job, windows=((*job.windows[0][:2], blank, job.windows[0][3]),))
    weights, _ = token_weights(job, run(target, seen))
    assert [bool((np.abs(batch) < 1e-4).all()) for batch in weights[0]] == [False, False, True, False]


@pytest.mark.parametrize("name", TOKEN_PEERS)
def test_token_peers_change_rates_between_updates(name):
    target = peer(name)
    same = token_job([2, 2, 2])
    other = dataclasses.replace(same, learning_rates=(1.0, 0.25, 4.0))
    steps = np.diff(np.stack([same.parameters, *run(target, same)]), axis=0)
    scaled = np.diff(np.stack([other.parameters, *run(target, other)]), axis=0)
    # every live token has a row of its own, so no update moves what another one's gradient depends on
    for rate, step, other_step in zip(other.learning_rates, steps, scaled, strict=True):
        np.testing.assert_allclose(other_step, rate * step, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TOKEN_PEERS)
def test_token_peers_clip_the_sum(name):
    target = peer(name)
    job = token_job([3])
    free = job.parameters - run(target, job)[0]
    norm = float(np.linalg.norm(free.astype(np.float64)))
    clipped = job.parameters - run(target, dataclasses.replace(job, clip_norm=norm / 2))[0]
    np.testing.assert_allclose(clipped, free / 2, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TOKEN_PEERS)
def test_token_peers_take_bf16_parameters(name):
    target = peer(name)
    job = token_job([3], parameter_dtype="bfloat16")
    after = run(target, job)[0]
    np.testing.assert_array_equal(after.view(np.uint32) & 0xFFFF, 0)  # a bf16 number is a float32 that ends in zeros


@pytest.mark.parametrize("name", list(NEEDS))
def test_peers_refuse_what_they_cannot_do(name):
    target = peer(name)
    tokens, linear = token_job([2]), linear_job([2])
    with pytest.raises(Unsupported, match="model"):
        target(tokens if name == "torch_loop" else linear)
    with pytest.raises(Unsupported, match="workers"):
        target(dataclasses.replace(linear if name == "torch_loop" else tokens, ranks=2))


@pytest.mark.parametrize("name", TOKEN_PEERS)
def test_token_peers_refuse_windows_of_no_one_length(name):
    target = peer(name)
    with pytest.raises(Unsupported, match="windows"):
        target(token_job([2, 3]))


def test_trl_refuses_padding_on_the_left():
    target = peer("trl_sft")
    job = token_job([2])
    batch = job.windows[0][0]
    left = dataclasses.replace(batch, attention_mask=np.ascontiguousarray(batch.attention_mask[:, ::-1]))
    with pytest.raises(Unsupported, match="padded"):
        target(dataclasses.replace(job, windows=((left, job.windows[0][1]),)))


def linear_job(lengths: list[int], **changes: object) -> Job:
    """A job of the linear model: every live token has a coordinate to itself, and padding has features too."""
    rng = np.random.default_rng(3)
    masks = [[rng.random((ROWS, 3)) < 0.4 + 0.4 * (i % 2) for i in range(length)] for length in lengths]
    for window in masks:
        for mask in window:
            mask[0, 0] = True
    live_tokens = sum(int(mask.sum()) for window in masks for mask in window)
    unit = iter(np.eye(live_tokens, dtype=np.float32))
    windows = []
    for window in masks:
        batches = []
        for index, mask in enumerate(window):
            features = np.full((ROWS, 3, live_tokens), 7.0, np.float32)
            for row, place in zip(*np.nonzero(mask), strict=True):
                features[row, place] = next(unit)
            batches.append(LinearBatch(features=features, mask=mask, index=index, is_last=index == len(window) - 1))
        windows.append(tuple(batches))
    job = Job(
        model="linear",
        parameters=np.zeros(live_tokens, np.float32),
        windows=tuple(windows),
        learning_rates=(1.0,) * len(lengths),
    )
    return dataclasses.replace(job, **changes)


def linear_gradients(job: Job) -> np.ndarray:
    """[windows F] float64: the mean of the features over each window's live tokens."""
    return np.stack(
        [
            np.concatenate([batch.features[batch.mask] for batch in window]).astype(np.float64).mean(0)
            for window in job.windows
        ]
    )


def linear_changes(job: Job) -> np.ndarray:
    """[windows F] float64: what the torch loop subtracts from the parameters in each update."""
    return -np.diff(np.stack([job.parameters, *run(peer("torch_loop"), job)]).astype(np.float64), axis=0)


@pytest.mark.parametrize("lengths", [[1], [2, 2], [3, 3], [4, 2, 3], [7]], ids=str)
def test_torch_loop_weighs_every_token_alike(lengths):
    job = linear_job(lengths)
    np.testing.assert_allclose(linear_changes(job), linear_gradients(job), rtol=1e-5, atol=1e-7)


def test_torch_loop_changes_rates_between_updates():
    rates = (1.0, 0.25, 4.0)
    job = linear_job([3, 2, 2], learning_rates=rates)
    np.testing.assert_allclose(linear_changes(job), np.array(rates)[:, None] * linear_gradients(job), rtol=1e-5)


def test_torch_loop_clips_the_sum():
    job = linear_job([3])
    gradient = linear_gradients(job)
    norm = float(np.linalg.norm(gradient))
    clipped = dataclasses.replace(job, clip_norm=norm / 4)
    np.testing.assert_allclose(linear_changes(clipped), gradient / 4, rtol=1e-5)


def test_torch_loop_sums_bf16_gradients_in_bf16():
    """256, then 255 times 1, over 256 tokens: 511/256 is a bf16 number, but 1 + 1/256 is not, so 1 is what is left."""
    batches = tuple(
        LinearBatch(
            features=np.full((1, 1, 1), 256.0 if index == 0 else 1.0, np.float32),
            mask=np.ones((1, 1), bool),
            index=index,
            is_last=index == 255,
        )
        for index in range(256)
    )
    job = Job(model="linear", parameters=np.zeros(1, np.float32), windows=(batches,), learning_rates=(1.0,))
    np.testing.assert_allclose(linear_changes(job), 511 / 256)
    np.testing.assert_allclose(linear_changes(dataclasses.replace(job, parameter_dtype="bfloat16")), 1.0)


def test_torch_loop_applies_a_nan():
    job = linear_job([3, 3])
    features = job.windows[0][1].features.copy()
    features[job.windows[0][1].mask] = np.nan
    spoiled = dataclasses.replace(job.windows[0][1], features=features)
    first = (job.windows[0][0], spoiled, job.windows[0][2])
    after = run(peer("torch_loop"), dataclasses.replace(job, windows=(first, job.windows[1])))
    assert np.isnan(after[0]).all()
    assert np.isnan(after[1]).all()


@pytest.mark.parametrize(
    ("name", "faulty"),
    [
        ("torch_loop", {("bf16 parameters", "low_precision_sum")}),
        ("transformers_trainer", set()),
        ("trl_sft", set()),
    ],
)
def test_audit_of_torch_peers(name, faulty):
    """What the kit says of each. It must name the micro-batch that it blanked, or a clean bill is worth nothing."""
    report = audit(peer(name))
    assert {(finding.probe, finding.code) for finding in report.faults} == faulty
    outcomes = {result.probe: result for result in report.probes}
    assert outcomes["sum, k = 7"].outcome == "pass"
    assert outcomes["injected drop"].detail == "names micro-batch 2"


def test_audit_of_tunix():
    target = peer("tunix_trainer")
    if importlib.metadata.version("google-tunix") != MEAN_OF_MEANS:
        pytest.skip(f"what is expected here was seen of google-tunix {MEAN_OF_MEANS}")
    report = audit(target)
    assert {finding.code for finding in report.faults} == {"mean_of_means", "final_window_dropped"}
    outcomes = {result.probe: result for result in report.probes}
    assert outcomes["sum, k = 1"].outcome == outcomes["learning rates"].outcome == "pass"
    assert outcomes["injected drop"].detail == "names micro-batch 2"
