"""The heap is trimmed after long compilations, inside the block alone, and never where there is no glibc."""

import contextlib

import jax
import numpy as np
import pytest

from hptjax.build import heap


def compile_one(factor):
    return jax.jit(lambda x: x * factor).lower(np.float32(1)).compile()


@pytest.fixture
def trims():
    return []


def test_trim_follows_each_compilation_inside_the_block(trims, monkeypatch):
    monkeypatch.setattr(heap, "LONG_S", 0.0)
    compile_one(2.0)
    with heap.trimmed_after_compilations(lambda: trims.append("inside")):
        compile_one(3.0)
        assert trims == ["inside"]
        with contextlib.suppress(KeyError), heap.trimmed_after_compilations(lambda: trims.append("inner")):
            raise KeyError
        compile_one(4.0)
    compile_one(5.0)
    assert trims == ["inside", "inside"]


def test_trim_leaves_short_compilations_alone(trims, monkeypatch):
    monkeypatch.setattr(heap, "LONG_S", 1e6)
    with heap.trimmed_after_compilations(lambda: trims.append("inside")):
        compile_one(6.0)
    assert trims == []


def test_trim_of_this_system_can_be_called_or_is_left_out(monkeypatch):
    found = heap._malloc_trim()
    assert found is None or found() in (0, 1)  # what glibc says: whether anything was given back
    monkeypatch.setattr(heap.sys, "platform", "darwin")
    assert heap._malloc_trim() is None
    with heap.trimmed_after_compilations():
        compile_one(7.0)
