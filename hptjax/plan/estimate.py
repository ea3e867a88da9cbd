"""From counts to time: the roofline of each program, and what a step of the run then takes. All of it is estimated.

A program takes as long as the slowest of these: its operations at the chip's peak, its bytes at the memory's
bandwidth, its collectives one after the other along one torus axis, those between slices through the network. Nothing
is added for what does not overlap, and no chip reaches its peaks: times are lower bounds, tokens/s and MFU upper ones.
"""

from __future__ import annotations

import dataclasses

from hptjax.plan.chips import Chip
from hptjax.plan.compiled import Compiled


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that each resource is busy in one call of a program."""

    compute_s: float
    memory_s: float
    ici_s: float
    dcn_s: float

    @property
    def seconds(self) -> float:
        """The slowest of them."""
        return max(self.compute_s, self.memory_s, self.ici_s, self.dcn_s)

    @property
    def bottleneck(self) -> str:
        """Its name."""
        named = {
            "compute": self.compute_s,
            "memory": self.memory_s,
            "links": self.ici_s,
            "network": self.dcn_s,
        }
        return max(named, key=lambda name: named[name])

    def times(self, count: float) -> Roofline:
        """So many calls."""
        return Roofline(*(count * part for part in dataclasses.astuple(self)))


def roofline(chip: Chip, flops: float, compiled: Compiled, *, update: bool) -> Roofline:
    """Of one call on one device.

    Args
      flops: operations of this device. update: of the optimizer's update alone, else of everything but it.
    """
    exchanged = [entry for entry in compiled.exchanged if entry.update == update]
    return Roofline(
        compute_s=flops / chip.flops,
        memory_s=(compiled.update_memory_bytes if update else compiled.memory_bytes) / chip.hbm_bandwidth,
        ici_s=sum(entry.ici_bytes for entry in exchanged) / chip.ring_bandwidth,
        dcn_s=sum(entry.dcn_bytes for entry in exchanged) / chip.dcn_bandwidth,
    )


@dataclasses.dataclass(frozen=True)
class StepTime:
    """A whole step of the run, estimated: seconds by phase, and what comes of them.

    Args
      rollout_s, score_s, train_s: of sampling a step's rollouts, scoring and training on them.
      tokens: positions that are trained on in a step, rows taken to be full. model_flops: of their forward and backward
        passes, without recomputation.
    """

    rollout_s: float
    score_s: float
    train_s: float
    tokens: float
    model_flops: float

    @property
    def seconds(self) -> float:
        """All phases, one after the other, as the loop runs them."""
        return self.rollout_s + self.score_s + self.train_s

    def mfu(self, chip: Chip, chips: int) -> float:
        """Share of the chips' peak that the model's operations take while training."""
        return self.model_flops / (self.train_s * chip.flops * chips) if self.train_s else 0.0
