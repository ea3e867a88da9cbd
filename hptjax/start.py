"""Where the command `hptjax` begins: with the C heap in huge pages, if the system offers them.

On a CPU, XLA takes hundreds of MiB for every micro-step and gives them back, and the kernel hands them out anew, 4 KiB
at a time: a fifth to a third of a training step (`docs/benchmarks.md`). glibc asks for pages of 2 MiB only if it was
told so before a process began. So the process begins a second time, as itself.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import sys

TUNABLES = "GLIBC_TUNABLES"
TUNABLE = "glibc.malloc.hugetlb"
MODES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")  # such as "always [madvise] never"


def main() -> None:
    """The command line, after `restart_with_huge_pages`."""
    restart_with_huge_pages()
    from hptjax.cli import main as command

    command()


def restart_with_huge_pages() -> None:
    """Replaces this process by itself with huge pages, the same in id, arguments and open files.

    Returns where nothing would change, or the system refuses. To be called first, before anything heavy is imported.
    """
    tunables = tunables_for_huge_pages(os.environ.get(TUNABLES, ""), c_library(), modes())
    if tunables is not None and sys.executable:
        with contextlib.suppress(OSError):
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, TUNABLES: tunables})


def tunables_for_huge_pages(tunables: str, library: str, modes: str) -> str | None:
    """What GLIBC_TUNABLES has to be for huge pages in the heap, or None where setting it changes nothing.

    Args
      tunables: what it is. A choice about huge pages in it stands, `glibc.malloc.hugetlb=0` too.
      library: such as "glibc 2.36"; since 2.35 it knows the tunable.
      modes: the kernel's huge pages; only with "[madvise]" does a process have to ask.
    """
    if not heeds_asking(library, modes) or any(part.startswith(f"{TUNABLE}=") for part in tunables.split(":")):
        return None
    return ":".join([*filter(None, [tunables]), f"{TUNABLE}=1"])


def heeds_asking(library: str, modes: str) -> bool:
    """Whether a process has huge pages in its heap if it asks, and not otherwise."""
    name, _, version = library.partition(" ")
    numbers = version.split(".")[:2]
    known = name == "glibc" and all(number.isdigit() for number in numbers) and [*map(int, numbers)] >= [2, 35]
    return known and "[madvise]" in modes


def c_library() -> str:
    """Name and version of the C library, or "" where the system does not say."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # other systems; other C libraries
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    return ""


def modes() -> str:
    """The kernel's modes of huge pages, the chosen one in brackets, or "" where it has none."""
    with contextlib.suppress(OSError):
        return MODES.read_text(encoding="ascii")
    return ""
