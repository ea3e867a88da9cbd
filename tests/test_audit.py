"""`hptjax audit`: right trainers pass, every mistake is named with its micro-batches, and no target breaks the kit."""

from __future__ import annotations

import dataclasses
import doctest
import functools
import io
import json
import subprocess
import sys

import numpy as np
import pytest

from hptjax import cli
from hptjax.audit import findings, kit, problems, reference, words
from hptjax.audit.decode import WindowTokens, bases, explain
from hptjax.audit.effects import EFFECTS
from hptjax.audit.kit import audit
from hptjax.audit.problems import COUNTS
from hptjax.audit.report import print_report, summary, to_json
from hptjax.audit.targets import NAMES, SIMULATED, load
from tests import audit_targets as bad

MIDDLE = {3: (1,), 4: (1, 2), 5: (1, 2, 3), 7: (1, 2, 3, 4, 5), 16: tuple(range(1, 15))}
BLANKED = {1: (), 2: (), 3: (1,), 4: (2,), 5: (2,), 7: (3,), 16: (8,)}
SUMS = [f"sum, k = {k}" for k in COUNTS]


def faults(report):
    return {finding.code for finding in report.faults}


def named(report, code, k):
    """Micro-batches that every update of the plain job of k micro-batches is said to lack or repeat."""
    found = {
        finding.micro_batches for finding in report.findings if (finding.code, finding.probe) == (code, f"sum, k = {k}")
    }
    assert len(found) <= 1
    return found.pop() if found else ()


def outcomes(report):
    return {result.probe: result.outcome for result in report.probes}


def detail(report, probe):
    """Outcome and detail of one row."""
    return next((row.outcome, row.detail) for row in report.probes if row.probe == probe)


@pytest.mark.parametrize(
    ("target", "model", "codes"),
    [
        (reference.target, "linear", {"nan_applied"}),
        (reference.target, "tokens", set()),
        (bad.right, None, {"nan_applied"}),
        (bad.right_tokens, None, set()),
        (bad.right_gradients, None, {"nan_applied"}),
        (bad.skips_nan, None, set()),
        (bad.refuses_nan, None, set()),
        (bad.one_worker, None, {"nan_applied"}),
        (bad.bfloat16_parameters, None, {"nan_applied"}),
        (bad.shared_zeros, None, {"nan_applied"}),
    ],
)
def test_audit_right_trainers_have_no_fault(target, model, codes):
    report = audit(target, model=model)
    assert {finding.code for finding in report.findings} == codes
    assert not report.faults
    assert outcomes(report)["injected drop"] == "pass"


@pytest.mark.parametrize(
    ("name", "codes", "dropped"),
    [
        ("simulated-deepspeed", {"dropped"}, MIDDLE),
        ("simulated-deepspeed-first-only", {"dropped"}, {k: tuple(range(1, k)) for k in COUNTS if k > 1}),
        ("simulated-openrlhf", {"mean_of_means", "nan_on_clean_data"}, {}),
        ("simulated-huggingface-2024", {"mean_of_means", "nan_on_clean_data"}, {}),
    ],
)
def test_audit_simulated_bugs_are_named_with_their_micro_batches(name, codes, dropped):
    report = audit(load(name), name=name)
    assert faults(report) == codes
    assert {k: named(report, "dropped", k) for k in COUNTS} == {k: dropped.get(k, ()) for k in COUNTS}


def test_audit_says_that_two_micro_batches_cannot_show_the_deepspeed_bug():
    report = audit(load("simulated-deepspeed"))
    assert outcomes(report)["sum, k = 2"] == "pass"
    assert "k = 2 passes" in report.remarks[0]
    assert not audit(load("simulated-openrlhf")).remarks


def test_audit_digits_of_the_shared_sum_name_the_same_micro_batches():
    (first, *_) = (f for f in audit(load("simulated-deepspeed")).findings if f.probe == "sum, k = 4")
    assert first.evidence.endswith("the shared sum is 65, in base 4 from the first: 1 0 0 1")


@pytest.mark.parametrize(
    ("target", "codes", "blamed"),
    [
        (bad.repeated, {"repeated"}, {("repeated", 3): (1,), ("repeated", 7): (1,)}),
        (bad.first_missing_and_renormalised, {"dropped"}, {("dropped", 2): (0,), ("dropped", 16): (0,)}),
        (
            bad.first_and_last_mean_of_means,
            {"dropped", "mean_of_means", "nan_on_clean_data"},
            {("dropped", 7): MIDDLE[7]},
        ),
        (bad.extra_k, {"extra_1_over_k"}, {}),
        (bad.missing_k, {"missing_1_over_k"}, {}),
        (bad.sum_of_means, {"missing_1_over_k", "mean_of_means", "nan_on_clean_data"}, {}),
        (bad.plain_sum, {"sum_not_mean"}, {}),
        (bad.half, {"wrong_scale"}, {}),
        (bad.padding_counted, {"padding_counted"}, {}),
        (bad.bfloat16_sum, {"low_precision_sum"}, {}),
        (bad.bfloat16_sum_tokens, {"low_precision_sum"}, {}),
        (bad.clip_before_sum, {"clip_before_sum"}, {}),
        (bad.clip_shares, {"clip_before_sum"}, {}),
        (bad.clip_never, {"clip_wrong"}, {}),
        (bad.clip_before_division, {"clip_wrong"}, {}),
        (bad.schedule_per_micro_batch, {"schedule_per_micro_batch"}, {}),
        (bad.one_rate, {"wrong_learning_rate"}, {}),
        (bad.never_reset, {"stale"}, {("stale", 3): (0, 1, 2), ("stale", 4): (0, 1, 2, 3)}),
        (bad.momentum, {"momentum"}, {}),
        (bad.weight_decay, {"weight_decay"}, {}),
        (bad.noise, {"unexplained_change"}, {}),
        (bad.not_deterministic, {"not_deterministic"}, {}),
        (bad.adam, {"not_sgd"}, {}),
        (bad.drops_short_window, {"final_window_dropped"}, {}),
        (bad.leaves_short_window, {"final_window_dropped"}, {}),
        (bad.boundary_one_late, {"wrong_boundary"}, {("wrong_boundary", 3): (0,)}),
        (bad.update_per_micro_batch, {"update_per_micro_batch"}, {}),
        (bad.last_token_masked, {"tokens_dropped"}, {("tokens_dropped", 3): (0, 1, 2)}),
        (bad.prompt_trained, {"masked_tokens_trained"}, {("masked_tokens_trained", 3): (0, 1, 2)}),
        (bad.padding_trained, {"masked_tokens_trained"}, {("masked_tokens_trained", 3): (0, 1, 2)}),
        (bad.sequence_mean, {"sequence_mean"}, {}),
        (bad.nothing, {"no_update", "blind"}, {}),
        (bad.constant, {"blind", "not_sgd"}, {}),
        (bad.clean_nan, {"nan_on_clean_data"}, {}),
        (bad.moves_early, {"update_before_window_end", "nan_poisoning"}, {}),
        (bad.poisoned_sums, {"nan_poisoning"}, {}),
        (bad.zero_filled, {"nan_hidden"}, {}),
        (bad.stale_after_skip, {"after_nan_window"}, {}),
        (bad.stuck_after_nan, {"after_nan_window"}, {}),
        (bad.stale_after_short, {"stale"}, {}),
        (bad.tail_lost_after_short, {"dropped"}, {}),
        (bad.previous_count, {"wrong_scale"}, {}),
        (bad.step_per_micro_batch, {"update_before_window_end"}, {}),
        (bad.masked_a_little, {"masked_tokens_trained"}, {}),
        (bad.momentum_one_percent, {"momentum"}, {}),
        (bad.one_percent_too_much, {"wrong_scale"}, {}),
        (bad.second_at_99_percent, {"uneven_weights"}, {}),
        (bad.rates_too_high, {"wrong_learning_rate"}, {}),
        (bad.row_weighted_means, {"mean_of_means"}, {}),
        (bad.normalised, {"wrong_scale"}, {}),
        (bad.adamw, {"not_sgd"}, {}),
        (bad.bfloat16_sum_in_float32_parameters, {"low_precision_sum"}, {}),
        (bad.huge, {"nan_on_clean_data"}, {}),
        (bad.sets_numpy_errors, {"nan_on_clean_data"}, {}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_audit_finds_each_mistake(target, codes, blamed):
    report = audit(target)
    assert faults(report) == codes
    for (code, k), micro_batches in blamed.items():
        assert named(report, code, k) == micro_batches


@pytest.mark.parametrize(
    ("target", "codes", "blamed"),
    [
        (load("simulated-deepspeed"), {"dropped"}, {("dropped", k): MIDDLE[k] for k in MIDDLE}),
        (bad.never_reset, {"stale"}, {("stale", 3): (0, 1, 2)}),
        (bad.momentum, {"momentum"}, {}),
        (bad.weight_decay, {"weight_decay"}, {}),
        (bad.noise, {"unexplained_change"}, {}),
        (bad.schedule_per_micro_batch, {"schedule_per_micro_batch"}, {}),
        (bad.clip_before_sum, {"clip_before_sum"}, {}),
        (bad.adam, {"not_sgd"}, {}),
        (bad.rank_means, {"rank_means"}, {}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_audit_finds_each_mistake_through_logits(target, codes, blamed):
    report = audit(target, model="tokens")
    assert faults(report) == codes
    for (code, k), micro_batches in blamed.items():
        assert named(report, code, k) == micro_batches


@pytest.mark.parametrize(
    ("target", "codes", "probes"),
    [
        (bad.extra_ranks, {"extra_rank_factor"}, {"2 workers"}),
        (bad.missing_ranks, {"missing_rank_factor"}, {"2 workers"}),
        (bad.rank_means, {"rank_means"}, {"2 workers"}),
        (bad.last_added_after_all_reduce, {"dropped"}, {"2 workers"}),
    ],
)
def test_audit_mistakes_between_workers_show_with_two_of_them_only(target, codes, probes):
    report = audit(target)
    assert faults(report) == codes
    assert {finding.probe for finding in report.faults} == probes


def test_audit_names_the_rank_whose_micro_batch_is_missing():
    (first, *_) = audit(bad.last_added_after_all_reduce).faults
    assert first.micro_batches == (2,)
    assert "weight 0 instead of 1, on rank 1" in first.evidence


@pytest.mark.parametrize(
    ("target", "code", "words"),
    [
        (bad.raises, "target_raised", "KeyError: 'theta'"),
        (bad.leaves, "target_raised", "SystemExit: 0"),
        (bad.returns_none, "wrong_type", "got NoneType"),
        (bad.returns_dict, "wrong_type", "got dict"),
        (bad.returns_trees, "wrong_type", "got dict at place 0"),
        (bad.returns_one_array, "wrong_type", "got a single ndarray of shape (200,)"),
        (bad.returns_generator, "wrong_type", "got generator"),
        (bad.returns_ints, "wrong_dtype", "got int32"),
        (bad.returns_complex, "wrong_dtype", "got complex64"),
        (bad.returns_objects, "wrong_dtype", "got object"),
        (bad.returns_float16, "wrong_dtype", "got float16"),
        (bad.returns_column, "wrong_shape", "got shape (200, 1)"),
        (bad.returns_ragged_lists, "wrong_type", "reading what the target returned: ValueError"),
        (bad.returns_same_array, "same_array", "return copies"),
        (bad.writes_into_batches, "changed_its_input", "not what they were"),
        (bad.replaces_parameters, "changed_its_input", "not what they were"),
        (bad.replaces_windows, "changed_its_input", "not what they were"),
        (bad.replaces_rates, "changed_its_input", "not what they were"),
        (bad.zeros_of_another_run, "wrong_type", "one array of between per update, got 50 for "),
        (lambda: None, "target_raised", "TypeError"),
    ],
)
def test_audit_of_a_target_that_is_no_trainer_is_one_finding(target, code, words):
    report = audit(target)
    found = {finding.code for finding in report.findings}
    assert code in found
    assert found <= {code, "wrong_update_count"}
    assert all(words in finding.evidence for finding in report.findings if finding.code == code)


def test_audit_of_too_few_updates_says_so():
    assert faults(audit(bad.returns_too_few)) == {"wrong_update_count"}


def test_audit_of_a_target_that_supports_nothing_is_no_pass():
    report = audit(bad.supports_nothing)
    assert faults(report) == {"not_examined"}
    assert set(outcomes(report).values()) == {"not run"}


@pytest.mark.parametrize(
    ("target", "own_optimizer", "told"),
    [(bad.pairs_only, False, "at most 2 micro-batches"), (bad.whole_windows_only, True, "no accumulation")],
)
def test_audit_of_no_window_of_three_is_no_pass(target, own_optimizer, told):
    report = audit(target, own_optimizer=own_optimizer)
    (finding,) = report.faults
    assert (finding.code, finding.probe) == ("not_examined", "")
    assert finding.evidence.endswith(told)


@pytest.mark.parametrize("own_optimizer", [False, True])
def test_audit_counts_an_exception_on_whole_data_wherever_it_comes(own_optimizer):
    (finding,) = audit(bad.third_call_raises(), own_optimizer=own_optimizer).faults
    assert (finding.code, finding.probe) == ("target_raised", "injected drop")


def test_audit_does_not_pass_bfloat16_where_float32_came_back():
    assert detail(audit(bad.right), "bf16 parameters") == ("not run", "the target kept float32 parameters")
    assert detail(audit(bad.bfloat16_parameters), "bf16 parameters") == ("pass", "")
    assert detail(audit(bad.right_gradients), "bf16 parameters") == ("pass", "as far as the target says")


def test_audit_passes_workers_as_far_as_the_target_says():
    assert detail(audit(bad.right), "2 workers") == ("pass", "as far as the target says")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("simulated-deepspeed", "names micro-batch 0"),  # the middle ones are missing without being blanked
        ("simulated-deepspeed-first-only", "seen, but not named"),  # nothing is left of the window
        ("simulated-openrlhf", "names micro-batch 2"),
    ],
)
def test_audit_blanks_a_micro_batch_that_the_target_does_not_drop(name, told):
    assert detail(audit(load(name)), "injected drop") == ("pass", told)


@pytest.mark.parametrize("name", ["simulated-deepspeed", "simulated-deepspeed-first-only"])
def test_audit_judges_no_nan_in_a_micro_batch_that_is_dropped(name):
    assert detail(audit(load(name)), "NaN") == ("not run", "not judged: the sums themselves are wrong")


def test_audit_of_parameters_says_that_later_gradients_of_a_nan_are_unseen():
    for target, unseen in ((bad.right, True), (bad.right_gradients, False)):
        (note,) = (finding for finding in audit(target).findings if finding.code == "nan_applied")
        assert ("a target that returns Gradients shows them" in note.evidence) == unseen


def test_audit_names_the_window_whose_count_was_used():
    evidence = {finding.evidence for finding in audit(bad.previous_count).faults if finding.probe == "uneven windows"}
    assert "every weight is 0.25 times what it should be, as if divided by the token count of window 0" in evidence


def test_audit_names_the_rate_that_was_used():
    (finding,) = audit(bad.rates_too_high).faults
    assert finding.evidence.startswith("update 0 used rate 1.015 instead of 1, entry 0")


def test_audit_of_small_noise_says_how_small():
    (first, *_) = audit(bad.small_noise).faults
    assert (first.code, first.evidence) == ("unexplained_change", "0.00036 of the change is no token's gradient")


def test_audit_does_not_catch_an_interrupt():
    def interrupted(job):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audit(interrupted)


@pytest.mark.parametrize(
    ("target", "codes"),
    [
        (bad.adam, set()),
        (bad.adam_mean_of_means, {"split_changes_update"}),
        (bad.adam_first_and_last, {"split_changes_update"}),
        (bad.right, set()),
        (bad.not_deterministic, {"not_deterministic"}),
        (bad.constant, {"blind"}),
        (bad.raises, {"target_raised"}),
    ],
)
def test_audit_of_an_own_optimizer_compares_splits(target, codes):
    report = audit(target, own_optimizer=True)
    assert faults(report) == codes
    assert not any(finding.micro_batches for finding in report.findings)


@pytest.mark.parametrize(
    ("target", "codes"), [(bad.adam_tokens, set()), (bad.adam_tokens_mean_of_means, {"split_changes_update"})]
)
def test_audit_of_an_own_optimizer_takes_its_mark(target, codes):
    report = audit(target)
    assert (report.model, report.own_optimizer) == ("tokens", True)
    assert faults(report) == codes


def test_audit_of_an_own_optimizer_asks_for_16_micro_batches():
    assert {finding.probe for finding in audit(bad.adam_drops_of_16).faults} == {"split, k = 16"}


def test_audit_of_an_own_optimizer_says_what_it_cannot_see():
    text = io.StringIO()
    print_report(audit(bad.adam, own_optimizer=True), file=text)
    printed = " ".join(text.getvalue().split())
    assert "a factor that the optimizer divides out (1/k, the number of workers)" in printed
    assert "divides out" in EFFECTS["split_changes_update"]


def test_audit_of_adam_does_not_see_the_deepspeed_bug_at_two():
    report = audit(bad.adam_first_and_last, own_optimizer=True)
    assert outcomes(report)["split, k = 2"] == "pass"
    assert outcomes(report)["split, k = 3"] == "finding"


@pytest.mark.parametrize("target", [bad.right, bad.right_tokens, bad.right_gradients, load("simulated-openrlhf")])
def test_audit_names_an_injected_drop(target):
    report = audit(target, inject_drop=True)
    assert {k: named(report, "dropped", k) for k in COUNTS} == BLANKED


def test_audit_of_an_own_optimizer_sees_an_injected_drop():
    report = audit(bad.adam, own_optimizer=True, inject_drop=True)
    assert outcomes(report)["split, k = 3"] == "finding"
    assert outcomes(report)["split, k = 2"] == "pass"


@functools.cache
def report_of(name, inject_drop=False):
    """The audit of a shipped target; compiled programs make it worth keeping."""
    return audit(load(name), name=name, inject_drop=inject_drop)


JAX_TARGETS = {
    "hptjax": set(),
    "jax-loop": {"nan_applied"},
    "optax.MultiSteps": {"mean_of_means", "nan_applied", "nan_poisoning"},
    "optax.MultiSteps-sum": {"nan_applied", "nan_poisoning"},
}


@pytest.mark.parametrize("name", JAX_TARGETS)
def test_audit_of_jax_trainers(name):
    report = report_of(name)
    assert {finding.code for finding in report.findings} == JAX_TARGETS[name]
    not_run = {probe for probe, outcome in outcomes(report).items() if outcome == "not run"}
    assert not_run == {"one gradient"} | (set() if name == "hptjax" else {"2 workers"})
    poisoned = [finding for finding in report.findings if finding.code == "nan_poisoning"]
    assert all(
        finding.micro_batches == (1,) and "before window 1 was complete" in finding.evidence for finding in poisoned
    )


@pytest.mark.parametrize("name", JAX_TARGETS)
def test_audit_of_jax_trainers_names_an_injected_drop(name):
    report = report_of(name, inject_drop=True)
    assert {k: named(report, "dropped", k) for k in COUNTS} == BLANKED


def test_audit_of_hptjax_skips_the_window_with_a_nan():
    (row,) = (result for result in report_of("hptjax").probes if result.probe == "NaN")
    assert (row.outcome, row.detail) == ("pass", "the window was skipped, bit for bit")


def test_audit_hptjax_refuses_a_lost_micro_batch(monkeypatch):
    """The step's own witness speaks first: the adapter must not swallow it."""
    from hptjax.audit.adapters import hptjax_step

    whole = hptjax_step.micro_batches

    def without_the_second(window):
        batches = whole(window)
        lost = dataclasses.replace(batches[1], completion_mask=np.zeros_like(batches[1].completion_mask))
        return [batches[0], lost, *batches[2:]]

    monkeypatch.setattr(hptjax_step, "micro_batches", without_the_second)
    (first, *_) = (f for f in audit(hptjax_step.target).faults if f.probe == "sum, k = 3")
    assert first.code == "target_raised"
    assert "witness_mismatch, micro-batch 1" in first.evidence


@pytest.mark.parametrize("k", [k for k in COUNTS if k > 1])
def test_audit_counts_cannot_be_taken_for_another_mistake(k):
    """No way of averaging, scaled, looks like whole micro-batches dropped or repeated: all explanations are unique."""
    counts = COUNTS[k]
    micro_batch = np.repeat(np.arange(k), counts)
    row = np.concatenate(
        [np.repeat((0, 1), [length for _, length in problems.spans(n, i)]) for i, n in enumerate(counts)]
    )
    window = WindowTokens(np.ones(sum(counts)), micro_batch, row, row * 0, k, 1, 12 * k)
    for name, base in bases(window).items():
        for factor, code in (
            (1.0, ""),
            (1 / k, "extra_1_over_k"),
            (float(k), "missing_1_over_k"),
            (5.5, "wrong_scale"),
        ):
            found = explain(dataclasses.replace(window, ratio=base * factor))
            assert (found.base, found.factor_code, set(found.times.values())) == (name, code, {1})
        for dropped in range(k):
            found = explain(dataclasses.replace(window, ratio=base * (micro_batch != dropped)))
            assert found.with_times(0) == (dropped,)
    assert sum(counts) & (sum(counts) - 1) == 0


def test_audit_json_holds_the_report():
    report = audit(load("simulated-openrlhf"), name="simulated-openrlhf")
    values = json.loads(to_json(report))
    assert values["probes"] == [dataclasses.asdict(row) for row in report.probes]
    assert [tuple(row.pop("micro_batches")) for row in values["findings"]] == [f.micro_batches for f in report.findings]
    plain = [dataclasses.asdict(finding) for finding in report.findings]
    assert values["findings"] == [{name: row[name] for name in row if name != "micro_batches"} for row in plain]
    assert (values["target"], values["model"], values["verdict"]) == ("simulated-openrlhf", "linear", "fault")
    assert (values["versions"], values["remarks"]) == (report.versions, [])
    assert values["effects"] == {finding.code: EFFECTS[finding.code] for finding in report.findings}


@pytest.mark.parametrize(
    ("target", "line"),
    [
        (bad.skips_nan, "no fault; of 19 probes: 17 passed, 2 not run"),
        (bad.one_worker, "no fault; of 19 probes: 15 passed, 1 note, 3 not run"),
        (bad.clip_never, "1 kind of fault; of 19 probes: 15 passed, 1 failed, 1 note, 2 not run"),
        (bad.nothing, "2 kinds of fault; of 19 probes: "),
    ],
)
def test_audit_ends_with_a_count_of_outcomes(target, line):
    assert summary(audit(target)).startswith(line)


@pytest.mark.parametrize("code", EFFECTS)
def test_audit_effects_have_no_word_split_by_a_line_break(code):
    assert "- " not in EFFECTS[code].replace(" - ", "")
    assert "  " not in EFFECTS[code]


def test_audit_report_has_a_paragraph_per_finding():
    text = io.StringIO()
    report = audit(load("simulated-openrlhf"), name="simulated-openrlhf")
    print_report(report, file=text)
    printed = " ".join(text.getvalue().split())
    for finding in report.findings:
        assert EFFECTS[finding.code] in printed
    assert f"numpy {np.__version__}" in printed
    with pytest.raises(ValueError, match="expected one of"):
        findings.Finding("no such code", "")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["simulated-deepspeed"], 1, "micro-batches 1-5 of 7"),
        (["tests.audit_targets:right"], 0, "no fault"),
        (["tests.audit_targets:right", "--inject-drop"], 1, "micro-batch 1 of 3"),
        (["tests.audit_targets:pairs_only"], 1, "not_examined (fault)"),
        (["tests.audit_targets:adam", "--own-optimizer"], 0, "no micro-batch can be named"),
        (["tests.audit_targets:right", "--model", "tokens"], 0, "tokens model"),
        (["tests.audit_targets:raises"], 1, "KeyError"),
        (["nonsense"], 2, "expected module:function"),
        (["tests.audit_targets:absent"], 2, "has no 'absent'"),
        (["tests.audit_targets:not_a_function"], 2, "of type int"),
        (["no_such_module_here:train"], 2, "there is no module 'no_such_module_here'"),
        (["../x:y"], 2, "expected module:function"),
        (["tests/audit_targets.py:right"], 2, "run it in the folder tests and write audit_targets:right"),
        (["my_trainer.py:train"], 2, "write my_trainer:train"),
        (["tests.audit_targets:right", "--json", "no/such/folder/x.json"], 2, "change --json"),
        (["tests.audit_targets:raises", "--json", "tests"], 2, "change --json"),
    ],
)
def test_audit_command_line(arguments, status, words, capsys):
    assert cli.run(["audit", *arguments]) == status
    output = capsys.readouterr()
    assert words in " ".join((output.err if status == 2 else output.out).split())
    assert (output.err == "") == (status != 2)


@pytest.mark.parametrize("arguments", [[], ["hptjax", "--model", "linaer"], ["hptjax", "--nope"]])
def test_audit_command_line_refuses_bad_options(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.run(["audit", *arguments])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err


def test_audit_writes_json(tmp_path, capsys):
    path = tmp_path / "report.json"
    assert cli.run(["audit", "simulated-deepspeed", "--json", str(path)]) == 1
    found = json.loads(path.read_text())["findings"]
    assert [f["micro_batches"] for f in found if f["probe"] == "sum, k = 7"] == [[1, 2, 3, 4, 5]] * 2


def test_audit_module_that_fails_at_import_is_one_message(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken_trainer.py").write_text("raise RuntimeError('no accelerator')\n")
    monkeypatch.chdir(tmp_path)
    assert cli.run(["audit", "broken_trainer:train"]) == 2
    assert "it raised RuntimeError: no accelerator" in capsys.readouterr().err


def test_audit_module_without_its_dependency_names_the_dependency(tmp_path, monkeypatch, capsys):
    (tmp_path / "needs_more.py").write_text("import no_such_dependency\n")
    monkeypatch.chdir(tmp_path)
    assert cli.run(["audit", "needs_more:train"]) == 2
    message = capsys.readouterr().err
    assert "cannot import 'needs_more': it needs the module 'no_such_dependency'" in message
    assert "module:function" not in message


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("torch-loop", "torch", "audit-torch"),
        ("transformers", "accelerate", "audit-torch"),
        ("trl", "datasets", "audit-torch"),
        ("tunix", "tunix", "audit-tunix"),
    ],
)
def test_audit_of_a_missing_library_says_what_to_install(name, module, extra, monkeypatch):
    def missing(_):
        raise ModuleNotFoundError(f"No module named '{module}'", name=module)

    monkeypatch.setattr("hptjax.audit.targets.importlib.import_module", missing)
    with pytest.raises(ValueError, match=rf"needs {module}.*pip install 'hptjax\[{extra}\]'"):
        load(name)


def test_audit_prints_although_the_target_closed_its_output(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert cli.run(["audit", "tests.audit_targets:closes_stdout"]) == 0
    assert "no fault" in capsys.readouterr().err


def test_audit_into_a_closed_pipe_is_no_fault():
    code = "import sys; from hptjax.cli import run; sys.exit(run(['audit', 'tests.audit_targets:right']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == cli.INTERRUPTED


def test_audit_interrupted_says_nothing_of_checkpoints(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(kit, "audit", interrupted)
    assert cli.run(["audit", "simulated-deepspeed"]) == cli.INTERRUPTED
    assert capsys.readouterr().err == "hptjax: interrupted.\n"


def test_audit_help_explains_how_to_write_a_target_that_passes(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        cli.run(["audit", "--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in NAMES)
    lines = text.splitlines()
    assert "Targets that simulate a published bug:" in lines
    assert all(any(line.startswith(f"    {field}  ") for line in lines) for field in ("ranks", "clip_norm"))
    assert "a field that it ignores counts as carried out" in " ".join(text.split())
    start = next(i for i, line in enumerate(lines) if "import numpy as np" in line)
    end = next(i for i in range(start, len(lines)) if "return updates" in lines[i])
    assert "    from hptjax.audit.job import Unsupported, accepts" in lines[start:end]
    example = "\n".join(line[4:] for line in lines[start : end + 1]) + "\n"
    (tmp_path / "my_trainer.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    assert cli.run(["audit", "my_trainer:train"]) == 0
    printed = capsys.readouterr().out
    assert "no fault; of 19 probes: 15 passed, 1 note, 3 not run" in printed  # the note: it applies the NaN
    assert "one fp32 worker" in printed


def test_audit_help_says_which_windows_are_asked_for(capsys):
    with pytest.raises(SystemExit):
        cli.run(["audit", "--help"])
    assert [k for k in COUNTS if k <= 5] == [1, 2, 3, 4, 5]
    assert list(COUNTS)[5:] == [7, 16]
    assert "Windows have 1 to 5, 7 or 16 micro-batches" in capsys.readouterr().out


def test_audit_kit_docstring_runs():
    assert doctest.testmod(kit).failed == 0
    assert doctest.testmod(words).failed == 0


def test_audit_kit_runs_where_there_is_no_jax():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('jax', 'jaxlib', 'flax', 'optax', 'jaxtyping')));"
        "from hptjax.cli import run; sys.exit(run(['audit', 'simulated-deepspeed']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert set(SIMULATED) <= set(NAMES)
