"""Which samples and tokens of an update learn at all. On the host, on the whole update, before the split."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int

from hptjax.records import FinishReason


def group_varies(values: Float[np.ndarray, " N"], group_ids: Int[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
    """True for the samples of groups whose values are not all equal: the ones that a group baseline can learn from.

    Args
      values: rewards, or accuracies as 0.0 and 1.0 (DAPO's dynamic sampling keeps such groups and refills the rest).
    """
    order = np.argsort(group_ids, kind="stable")
    cuts = np.flatnonzero(np.diff(group_ids[order])) + 1
    keeps = np.zeros(values.shape, bool)
    for members in np.split(order, cuts):
        keeps[members] = members.size > 0 and bool(np.ptp(values[members]) != 0)
    return keeps


def finished(finish_reasons: Int[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
    """True where a completion wrote its stop token; DAPO's overlong filter leaves the rest out of the gradient."""
    return finish_reasons != int(FinishReason.LENGTH)


def entropy_threshold(entropies: Float[np.ndarray, " X"], share: float = 0.2) -> float:
    """The entropy that the `share` of tokens with the highest reach; nats. For `hpt/refine.py`.

    Args
      entropies: of all live tokens of the update, from the score pass. share: 0 < share <= 1; 0.2 in the paper.
    Returns the entropy of the token at the border, so that at least one token passes; with ties more than the share.
    Raises share outside its range, no tokens -> ValueError.
    Source arXiv 2506.01939.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: expected a fraction in (0, 1], got {share}")
    if entropies.size == 0:
        raise ValueError("entropies: expected the live tokens of an update, got none")
    kept = max(int(np.ceil(share * entropies.size)), 1)
    return float(np.partition(entropies, entropies.size - kept)[entropies.size - kept])
