"""What `train.rollouts_ahead` asks of a config: a correction of the samples' age, and no devices to agree on."""

from __future__ import annotations

from collections.abc import Iterator

from hptjax.config import Config
from hptjax.config_batch import mesh_devices, mesh_words, steps_of
from hptjax.config_methods import PAIRED, learns_from_rollouts
from hptjax.config_problem import Problem


def ahead_problems(config: Config) -> Iterator[Problem]:
    """What is wrong with the option for this config; nothing where it is off, or where no stage samples."""
    sampling = [(place, method) for place, method, _ in steps_of(config) if learns_from_rollouts(method)]
    if not config.train.rollouts_ahead or not sampling:
        return
    if mesh_devices(config) > 1 and config.rollout.engine == "own":
        yield (
            "a mesh of one device for train.rollouts_ahead (two threads may start their programs in another order on "
            "each of several devices, whose exchanges then wait for each other for ever), or an outside engine",
            mesh_words(config),
            "train.rollouts_ahead, rollout.engine, or the mesh to 1",
        )
    weighed = [(place, method) for place, method in sampling if method not in PAIRED]  # a pair is one whoever wrote it
    if weighed and config.hpt.sampler_correction == "none":
        place, method = weighed[0]
        yield (
            "hpt.sampler_correction 'token_tis', 'sequence_tis' or 'masked_is' beside train.rollouts_ahead (the "
            f"rollouts that {place}, {method}, learns from are drawn by older weights)",
            "'none'",
            "hpt.sampler_correction or train.rollouts_ahead",
        )
