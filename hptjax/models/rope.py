"""Rotary position embedding, half-split as in the Hugging Face checkpoints: channel e turns with channel e + E/2."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from hptjax.models.shape import DecoderConfig, Llama3RopeScaling
from hptjax.types import Array


def frequencies(config: DecoderConfig) -> Float[np.ndarray, " E2"]:
    """Radians per position of each rotary pair: theta^(-2 e / E), stretched where the config says so.

    Computed in float64 on the host, so that every caller of every shape gets the same constants.

    Returns [E / 2] float32; radians per position.
    """
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    plain = config.rope_theta**-exponent
    scaled = plain if config.rope_scaling is None else _llama3_stretch(plain, config.rope_scaling)
    return scaled.astype(np.float32)


def _llama3_stretch(plain: Float[np.ndarray, " E2"], scaling: Llama3RopeScaling) -> Float[np.ndarray, " E2"]:
    """Long wavelengths slowed by `factor`, short ones kept, the band between blended linearly in 1 / wavelength."""
    turns = scaling.original_max_positions * plain / (2 * math.pi)  # full turns within the original context
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return keep * plain + (1.0 - keep) * plain / scaling.factor


def rotation(
    positions: Int[Array, "*shape"], config: DecoderConfig
) -> tuple[Float[Array, "*shape E2"], Float[Array, "*shape E2"]]:
    """Cosine and sine of every rotary pair's angle, in float32; computed once and shared by all layers."""
    table = jnp.asarray(frequencies(config)).reshape((1,) * positions.ndim + (-1,))
    angles = positions[..., None].astype(jnp.float32) * table
    return jnp.cos(angles), jnp.sin(angles)


def rotation_table(length: int, config: DecoderConfig) -> tuple[np.ndarray, np.ndarray]:
    """`rotation` of positions 0 to length - 1, each [length, E / 2] float32, made on the host.

    To look an angle up costs nothing where a program is written out layer by layer: of `rotation`, the CPU's compiler
    takes cosine and sine anew for every head of every layer.
    """
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies(config)[None, :]
    return np.cos(angles), np.sin(angles)


def rotate(
    heads: Float[Array, "B T N E"], cosine: Float[Array, "B T E2"], sine: Float[Array, "B T E2"]
) -> Float[Array, "B T N E"]:
    """Each head turned by its position's angles: (a, b) -> (a cos - b sin, b cos + a sin), a and b the two halves."""
    dtype = heads.dtype
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)  # [B T N E/2] each
    cosine, sine = cosine[:, :, None, :], sine[:, :, None, :]
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1).astype(dtype)
