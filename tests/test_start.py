"""The command begins with a heap in huge pages: where it has to ask, once, as the same process, unless told not to."""

import json
import os
import platform
import subprocess
import sys

import pytest

import hptjax.build.parts as build_parts
from hptjax import start
from hptjax.rundir import compile_cache_folder

MADVISE = "always [madvise] never\n"
TELL = """
import json, os, sys
from hptjax import start
start.c_library, start.modes = lambda: "glibc 2.36", lambda: "always [madvise] never"
print(os.getpid(), flush=True)
start.restart_with_huge_pages()
print(json.dumps([os.environ.get("GLIBC_TUNABLES"), sys.argv[1:], sys.flags.dont_write_bytecode, sys.stdin.read()]))
"""
TAKE = """
import resource
from hptjax import start
start.restart_with_huge_pages()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
taken = bytearray(b"x") * (128 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize(
    ("tunables", "library", "modes", "expected"),
    [
        ("", "glibc 2.36", MADVISE, "glibc.malloc.hugetlb=1"),
        ("", "glibc 2.35", MADVISE, "glibc.malloc.hugetlb=1"),
        ("", "glibc 3.0", MADVISE, "glibc.malloc.hugetlb=1"),
        ("", "glibc 2.39.9000", MADVISE, "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.arena_max=2", "glibc 2.36", MADVISE, "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc 2.36", MADVISE, None),
        ("glibc.malloc.arena_max=2:glibc.malloc.hugetlb=2", "glibc 2.36", MADVISE, None),
        ("", "glibc 2.34", MADVISE, None),
        ("", "glibc 1.99", MADVISE, None),
        ("", "glibc", MADVISE, None),
        ("", "glibc x.y", MADVISE, None),
        ("", "musl 1.2", MADVISE, None),
        ("", "", MADVISE, None),
        ("", "glibc 2.36", "[always] madvise never\n", None),
        ("", "glibc 2.36", "always madvise [never]\n", None),
        ("", "glibc 2.36", "", None),
    ],
)
def test_start_asks_for_huge_pages_where_that_changes_something(tunables, library, modes, expected):
    assert start.tunables_for_huge_pages(tunables, library, modes) == expected


def run(code, **environment):
    """Lines that a process prints which has this in its environment, and no choice of tunables but one in it."""
    beside = {name: value for name, value in os.environ.items() if name != start.TUNABLES}
    done = subprocess.run(
        [sys.executable, "-B", "-c", code, "a b", "--c"],
        input="words for it", env=beside | environment, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return done.stdout.splitlines()


def told(**environment):
    """(process ids as printed, what the last one told) of a process that asks for huge pages."""
    *ids, last = run(TELL, **environment)
    return ids, json.loads(last)


def test_start_is_the_same_process_with_the_same_words_once():
    ids, rest = told()
    assert len(ids) == 2
    assert ids[0] == ids[1]
    assert rest == ["glibc.malloc.hugetlb=1", ["a b", "--c"], 1, "words for it"]


def test_start_leaves_a_choice_alone():
    ids, rest = told(GLIBC_TUNABLES="glibc.malloc.hugetlb=0")
    assert len(ids) == 1
    assert rest[0] == "glibc.malloc.hugetlb=0"


def test_start_goes_on_where_the_system_refuses(monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(start.os, "execve", refuse)
    monkeypatch.setattr(start, "c_library", lambda: "glibc 2.36")
    monkeypatch.setattr(start, "modes", lambda: MADVISE)
    monkeypatch.delenv(start.TUNABLES, raising=False)
    start.restart_with_huge_pages()


def test_start_is_where_the_command_begins(monkeypatch):
    """`[project.scripts]`, and then the command line."""
    done = []
    monkeypatch.setattr(start, "restart_with_huge_pages", lambda: done.append("pages"))
    monkeypatch.setattr("hptjax.cli.main", lambda: done.append("command"))
    start.main()
    assert done == ["pages", "command"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says")
def test_start_reads_what_this_system_says():
    name, version = platform.libc_ver()
    assert start.c_library() == (f"{name} {version}" if name == "glibc" else "")
    assert start.modes() == (start.MODES.read_text() if start.MODES.exists() else "")


@pytest.mark.skipif(
    start.tunables_for_huge_pages("", start.c_library(), start.modes()) is None, reason="this system need not be asked"
)
def test_start_saves_page_faults():
    """128 MiB taken and written: 32,768 pages of 4 KiB, or 64 of 2 MiB."""
    faults = [int(run(TAKE, **{start.TUNABLES: f"{start.TUNABLE}={choice}"})[-1]) for choice in (0, 1)]
    assert faults[0] > 30_000
    assert faults[1] < 10_000
    assert int(run(TAKE)[-1]) < 10_000


@pytest.mark.parametrize("own", [{}, {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "7"}], ids=["", "with its time"])
@pytest.mark.parametrize("folder", [{}, {"JAX_COMPILATION_CACHE_DIR": "elsewhere"}], ids=["", "with its folder"])
def test_start_keeps_short_compilations_too_unless_the_environment_says_otherwise(own, folder, monkeypatch):
    """Of jax's two settings each stands by itself; jax alone keeps nothing below a second, and has no folder."""
    for name in ("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    code = """
import jax
from hptjax.build.parts import use_compile_cache
use_compile_cache()
print(jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs)
"""
    where, seconds = run(code, **own, **folder)[-1].rsplit(" ", 1)
    assert float(seconds) == (7.0 if own else build_parts.WORTH_KEEPING_S)
    assert where == ("elsewhere" if folder else str(compile_cache_folder()))
    chosen = "import jax\njax.config.update('jax_persistent_cache_min_compile_time_secs', 5.0)\n"
    assert float(run(chosen + code, **own, **folder)[-1].rsplit(" ", 1)[1]) == 5.0
