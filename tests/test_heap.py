"""The heap is trimmed after long compilations, inside the block alone, and never where there is no glibc."""

import contextlib
import platform

import jax
import numpy as np
import pytest

from hptjax.build import heap
from hptjax.build.parts import open_parts
from tests import tiny


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


def test_trim_follows_compilations_of_whatever_opens_a_config(tmp_path, trims, monkeypatch):
    monkeypatch.setattr(heap, "LONG_S", 0.0)
    monkeypatch.setattr(heap, "_malloc_trim", lambda: lambda: trims.append("inside"))
    with open_parts(tiny.tiny_config(tmp_path)):
        trims.clear()
        compile_one(8.0)
        assert trims == ["inside"]
    compile_one(9.0)
    assert trims == ["inside"]


def test_trim_is_there_with_glibc_and_left_out_elsewhere(monkeypatch):
    found = heap._malloc_trim()
    if platform.libc_ver()[0] == "glibc":
        assert found is not None
        assert found() in (0, 1)  # what glibc says: whether anything was given back
    monkeypatch.setattr(heap.sys, "platform", "darwin")
    assert heap._malloc_trim() is None
    with heap.trimmed_after_compilations():
        compile_one(7.0)
