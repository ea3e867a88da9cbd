"""Numbers of a method that answer to what a run measures: AMFT's share of SFT, SASR's chance of an SFT step.

Pure functions from the measured figures to the next value; the caller keeps the value in its state. Coefficients that
follow the step count alone are `schedules.py`. The controller that the trainer runs, of the entropy bonus, is
`control.py`; no method of the table uses these two yet.
"""

from __future__ import annotations

import numpy as np

from hptjax.masked import ratio


def next_sft_share(
    share: float,
    *,
    meta_gradient: float,
    entropy: float,
    target_entropy: float,
    rate: float = 1e-4,
    entropy_rate: float = 5e-4,
    lowest: float = 0.05,
    highest: float = 0.95,
) -> float:
    """`clip(mu + rate dU/dmu + entropy_rate (H* - H), lowest, highest)`, AMFT's mu after a meta-step.

    Args
      share: mu, the weight of SFT; RL has 1 - mu. meta_gradient: `combine.meta_gradient`, on validation questions.
      entropy, target_entropy: H now and H* after the warm-up; nats. entropy_rate: negative for the other sign, which
        the paper's prose asks for (high entropy, more SFT) and its Eq. 6 does not.
    Raises lowest > highest -> ValueError.
    Source AMFT: arXiv 2508.06944 (withdrawn) Eq. 3 to 6, second-hand; constants as in its code.
    """
    if lowest > highest:
        raise ValueError(f"expected lowest <= highest, got {lowest} and {highest}")
    moved = share + rate * meta_gradient + entropy_rate * (target_entropy - entropy)
    return min(max(moved, lowest), highest)


def sft_chance(norm: float, warm_up_norm: float, *, gamma: float = 1.0) -> float:
    """`p = |g| / (|g| + gamma |g_warm-up|)`: SASR's chance that the next step is an SFT step.

    Args
      norm: of the last SFT gradient. warm_up_norm: of SFT's gradient after the warm-up. gamma: >= 0; at 0 every step is
        SFT. 0 where both norms are.
    Source SASR: arXiv 2505.13026. Formula from memory, gamma's value unknown: unverified (`spec/methods.md` 4.10).
    """
    if not (norm >= 0 and warm_up_norm >= 0 and gamma >= 0):
        raise ValueError(f"expected norms and gamma >= 0, got {norm}, {warm_up_norm} and {gamma}")
    whole = norm + gamma * warm_up_norm
    return ratio(norm, whole) if whole else 0.0


def is_sft_step(chance: float, *, seed: int, step: int) -> bool:
    """Whether step `step` is an SFT step: true with probability `chance`, from a draw keyed by seed and step alone.

    Raises chance outside 0..1 -> ValueError.
    """
    if not 0 <= chance <= 1:
        raise ValueError(f"chance: expected a probability in 0..1, got {chance}")
    return float(np.random.default_rng([seed, step]).random()) < chance
