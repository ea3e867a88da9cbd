"""`hptjax eval` of suites and files: every completion judged and saved, then results.json, report.md and report.html.

A folder holds one evaluation; the same command takes it up where it was stopped or killed.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import traverse_util

from hptjax.build.data import request_maker
from hptjax.build.eval_judge import judge_functions, make_judge
from hptjax.build.eval_sets import EvalSet
from hptjax.build.parts import EVALUATION_KEY, adapter_record, base_digest, files_digest, use_compile_cache
from hptjax.build.policy import Policy, build_policy
from hptjax.build.prompts import PromptFormat, task_prompts, turn_prompts
from hptjax.build.sampler import int8_parts
from hptjax.config import Config
from hptjax.data import tokenizer as text
from hptjax.data.identity import ID_BITS, content_ids
from hptjax.eval.changes import Change, changes, read_evaluation
from hptjax.eval.figures import figures, lengths
from hptjax.eval.harness import TaskResult, results
from hptjax.eval.report import markdown, page
from hptjax.eval.run import Completion, evaluate_items
from hptjax.eval.samples import Graded
from hptjax.eval.store import add_seconds, begin, rows_file, total_seconds
from hptjax.records import FinishReason, Question
from hptjax.rewards.pool import RewardPool
from hptjax.rundir import environment, run_folder, write_json
from hptjax.sharding.rules import shard_tree
from hptjax.train.checkpoint_read import RECORD, chosen_leaves
from hptjax.types import Params

POLICY = "params.policy."
ROWS_PER_CHUNK = 4  # waves of rollouts between two saves, where a question does not have more samples


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """A set as it is put to the model: place -> question; and why some are not."""

    questions: dict[int, Question]
    unasked: dict[str, int]


def evaluate_sets(
    config: Config,
    sets: Sequence[EvalSet],
    out: Path,
    *,
    name: str,
    checkpoint: str | None,
    samples: int | None = None,
    ks: Sequence[int] = (),
    limit: int | None = None,
    baseline: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Samples, judges and saves what is not saved yet, and writes the reports; the object of results.json.

    Args
      sets: by distinct names. out: folder of the evaluation, made or taken up.
      name: of the model, in the reports. checkpoint: "last" or "best" of the config's run; None: `model.path` as it is.
      samples: per question; None: as published, or `eval.samples_per_question` for data of the user's own.
      ks: of pass@k and so on, in each set as far as it has samples; none: powers of two.
      limit: only the first questions of each set. baseline: folder of another evaluation of the same questions.
    Raises
      a folder of another evaluation, a prompt format that cannot be used, no question that fits, a k that no set has
      samples for, a baseline without any of the sets -> ValueError.
    """
    counts = {each.name: samples or each.samples or config.eval.samples_per_question for each in sets}
    before = None if baseline is None else read_evaluation(baseline)  # what cannot be done is told of before the work
    if before is not None and not before.keys() & counts.keys():
        raise ValueError(f"expected a --baseline with one of {sorted(counts)}, got '{baseline}' with {sorted(before)}")
    if ks and max(ks) > max(counts.values()):
        raise ValueError(
            f"expected --ks of at most the samples per question, {max(counts.values())}, got {max(ks)}; raise --samples"
        )
    use_compile_cache()
    found: dict[str, list[Graded]] = {}
    with RewardPool(workers=config.reward.workers, deadline_s=config.reward.deadline_s) as pool:
        for each in sets:
            pool.load(judge_functions(config, each))
        policy = build_policy(config)
        as_task = _as_task(sets)
        prompts = task_prompts(policy.tokenizer) if as_task else turn_prompts(config, policy.tokenizer, policy.stop_ids)
        params, weights = _weights(config, policy, checkpoint)
        sampling = {
            "temperature": config.eval.temperature,
            "top_p": config.eval.top_p,
            "max_gen_toks": config.rollout.max_completion_tokens,
        }
        asked = {each.name: ask(config, each, prompts, limit) for each in sets}
        begin(
            out,
            {
                "model": name,
                "weights": weights,
                "tokenizer": files_digest(Path(config.model.tokenizer or config.model.path or ""), "tokenizer.json"),
                "compute_dtype": config.model.compute_dtype,
                "rope_theta": policy.config.rope_theta,
                "int8": int8_parts(config),
                "stop_ids": sorted(policy.stop_ids),
                "prompt": _prompt_record(config, prompts),
                "sampling": sampling,
                "samples": counts,
                "limit": limit,
                "seed": config.seed,
                "reward": [function.name for function in config.reward.functions],
                "data": {each.name: each.data_hash for each in sets},
            },
        )
        for each in sets:
            found[each.name] = _evaluate(
                config, policy, params, each, asked[each.name], pool, out, counts[each.name], sampling, say
            )
    tasks = [_task(each, asked[each.name], found[each.name], ks, counts, sampling, prompts) for each in sets]
    told = {} if before is None else changes(before, found)
    return _write_reports(config, tasks, found, told, out, name=name, baseline=baseline)


def ask(config: Config, each: EvalSet, prompts: PromptFormat, limit: int | None) -> Asked:
    """The questions that can be put to the model, with ids by their content; the others counted by reason."""
    examples = list(each.examples[:limit])
    ids = _distinct(content_ids(examples))
    numbered = [dataclasses.replace(e, question_id=number) for e, number in zip(examples, ids, strict=True)]
    longest = min(config.data.max_prompt_tokens, config.rollout.prompt_buckets[-1])
    questions: dict[int, Question] = {}
    unasked: Counter[str] = Counter()
    for place, question in enumerate(prompts.encode(numbered)):
        if isinstance(question, str):
            unasked[question] += 1
        elif len(question.prompt_tokens) > longest:
            unasked["prompt_too_long"] += 1
        else:
            questions[place] = question
    if not questions:
        raise ValueError(
            f"expected questions of {each.name} that can be put to the model, got none: {dict(unasked)}; change "
            "data.max_prompt_tokens or prompt"
        )
    return Asked(questions, dict(unasked))


def _distinct(ids: Sequence[int]) -> list[int]:
    """The ids, where equal contents have one each: a set may hold a question twice, and its samples are its own."""
    taken: set[int] = set()
    found = []
    for number in ids:
        while number in taken:
            number = (number + 1) % (1 << ID_BITS)
        taken.add(number)
        found.append(number)
    return found


def _evaluate(
    config: Config,
    policy: Policy,
    params: Params,
    each: EvalSet,
    asked: Asked,
    pool: RewardPool,
    out: Path,
    n: int,
    sampling: dict[str, Any],
    say: Callable[[str], None],
) -> list[Graded]:
    make_requests = request_maker(
        count=n,
        max_completion_tokens=config.rollout.max_completion_tokens,
        stop_ids=policy.stop_ids,
        temperature=config.eval.temperature,
        top_p=config.eval.top_p,
    )
    key = jax.random.fold_in(jax.random.key(config.seed), EVALUATION_KEY)

    def sample(places: Sequence[int]) -> list[list[Completion]]:
        asked_now = [asked.questions[place] for place in places]
        groups: dict[int, list[Completion]] = {question.question_id: [] for question in asked_now}
        made = policy.sample(params, make_requests(asked_now, 0), key)
        for entry in sorted(made, key=lambda entry: entry.sample_id):
            ended = "stop" if entry.finish_reason == FinishReason.STOP else "length"
            said = text.decode(policy.tokenizer, entry.completion_tokens)
            groups[entry.sample_id.question].append(Completion(said, ended, len(entry.completion_tokens)))
        return [groups[question.question_id] for question in asked_now]

    began = time.monotonic()

    def on_chunk(done: int, of: int) -> None:
        nonlocal began
        now = time.monotonic()
        add_seconds(out, now - began)
        began = now
        say(f"{each.name}: {done} of {of} questions")

    return evaluate_items(
        each.items,
        {place: question.example.prompt for place, question in asked.questions.items()},
        rows_file(out, each.name),
        n=n,
        seed=config.seed,
        sample=sample,
        judge=make_judge(config, each, asked.questions, pool),
        generation=sampling,
        chunk=max(1, ROWS_PER_CHUNK * config.rollout.slots // n),
        on_chunk=on_chunk,
    )


def _as_task(sets: Sequence[EvalSet]) -> bool:
    return not any(example.messages for each in sets for example in each.examples)


def _weights(config: Config, policy: Policy, checkpoint: str | None) -> tuple[Params, str]:
    """The weights that are evaluated, in place, and what tells them from others."""
    if checkpoint is None or checkpoint == "base":
        path, adapters = config.model.path, adapter_record(config)
        made = "made from the seed" if path is None else files_digest(Path(path), "*.safetensors")
        return policy.params, made if adapters is None else f"{made}, adapters {json.dumps(adapters)}"
    folder = run_folder(config) / "checkpoints"
    saved, leaves = chosen_leaves(folder, checkpoint, lambda name: name.startswith(POLICY))
    if saved.fingerprint.get("lora") != adapter_record(config):
        raise ValueError(
            f"expected the adapters of {folder} ({saved.fingerprint.get('lora')}), got {adapter_record(config)}; "
            "evaluate the run folder itself, or change lora"
        )
    if config.lora.on and saved.fingerprint["base_weights"] != base_digest(config):
        raise ValueError(
            f"expected the model that {folder} was trained beside in '{config.model.path}', got another one"
        )
    tree = traverse_util.unflatten_dict(
        {tuple(name.removeprefix(POLICY).split(".")): value for name, value in leaves.items()}
    )
    shapes, wanted = (jax.tree.map(lambda leaf: tuple(leaf.shape), each) for each in (tree, policy.params))
    if shapes != wanted:
        raise ValueError(
            f"expected a checkpoint of the config's model in {folder}, got parameters of other names or shapes; "
            "evaluate the run folder itself, or change model"
        )
    record = hashlib.sha256((saved.path / RECORD).read_bytes()).hexdigest()
    return shard_tree(tree, policy.shardings), f"step {saved.step}, record {record[:16]}"


def _prompt_record(config: Config, prompts: PromptFormat) -> dict[str, Any]:
    asked = dataclasses.asdict(config.prompt)
    return {**{name: asked[name] for name in ("system", "suffix", "plain", "bos")}, **prompts.record}


def _task(
    each: EvalSet,
    asked: Asked,
    found: Sequence[Graded],
    ks: Sequence[int],
    counts: dict[str, int],
    sampling: dict[str, Any],
    prompts: PromptFormat,
) -> TaskResult:
    n = counts[each.name]
    chosen = [k for k in ks if k <= n] or [1 << power for power in range(n.bit_length()) if 1 << power <= n]
    skipped = [f"{count} rows {reason}" for reason, count in {**each.dropped, **asked.unasked}.items()]
    return TaskResult(
        name=each.name,
        figures=figures(found, ks=chosen, answers=not each.own),
        lengths=lengths(found),
        questions=len(each.examples),
        evaluated=len(asked.questions),
        data_hash=each.data_hash,
        config={
            "dataset_path": each.source,
            "generation_kwargs": sampling,
            "repeats": n,
            "prompt": dict(prompts.record),
            "left_out": {**each.dropped, **asked.unasked},
        },
        notes=[*([each.note] if each.note else []), *([f"not asked: {', '.join(skipped)}"] if skipped else [])],
    )


def _write_reports(
    config: Config,
    tasks: Sequence[TaskResult],
    found: dict[str, list[Graded]],
    told: dict[str, Change],
    out: Path,
    *,
    name: str,
    baseline: Path | None,
) -> dict[str, Any]:
    run = {
        "checkpoint": json.loads((out / "manifest.json").read_text(encoding="utf-8"))["weights"],
        "random_seed": config.seed,
        "device": jax.devices()[0].device_kind,
        "environment": environment(),
    }
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    whole = results(tasks, model=name, run=run, date=date, seconds=total_seconds(out))
    if told:
        whole["paired"] = {"baseline": str(baseline), **{task: change.as_json() for task, change in told.items()}}
    write_json(out / "results.json", whole)
    title = f"Evaluation of {name}"
    for file, said in (
        ("report.md", markdown(title, tasks, told)),
        ("report.html", page(title, tasks, found, told)),
    ):
        (out / file).write_text(said, encoding="utf-8", errors="replace")
    return whole
