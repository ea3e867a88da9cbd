"""The settings every test runs under, made before jax loads.

Eight CPU devices stand in for a mesh. Mixed dtypes and mixed ranks raise, so no test passes by a silent promotion.
Public signatures of hptjax are checked against their jaxtyping shapes while tests run (beartype).
Compiled programs are kept between runs: in JAX_COMPILATION_CACHE_DIR where that is set, else beside pytest's own cache.
"""

from __future__ import annotations

import os
import pathlib

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
DEVICES = 8

os.environ["JAX_PLATFORMS"] = os.environ.get("HPTJAX_TEST_PLATFORMS", "cpu")
device_flag = f"--xla_force_host_platform_device_count={DEVICES}"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {device_flag}".strip()
os.environ.setdefault("PJRT_NPROC", str(2 * DEVICES))  # as `build.mesh.offer_cpu_devices` does, and says why
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a network
os.environ.setdefault("MPLBACKEND", "Agg")

import jaxtyping  # noqa: E402  (the environment above must be set before anything loads jax)

import_hook = jaxtyping.install_import_hook("hptjax", "beartype.beartype")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

hypothesis.settings.register_profile("untimed", deadline=None)  # an example's time says how busy the machine is
hypothesis.settings.load_profile("untimed")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def repository() -> pathlib.Path:
    """The repository's root."""
    return REPOSITORY


@pytest.fixture
def eight_devices() -> list[jax.Device]:
    """The first eight devices; an error where the machine was told to show fewer."""
    devices = jax.devices()
    if len(devices) < DEVICES:
        raise RuntimeError(f"these tests need {DEVICES} devices, found {len(devices)}; check XLA_FLAGS")
    return devices[:DEVICES]
