"""TPU slices by name: how many chips and hosts one has, and what Google Cloud calls it.

Source: docs.cloud.google.com, "TPU v5e", "TPU v5p", "TPU v6e", "TPU software versions" and "Plan TPUs in GKE". A slice
of up to eight v5e or v6e chips is one host; larger ones, and every v5p slice, are hosts of four chips.
"""

from __future__ import annotations

import dataclasses
import math

FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")


@dataclasses.dataclass(frozen=True)
class Generation:
    """What the names of one generation are made of."""

    topologies: tuple[str, ...]
    accelerator: str  # prefix of the accelerator type in the TPU API
    per_chip: int  # what the number in the accelerator type counts: TensorCores of a chip, or the chip
    one_host: int  # up to so many chips are one host
    runtime: str  # runtime version of the TPU VM
    gke: str  # value of the node label


GENERATIONS = {
    "v5e": Generation(FLAT, "v5litepod", 1, 8, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice"),
    "v5p": Generation(CUBES, "v5p", 2, 4, "v2-alpha-tpuv5", "tpu-v5p-slice"),
    "v6e": Generation(FLAT, "v6e", 1, 8, "v2-alpha-tpuv6e", "tpu-v6e-slice"),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """One slice."""

    name: str  # as given, v5e:4x4
    topology: str
    chips: int
    hosts: int
    accelerator_type: str
    runtime: str
    gke: str

    @property
    def chips_per_host(self) -> int:
        """Chips that one process sees."""
        return self.chips // self.hosts


def tpu_slice(name: str) -> Slice:
    """The slice of a name such as `v5e:4x4`. Raises ValueError for one that does not exist; it lists those that do."""
    generation, _, topology = name.partition(":")
    if generation not in GENERATIONS:
        raise ValueError(
            f"expected a topology such as v5e:4x4 of {', '.join(GENERATIONS)}, got '{name}'; change --topology"
        )
    facts = GENERATIONS[generation]
    if topology not in facts.topologies:
        raise ValueError(
            f"expected one of {', '.join(f'{generation}:{known}' for known in facts.topologies)}, got '{name}'; "
            "change --topology"
        )
    chips = math.prod(int(side) for side in topology.split("x"))
    return Slice(
        name=name,
        topology=topology,
        chips=chips,
        hosts=1 if chips <= facts.one_host else chips // 4,
        accelerator_type=f"{facts.accelerator}-{chips * facts.per_chip}",
        runtime=facts.runtime,
        gke=facts.gke,
    )
