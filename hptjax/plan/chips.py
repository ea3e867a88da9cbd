"""What a TPU chip has, from its maker's public pages, and which slices of it exist.

Source: docs.cloud.google.com/tpu/docs, pages v5e, v5p and v6e, tables "key specifications" and "configurations" (read
  2026-11-21). Peak FLOP/s are of bfloat16. The pages give the links' bandwidth per chip, both directions together; a
  ring along one axis of the torus sends and receives over two of a chip's ports at once. Traffic between slices goes
  through the hosts' network cards, given here per chip. `usable_bytes` is what the compiler itself allows a program
  (its own words when one is too large); the rest of the memory is the runtime's.
"""

from __future__ import annotations

import dataclasses
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """The figures of one kind of chip that memory and time estimates are made of.

    Args
      hbm_bytes: memory. usable_bytes: of it, what a program may take. flops: bf16 per second. hbm_bandwidth: bytes/s.
      link_bandwidth: bytes/s that a chip sends through one port, one way. dcn_bandwidth: bytes/s per chip, one way.
      topologies: the slices that can be had, by name, up to 256 chips.
    """

    name: str
    hbm_bytes: int
    usable_bytes: int
    flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    dcn_bandwidth: float
    topologies: tuple[str, ...]

    @property
    def ring_bandwidth(self) -> float:
        """Bytes per second that a chip sends into a ring along one torus axis: both directions of it."""
        return 2 * self.link_bandwidth


FLAT = tuple("2x2 2x4 4x4 4x8 8x8 8x16 16x16".split())
CUBES = tuple("2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8".split())

CHIPS = {
    "v5e": Chip("v5e", 16 * GIB, int(15.75 * GIB), 197e12, 819e9, 400e9 / 4 / 2, 6.4e12 / 8 / 256, FLAT),
    "v5p": Chip("v5p", 95 * GIB, int(95.74 * GIB), 459e12, 2765e9, 1200e9 / 6 / 2, 50e9 / 8, CUBES),
    "v6e": Chip("v6e", 32 * GIB, int(31.25 * GIB), 918e12, 1638e9, 800e9 / 4 / 2, 4 * 200e9 / 8 / 8, FLAT),
}


@dataclasses.dataclass(frozen=True)
class Slices:
    """Chips of one kind: `count` slices of `layout`, joined by the data-centre network where there are several."""

    chip: Chip
    layout: str
    count: int = 1

    @property
    def chips_per_slice(self) -> int:
        """Product of the layout's sides."""
        total = 1
        for side in self.layout.split("x"):
            total *= int(side)
        return total

    @property
    def chips(self) -> int:
        """All of them."""
        return self.count * self.chips_per_slice

    @property
    def name(self) -> str:
        """As it is written on the command line."""
        return f"{'' if self.count == 1 else f'{self.count}x'}{self.chip.name}:{self.layout}"


def parse_topology(text: str) -> Slices:
    """`v5e:4x4` is one slice, `2xv5e:4x4` two.

    Raises another spelling, an unknown chip, a slice that does not exist -> ValueError with those that do.
    """
    match = re.fullmatch(r"(?:([1-9]\d*)x)?(v\w+):(\d+(?:x\d+)*)", text)
    if match is None:
        raise ValueError(
            f"expected a topology such as v5e:4x4, or 2xv5e:4x4 for two slices, got '{text}'; change --topology. "
            f"There are:\n{valid_topologies()}"
        )
    count, kind, layout = int(match[1] or 1), match[2], match[3]
    if kind not in CHIPS:
        raise ValueError(
            f"expected a chip among {', '.join(CHIPS)}, got '{kind}' in '{text}'; change --topology. "
            f"There are:\n{valid_topologies()}"
        )
    if layout not in CHIPS[kind].topologies:
        raise ValueError(
            f"expected a slice of {kind} that exists, got '{layout}' in '{text}'; change --topology to one of "
            f"{', '.join(f'{kind}:{name}' for name in CHIPS[kind].topologies)}"
        )
    return Slices(CHIPS[kind], layout, count)


def valid_topologies() -> str:
    """One line per chip."""
    return "\n".join(f"  {', '.join(f'{chip.name}:{layout}' for layout in chip.topologies)}" for chip in CHIPS.values())
