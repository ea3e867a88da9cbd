"""Who judges the completions of an evaluation: the answer verifier by both policies, a task's, or the user's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hptjax.build.eval_sets import EvalSet
from hptjax.build.rewards import reward_functions
from hptjax.config import Config
from hptjax.eval.run import Completion, Judged, JudgeItems
from hptjax.records import Question, RewardFunction, Verdict
from hptjax.rewards.functions import UserReward
from hptjax.rewards.pool import RewardPool
from hptjax.tasks import countdown_verifier
from hptjax.verify.expression import countdown_expression
from hptjax.verify.policy import LENIENT, STRICT
from hptjax.verify.rewards import math_strict


def make_judge(config: Config, each: EvalSet, questions: Mapping[int, Question], pool: RewardPool) -> JudgeItems:
    """What judges the completions of a set, in the pool's workers.

    Args
      questions: place of a question -> it, with the answer as its prompt has left it.
    """
    functions = judge_functions(config, each)

    def judge(asked: Sequence[tuple[int, Completion]]) -> list[Judged]:
        examples = [questions[place].example for place, _ in asked]
        rows = pool.score(
            functions,
            [completion.text for _, completion in asked],
            [example.answer for example in examples],
            [example.prompt for example in examples],
        )
        return [_judged(row, completion.text) for row, (_, completion) in zip(rows, asked, strict=True)]

    return judge


def judge_functions(config: Config, each: EvalSet) -> list[RewardFunction | UserReward]:
    """What the completions of a set are judged by.

    Raises a name in `reward.functions` that is no function -> ValueError.
    """
    if each.own:
        return reward_functions([config.reward.functions[0].name], None)
    if "answer" in each.examples[0].answer:
        return [math_strict]
    if each.examples[0].messages:
        return [countdown_expression]
    return [countdown_verifier.verify, countdown_verifier.well_formed]


def _judged(verdicts: Sequence[Verdict], said: str) -> Judged:
    """The word on a completion; of a verifier without our two grades the second verdict, if any, is about its form."""
    verdict = verdicts[0]
    grades = {grade.policy: grade for grade in verdict.grades}
    if not {STRICT.name, LENIENT.name} <= grades.keys():
        formed = len(verdicts) > 1 and verdicts[1].solved
        return Judged(said.strip() if formed else None, formed, verdict.solved, verdict.solved, verdict.reason)
    strict, lenient = grades[STRICT.name], grades[LENIENT.name]
    return Judged(
        answer=lenient.canonical or strict.canonical or lenient.extracted,
        formatted=strict.extracted is not None,
        strict=strict.correct,
        lenient=lenient.correct,
        reason=verdict.reason,
    )
