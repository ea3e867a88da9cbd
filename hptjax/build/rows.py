"""A row of the token table with the config's choices in it: which clip, which importance weights."""

from __future__ import annotations

import dataclasses

from hptjax.config import HptConfig
from hptjax.losses.estimator import Estimator, Need
from hptjax.losses.stability import dual_clip, everywhere, two_sided_clip
from hptjax.losses.weights import masked_is, sequence_tis, token_tis

PPO_WIDTHS = (0.2, 0.2)
PUBLISHED_WIDTHS = {"dapo": (0.2, 0.28)}  # of the rows whose clip is wider than PPO's


def chosen_row(row: Estimator, hpt: HptConfig) -> Estimator:
    """The row of the rollouts, with the clip and the sampler correction of the config.

    Raises a clip kind for a row without a clip -> ValueError.
    """
    if hpt.clip_kind != "row":
        if row.stability_mask is everywhere or row.name in ("gspo", "gmpo"):
            raise ValueError(
                f"expected a row with PPO's clip for hpt.clip_kind {hpt.clip_kind!r}, got {row.name!r}, which has "
                "none; change hpt.clip_kind to 'row', or the method"
            )
        low, high = PUBLISHED_WIDTHS.get(row.name, PPO_WIDTHS)
        low, high = low if hpt.clip_low is None else hpt.clip_low, high if hpt.clip_high is None else hpt.clip_high
        make = dual_clip if hpt.clip_kind == "dual" else two_sided_clip
        row = dataclasses.replace(row, stability_mask=make(low, high, hpt.clip_bound))
    if hpt.sampler_correction == "none":
        return row
    weight = {
        "token_tis": lambda: token_tis(hpt.correction_cap),
        "sequence_tis": lambda: sequence_tis(hpt.correction_cap),
        "masked_is": lambda: masked_is(hpt.correction_floor, hpt.correction_cap),
    }[hpt.sampler_correction]()
    return dataclasses.replace(
        row, weights=(*row.weights, weight), needs=row.needs | {Need.ROLLOUT_LOGPROBS, Need.SAMPLER_LOGPROBS}
    )
