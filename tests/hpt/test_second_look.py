"""What is computed from a score pass of a whole update: masks, scales, a steered coefficient, and a run that stops."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
import pytest

import hptjax.build.run as build_run
import hptjax.train.loop as loop
from hptjax.config_check import check
from hptjax.hpt.assemble import assemble
from hptjax.hpt.control import entropy_control
from hptjax.hpt.refine import ScoredUpdate, in_turn, mean_one, scored_update, top_entropy
from hptjax.hpt.route import Routed
from hptjax.hpt.terms import Term
from hptjax.losses.advantages import raw_reward
from hptjax.losses.reducers import token_mean
from hptjax.records import SampleId, Source
from hptjax.sharding.host import to_host
from hptjax.train.phases import Gated, assemble_updates
from hptjax.train.second_look import SecondLook, look_again
from tests import recorded, tiny
from tests.test_resume import rows

SHAPE = {"rows": 2, "row_tokens": 48, "max_segments": 4, "max_micro_batches": 32}
TERM = Term("rl", frozenset({Source.ROLLOUT}), 1.0, token_mean, raw_reward)


def judged():
    """Two groups of rollouts, every reward another one and none of them 0; two demonstrations beside them."""
    samples = recorded.mixed(2, 2)
    return [dataclasses.replace(s, reward=None if s.reward is None else 1.0 + i) for i, s in enumerate(samples)]


def looked_at(samples, refine, scores_of):
    """The update after its second look; `scores_of(sample)` are the scores of its target positions, by name."""

    def reassemble(**options):
        gated = Gated(np.zeros(4), Routed(objectives=[], live=samples))
        pack = lambda part, dead, routed, step: assemble(part, [TERM], advantages=routed.advantages, **SHAPE)  # noqa: E731
        options.pop("controls", None)
        return assemble_updates(gated, updates=1, stage_step=0, mask_overlong=False, assemble=pack, **options)

    updates = reassemble()
    by_id = {sample.sample_id: scores_of(sample) for sample in samples}
    names = next(iter(by_id.values()))
    scores = []
    for batch in updates[0].micro_batches:
        arrays = {name: np.full(batch.segment_ids.shape, np.nan, np.float32) for name in names}
        for row, seats in enumerate(batch.sample_index.tolist()):
            for seat, place in enumerate(seats):
                if place >= 0:
                    for name in names:
                        mine = batch.segment_ids[row] == seat + 1
                        arrays[name][row, mine] = by_id[updates[0].sample_ids[place]][name]
        scores.append(arrays)
    return look_again(updates, scores, SecondLook(refine, None), {}, reassemble=reassemble), updates[0], scores


def drawn(sample, *names):
    """Numbers per target position that are the sample's own."""
    rng = np.random.default_rng([*map(abs, sample.sample_id), int(sample.source)])
    count = len(sample.prompt_tokens) + len(sample.completion_tokens) - 1
    return {name: rng.normal(size=count).astype(np.float32) for name in names}


def written(sample, values):
    return values[len(sample.prompt_tokens) - 1 :]


def advantages_of(update):
    planes = [batch.planes["rl"] for batch in update.micro_batches]
    return np.concatenate([plane.advantages[plane.weights > 0] for plane in planes])


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 1.0])
def test_top_entropy_keeps_exactly_its_share_of_the_rollouts_tokens(share):
    samples = [sample for sample in judged() if sample.source == Source.ROLLOUT]
    looked, before, _ = looked_at(samples, top_entropy(share), lambda sample: drawn(sample, "entropy"))
    tokens = sorted((e for s in samples for e in written(s, drawn(s, "entropy")["entropy"])), reverse=True)
    kept = math.ceil(share * len(tokens))
    after = advantages_of(looked.updates[0])
    assert np.count_nonzero(after) == kept
    assert np.count_nonzero(advantages_of(before)) == len(tokens) == len(after)
    lowest = tokens[kept - 1]
    for batch in looked.micro_batches[0]:
        plane, ids = batch.planes["rl"], batch.sample_index
        for row, seat in zip(*np.nonzero(ids >= 0), strict=True):
            sample = looked.updates[0].samples[ids[row, seat]]
            found = plane.advantages[row][(batch.segment_ids[row] == seat + 1) & (plane.weights[row] > 0)]
            expected = np.where(written(sample, drawn(sample, "entropy")["entropy"]) >= lowest, sample.reward, 0)
            np.testing.assert_array_equal(found, expected.astype(np.float32))


def test_top_entropy_of_an_update_without_rollouts_is_nothing():
    looked, _, _ = looked_at(judged()[:2], top_entropy(0.2), lambda sample: drawn(sample, "entropy"))
    assert looked.updates[0].terms["rl"].tokens == 0


@pytest.mark.parametrize("whole_sequence", [False, True], ids=["token", "sequence"])
def test_mean_one_divides_by_the_mean_weight_of_the_update(whole_sequence):
    samples, cap = [sample for sample in judged() if sample.source == Source.ROLLOUT], 1.5
    looked, before, _ = looked_at(
        samples,
        in_turn([mean_one(cap=cap, whole_sequence=whole_sequence)]),
        lambda sample: {"rollout_logprobs": drawn(sample, "rollout_logprobs")["rollout_logprobs"] - 3},
    )
    total = count = 0.0
    for sample in samples:
        ratios = [
            float(x) for x in written(sample, drawn(sample, "rollout_logprobs")["rollout_logprobs"])
        ]  # sampler: -3
        for ratio in ratios:
            total += min(math.exp(sum(ratios) if whole_sequence else ratio), cap)
            count += 1
    np.testing.assert_allclose(
        advantages_of(looked.updates[0]), advantages_of(before) * (count / total), rtol=1e-6, atol=0
    )
    assert abs(count / total - 1) > 0.05


def test_scores_find_their_samples_in_any_packing():
    samples = judged()
    _, update, scores = looked_at(samples, None, lambda sample: drawn(sample, "entropy"))
    found = scored_update(update, scores)
    assert set(found.runs["rl"]) == {s.sample_id for s in samples if s.source == Source.ROLLOUT}
    expected = [written(s, drawn(s, "entropy")["entropy"]) for s in update.samples]
    np.testing.assert_array_equal(found.flat("rl", "entropy"), np.concatenate(expected))
    assert found.split("rl", found.flat("rl", "entropy")).keys() == found.runs["rl"].keys()


def entropies(*values):
    """A scored update whose only sample has these entropies."""
    key = SampleId(0, 0, 0)
    live = {key: np.ones(len(values), bool)} if values else {}
    return ScoredUpdate((), {"entropy": {key: np.asarray(values)}}, {"rl": live}, {})


def test_entropy_control_by_hand():
    """Target 1, delta 0.1, start 0.1; the last column is what the next step starts from."""
    control, controls = entropy_control(start=0.1, target=1.0, delta=0.1), {}
    for updates, in_use, kept in [
        ([entropies(0.5, 1.1)], 0.1, 0.2),  # 0.8: in use, and up
        ([entropies(1.0), entropies(1.0, 1.0)], 0.2, 0.3),  # at the target counts as below
        ([entropies(3.0), entropies(0.1, 0.2)], 0.0, 0.2),  # the mean of all tokens is 1.1: off, and down
        ([entropies()], 0.0, 0.2),  # nothing was rolled out: it waits
        ([entropies(2.0)], 0.0, 0.1),
        ([entropies(2.0)], 0.0, 0.0),
        ([entropies(2.0)], 0.0, 0.0),  # never below 0
        ([entropies(0.9)], 0.0, 0.1),
        ([entropies(0.9)], 0.1, 0.2),
    ]:
        now, controls = control(controls, updates)
        assert now["entropy"] == pytest.approx(in_use, abs=1e-12)
        assert controls["entropy"] == pytest.approx(kept, abs=1e-12)


REFUSED = [
    ({"top_entropy": 1.5}, "hpt.top_entropy in"),
    ({"top_entropy": 0.0}, "hpt.top_entropy above 0"),
    ({"correction_normalised": True}, "hpt.sampler_correction 'token_tis' or"),
    ({"top_entropy": 0.2, "kl_in": "reward", "kl_coefficient": 0.1}, "hpt.kl_in 'loss'"),
    ({"entropy_target": 1.0, "rl_coefficient": 0.0}, "hpt.rl_coefficient"),
]


@pytest.mark.parametrize(
    ("hpt", "message"), REFUSED, ids=lambda value: "-".join(value) if isinstance(value, dict) else ""
)
def test_settings_of_the_second_look_that_contradict_each_other_are_refused(tmp_path, hpt, message):
    config = tiny.tiny_config(tmp_path)
    with pytest.raises(ValueError, match=message):
        check(dataclasses.replace(config, hpt=dataclasses.replace(config.hpt, **hpt)))


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """PPO with all that a second look can do, two updates per step: (config, its stages), one set of programs."""
    config = tiny.as_off_policy(tiny.tiny_config(tmp_path_factory.mktemp("look"), method="ppo"))
    chosen = {
        "top_entropy": 0.5,
        "entropy_target": 3.5,  # above what twenty tokens can have: the bonus rises
        "entropy_coefficient": 0.001,
        "entropy_delta": 0.01,
        "sampler_correction": "token_tis",
        "correction_normalised": True,
    }
    config = dataclasses.replace(
        config,
        hpt=dataclasses.replace(config.hpt, **chosen),
        train=dataclasses.replace(config.train, steps=2, eval_every=0),
        eval=dataclasses.replace(config.eval, train_questions=0),
    )
    check(config)
    with tiny.shared_programs(config) as (_, stages):
        yield config, stages


def finished(config, monkeypatch, *, stop=lambda progress: False):
    """Runs to the end, or to a stop: the parameters, moments and sums there; None after a stop."""
    original, ends = loop.run, []

    def watched(stages, state, progress, world, cadence):
        world = dataclasses.replace(world, should_stop=lambda: stop(progress))
        state, progress = original(stages, state, progress, world, cadence)
        ends.append((to_host((state.params, state.chains)), progress.controls))
        return state, progress

    monkeypatch.setattr("hptjax.build.run.run", watched)
    try:
        build_run.train(config, quiet=True)
    except SystemExit:
        return None
    finally:
        monkeypatch.setattr("hptjax.build.run.run", original)
    return ends[0]


@pytest.mark.slow
def test_run_stopped_between_second_look_and_update_ends_with_the_same_bits(everything, tmp_path, monkeypatch):
    """Stopped inside the second update of step 2, when the weights have moved since the scores were made."""
    config, stages = everything
    whole = finished(config, monkeypatch)
    places = []

    def stop(progress):
        step = progress.open_step
        inside = step is not None and step.step == 1 and step.update_index == 1 and step.micro_index > 0
        if inside and not places:
            places.append(step.micro_index)
            return True
        return False

    again = dataclasses.replace(config, runs_dir=str(tmp_path / "runs"))
    assert finished(again, monkeypatch, stop=stop) is None
    assert places
    resumed = finished(again, monkeypatch)
    assert all(map(np.array_equal, jax.tree.leaves(whole[0]), jax.tree.leaves(resumed[0])))
    assert set(whole[0][0]) == {"policy", "critic"}
    assert np.any(whole[0][0]["critic"]["weight"])
    for name in ("metrics.jsonl", "ledger.jsonl"):
        assert rows(config, name) == rows(again, name), name
    steps = [row for row in rows(config, "metrics.jsonl") if "witness/ok" in row]
    assert all(row["witness/ok"] == 1 for row in steps)
    np.testing.assert_allclose([row["actor/entropy_coefficient"] for row in steps], [0.001, 0.011], rtol=1e-12)
    np.testing.assert_allclose(whole[1]["entropy"], 0.021, rtol=1e-12)
    assert resumed[1] == whole[1]
    assert steps[0]["critic/values/mean"] == 0.0 != steps[1]["critic/values/mean"]
    assert all(set(entry["grad_norm"]) == {"policy", "critic"} for entry in rows(config, "ledger.jsonl"))
    assert stages[-1].micro_step.__wrapped__._cache_size() == 1
    assert stages[-1].score.__wrapped__._cache_size() == 1
