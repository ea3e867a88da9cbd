"""Which mesh, how many rows and which remat policy: an analytic look at all of them, the compiler's word on the best.

The analytic model is coarse on purpose: it only decides what is worth compiling. What is reported was compiled.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hptjax.build.attention import training_implementation
from hptjax.build.mesh import check_mesh
from hptjax.config import Config, MeshConfig
from hptjax.config_batch import mesh_sizes, mesh_words, row_positions, rows_needed, samples_per_update, stage_list
from hptjax.model_shape import adapter_count, asked_adapter
from hptjax.models.shape import DecoderConfig
from hptjax.plan.chips import GIB, Slices
from hptjax.plan.count import layer_weights
from hptjax.plan.operations import program_flops
from hptjax.plan.topology import with_mesh

STATE_BYTES = 16  # fp32 parameters, two moments and the sums
GRADIENT_BYTES, COMPUTE_BYTES = 4, 2
# Arrays of D entries (about) that a layer keeps for its backward pass
KEPT_PER_TOKEN = {"full": 1.0, "offload": 0.1, "attention": 2.0, "dots_no_batch": 12.0, "dots": 13.0, "none": 20.0}
HEADROOM = 0.95  # of the memory: what the analytic model may fill
MOST_TENSOR = 16


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A config with another mesh, rows and remat, and the analytic model's word: bytes and tokens/s per device."""

    config: Config
    bytes: float
    tokens_per_s: float


def candidates(config: Config, shape: DecoderConfig, slices: Slices, remats: Sequence[Any]) -> list[Candidate]:
    """All that divide and may fit, the most promising first.

    Raises none -> ValueError: nothing divides, or how much the smallest would need.
    """
    all_that_divide = dividing(config, shape, slices, remats)
    room = HEADROOM * slices.chip.usable_bytes
    found = [candidate for candidate in all_that_divide if candidate.bytes <= room]
    if found:
        return sorted(found, key=lambda candidate: (-candidate.tokens_per_s, candidate.bytes))
    if not all_that_divide:
        raise ValueError(
            f"expected a mesh of {slices.name} over which {shape.num_heads} heads, {shape.num_kv_heads} kv heads, "
            f"hidden_size {shape.hidden_size}, rollout.slots {config.rollout.slots} and rollout.prefill_rows "
            f"{config.rollout.prefill_rows} divide, with batch.rows of at most the samples of an update, got none; "
            f"change --topology, or make rollout.slots and rollout.prefill_rows multiples of {slices.chips}"
        )
    least = min(all_that_divide, key=lambda candidate: candidate.bytes)
    raise ValueError(
        f"expected a mesh of {slices.name} on which a train step fits in {room / GIB:.2f} GiB per chip, got "
        f"{least.bytes / GIB:.2f} GiB (estimated) at least, with {mesh_words(least.config)}, batch.rows "
        f"{least.config.batch.rows} and remat {least.config.model.remat}; change --topology to more or larger chips"
    )


def dividing(config: Config, shape: DecoderConfig, slices: Slices, remats: Sequence[Any]) -> list[Candidate]:
    """All that divide, whether they may fit or not."""
    found = []
    for mesh in meshes(slices):
        parts = mesh.replica * mesh.data * mesh.fsdp
        for per_part in (1, 2, 4, 8, 16):
            for remat in remats:
                changed = with_choice(config, mesh, per_part * parts, remat)
                if divides(changed, shape):
                    found.append(judged(changed, shape, slices))
    return found


def meshes(slices: Slices) -> Iterator[MeshConfig]:
    """Every way to cut a slice's chips into data, fsdp, sequence and tensor by powers of two; slices are replicas."""
    chips = slices.chips_per_slice
    powers = [2**power for power in range(int(math.log2(chips)) + 1)]
    for tensor in (size for size in powers if size <= MOST_TENSOR):
        for sequence in (1, 2, 4):
            for data in powers:
                rest = chips // (tensor * sequence * data)
                if rest and rest * tensor * sequence * data == chips:
                    yield MeshConfig(replica=slices.count, data=data, fsdp=rest, sequence=sequence, tensor=tensor)


def with_choice(config: Config, mesh: MeshConfig, rows: int, remat: Any) -> Config:
    """The config with this mesh, these rows and this remat, and as many micro-batches as its samples then need."""
    capacity = config.batch.max_micro_batches * config.batch.rows
    batch = dataclasses.replace(config.batch, rows=rows, max_micro_batches=max(1, math.ceil(capacity / rows)))
    model = dataclasses.replace(config.model, remat=remat)
    return with_mesh(dataclasses.replace(config, batch=batch, model=model), mesh)


def divides(config: Config, shape: DecoderConfig) -> bool:
    """Whether everything that is cut over the mesh divides, and an update has the rows that a micro-batch wants."""
    try:
        check_mesh(config, shape)
        training_implementation(config, shape, config.mesh.sequence, "tpu")
    except ValueError:
        return False
    stage = stage_list(config)[-1]
    questions = stage.questions_per_step or config.data.questions_per_step
    samples = samples_per_update(config, method=stage.method, questions=questions)
    most = rows_needed(config, samples=samples, method=stage.method) if config.batch.share_prompts else samples
    return config.batch.rows <= max(most, 1)


def judged(config: Config, shape: DecoderConfig, slices: Slices) -> Candidate:
    """Bytes and tokens per second of a train step, by the analytic model."""
    sizes, batch, chip = mesh_sizes(config), config.batch, slices.chip
    gathered = sizes["fsdp"] if config.mesh.rules == "fsdp" else 1
    weights = layer_weights(shape) + shape.vocab_size * shape.hidden_size * (1 if shape.tie_embeddings else 2)
    tokens = batch.rows * row_positions(config) / (sizes["replica"] * sizes["data"] * sizes["fsdp"] * sizes["sequence"])
    kept = KEPT_PER_TOKEN[config.model.remat]
    activations = tokens * shape.num_layers * shape.hidden_size * COMPUTE_BYTES * kept
    # of one layer at work, forward and backward, and of the loss: two arrays of a chunk's logits
    working = tokens * (6 * shape.mlp_size + 8 * shape.hidden_size) * COMPUTE_BYTES / sizes["tensor"]
    own = tokens * batch.row_tokens / row_positions(config)  # a shared prompt has no logits
    chunk = min(config.model.logprob_chunk_tokens * own / (batch.rows * batch.row_tokens), own)
    activations += working + 2 * GRADIENT_BYTES * chunk * shape.vocab_size / sizes["tensor"]
    lora = asked_adapter(config)
    trained, still = (weights, 0) if lora is None else (adapter_count(shape, lora), COMPUTE_BYTES * weights)
    held = ((STATE_BYTES + GRADIENT_BYTES) * trained + still) / (gathered * sizes["tensor"])
    held += 2 * COMPUTE_BYTES * layer_weights(shape) / shape.num_layers / sizes["tensor"]  # the layers being gathered
    flops = program_flops(config, shape, "train step").total / slices.chips
    share = (gathered - 1) / gathered
    sent = share / sizes["tensor"] * (2 * COMPUTE_BYTES * weights + GRADIENT_BYTES * trained)
    if sizes["tensor"] > 1:
        sent += 6 * shape.num_layers * tokens * shape.hidden_size * COMPUTE_BYTES * 2
    if sizes["sequence"] > 1:  # keys and values of whole rows: forward, again, and their gradients back
        kv_heads = max(1, shape.num_kv_heads // sizes["tensor"])
        whole_rows = tokens * sizes["sequence"]
        sent += 6 * shape.num_layers * whole_rows * kv_heads * shape.head_dim * COMPUTE_BYTES
    copies = sizes["data"]
    if copies > 1:
        sent += 2 * (copies - 1) / copies * GRADIENT_BYTES * trained / (gathered * sizes["tensor"])
    between = 2 * (slices.count - 1) / slices.count * GRADIENT_BYTES * trained / (gathered * sizes["tensor"])
    # added up, as if nothing overlapped: of two that compute as long, the one that sends less per token is better
    seconds = flops / chip.flops + sent / chip.ring_bandwidth + between / chip.dcn_bandwidth
    return Candidate(config, held + activations, batch.rows * batch.row_tokens / seconds / slices.chips)


def largest_multiple(
    peak: Callable[[int], float], *, fixed: float, unit: int, start: int, room: float, most: int, tries: int = 4
) -> tuple[int, int | None]:
    """The largest multiple of `unit` up to `most` found to fit (0: none), and the smallest found not to, if any was.

    Args
      peak: bytes at so many rows; called at most `tries` times, so that between the two some may be left unknown.
      fixed: of them, those that are held whatever the rows. start: where to begin. room: bytes there are.

    Peaks grow with the rows, nearly in a line: after a look that fits, the line says where to look next.
    """
    fits: dict[int, float] = {}
    refused: int | None = None
    end = most // unit * unit + unit
    ask = max(unit, start // unit * unit)
    for _ in range(tries):
        size = peak(ask)
        if size <= room:
            fits[ask] = size
        else:
            refused = ask if refused is None else min(refused, ask)
        best = max(fits, default=0)
        if best + unit >= min(refused or end, end):
            break
        ask = max(_next({0: fixed, **fits}, unit, room), best + unit)
        if refused is not None and ask >= refused:  # the line is not straight: halfway
            ask = best + max((refused - best) // unit // 2, 1) * unit
        ask = min(ask, end - unit)
    return max(fits, default=0), refused


def _next(fits: dict[int, float], unit: int, room: float) -> int:
    if len(fits) < 2:
        return unit
    below, above = sorted(fits)[-2:]
    slope = (fits[above] - fits[below]) / (above - below)
    return int(above + max((room - fits[above]) / slope, 0.0)) // unit * unit if slope > 0 else 2 * above
