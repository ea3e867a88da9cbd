"""The reward functions that `reward.functions` names: the task's own, those for answers, and the user's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hptjax.records import RewardFunction
from hptjax.rewards.functions import UserReward
from hptjax.tasks import countdown_verifier
from hptjax.tasks.task import Task
from hptjax.verify import rewards as math

FILE_REWARDS: Mapping[str, RewardFunction] = {
    "verify": math.math_strict,
    "well_formed": math.math_format,
    "math_strict": math.math_strict,
    "math_lenient": math.math_lenient,
    "math_hpt": math.math_hpt,
    "math_format": math.math_format,
    "countdown": countdown_verifier.verify,
    "countdown_format": countdown_verifier.well_formed,
}
"""What rows of data files can be judged by: those of mathematics by {"answer": ...}, those of countdown by numbers and
target."""


def reward_functions(names: Sequence[str], task: Task | None) -> list[RewardFunction | UserReward]:
    """The functions by the names of `reward.functions`, in their order.

    "verify" and "well_formed" are the task's own, or, of data files, "math_strict" and "math_format" beside the other
    `FILE_REWARDS`. A name with a colon is a function of the user's own.

    Args
      task: None where the examples are from data files.
    Raises
      a name that is none of these -> ValueError.
    """
    by_name = FILE_REWARDS if task is None else {"verify": task.verify, "well_formed": task.well_formed}
    unknown = [name for name in names if name not in by_name and ":" not in name]
    if unknown:
        asked = "data.files" if task is None else f"the task {task.name!r}"
        raise ValueError(
            f"expected reward functions of {asked} ({sorted(by_name)}) or module:function for your own, got {unknown}; "
            "change reward.functions"
        )
    return [UserReward(name) if ":" in name else by_name[name] for name in names]
