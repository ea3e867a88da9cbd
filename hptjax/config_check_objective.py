"""What is asked of the objective: `[hpt]` in itself, beside the methods of the stages, and their constants."""

from __future__ import annotations

from collections.abc import Iterator

from hptjax.config import Config
from hptjax.config_batch import steps_of
from hptjax.config_constants import constant_problems
from hptjax.config_methods import GATED, PAIRED, learns_by_sft, learns_from_rollouts
from hptjax.config_prefix import prefix_problems
from hptjax.config_problem import Problem


def objective_problems(config: Config) -> Iterator[Problem]:
    """What is wrong with `[hpt]` and `[methods]` for the stages of this config."""
    hpt, group_size = config.hpt, config.rollout.group_size
    if not -1 <= hpt.gate <= group_size:
        yield f"hpt.gate in -1..{group_size} (rollout.group_size)", f"{hpt.gate}", "hpt.gate"
    if (hpt.clip_low is None) != (hpt.clip_high is None):
        yield (
            "both of hpt.clip_low and hpt.clip_high, or neither",
            f"{hpt.clip_low} and {hpt.clip_high}",
            "hpt.clip_low and hpt.clip_high",
        )
    if hpt.clip_low is not None and hpt.clip_low > 1:
        yield "hpt.clip_low in (0, 1]", f"{hpt.clip_low}", "hpt.clip_low"
    if hpt.rl_estimator in ("ppo", "grpo") and hpt.clip_low is None:
        yield (
            f"a clip range for hpt.rl_estimator '{hpt.rl_estimator}'",
            "none",
            "hpt.clip_low and hpt.clip_high (0.2 each is usual), or hpt.rl_estimator",
        )
    if hpt.rl_estimator in ("reinforce", "rloo", "sapo") and hpt.clip_low is not None:
        yield (
            f"no clip range for hpt.rl_estimator '{hpt.rl_estimator}' (it has no clip)",
            f"{hpt.clip_low}, {hpt.clip_high}",
            "hpt.clip_low and hpt.clip_high",
        )
    if hpt.clip_kind != "row" and hpt.clip_bound <= 1:
        yield f"hpt.clip_bound above 1 for hpt.clip_kind '{hpt.clip_kind}'", f"{hpt.clip_bound}", "hpt.clip_bound"
    if hpt.sampler_correction == "masked_is" and not hpt.correction_floor <= 1 <= hpt.correction_cap:
        yield (
            "hpt.correction_floor <= 1 <= hpt.correction_cap for hpt.sampler_correction 'masked_is'",
            f"{hpt.correction_floor} and {hpt.correction_cap}",
            "hpt.correction_floor or hpt.correction_cap",
        )
    if hpt.kl_in == "reward" and hpt.kl_coefficient is None:
        yield "hpt.kl_coefficient for hpt.kl_in 'reward' (0 turns it off)", "none", "hpt.kl_coefficient"
    yield from _second_look_problems(config)
    yield from prefix_problems(config)
    yield from constant_problems(config)
    for place, method, _ in steps_of(config):
        never_rl, never_sft = method in GATED and hpt.gate == group_size, method in GATED and hpt.gate < 0
        rl = hpt.rl_coefficient if learns_from_rollouts(method) and not never_rl else 0.0
        sft = hpt.sft_coefficient if learns_by_sft(method) and not never_sft else 0.0
        if rl == sft == 0.0 and method != "kdrl":  # whose teacher alone is on-policy distillation
            yield (
                f"an objective that is not 0 in {place} ({method}, hpt.gate {hpt.gate})",
                f"hpt.rl_coefficient {hpt.rl_coefficient} and hpt.sft_coefficient {hpt.sft_coefficient}",
                "the one that this method reads",
            )


def _second_look_problems(config: Config) -> Iterator[Problem]:
    """What is computed from a score pass of the whole update."""
    hpt = config.hpt
    if hpt.top_entropy is not None and hpt.top_entropy > 1:
        yield "hpt.top_entropy in (0, 1]", f"{hpt.top_entropy}", "hpt.top_entropy"
    if hpt.correction_normalised and hpt.sampler_correction not in ("token_tis", "sequence_tis"):
        yield (
            "hpt.sampler_correction 'token_tis' or 'sequence_tis' for hpt.correction_normalised",
            repr(hpt.sampler_correction),
            "hpt.sampler_correction or hpt.correction_normalised",
        )
    if (hpt.top_entropy is not None or hpt.correction_normalised) and hpt.kl_in == "reward" and hpt.kl_coefficient:
        yield (
            "hpt.kl_in 'loss' beside hpt.top_entropy or hpt.correction_normalised (both act on advantages before the "
            "reward's KL is taken off)",
            "'reward'",
            "hpt.kl_in",
        )
    in_reward = hpt.kl_in == "reward" and bool(hpt.kl_coefficient)
    changes = hpt.top_entropy is not None or hpt.correction_normalised or in_reward
    paired = [method for _, method, _ in steps_of(config) if method in PAIRED]
    if paired and changes:
        yield (
            f"advantages of +1 and -1 for {paired[0]}, whose margin is made of their signs",
            "hpt.top_entropy, hpt.correction_normalised or hpt.kl_in 'reward', which change them",
            "the one that is set",
        )
    if hpt.entropy_target is not None and hpt.rl_coefficient == 0:
        yield (
            "rollouts that learn by RL, whose entropy hpt.entropy_target steers",
            "hpt.rl_coefficient 0",
            "hpt.rl_coefficient or hpt.entropy_target",
        )
