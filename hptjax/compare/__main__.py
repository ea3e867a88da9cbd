"""The tables of a finished comparison again: `python -m hptjax.compare PATH`.

PATH is a comparison's folder, whose raw counts are then read anew, or a compare.json, whose figures are only printed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hptjax.compare.report import REPORT, read_off
from hptjax.compare.text import as_text
from hptjax.rundir import read_json


def recomputed(root: Path) -> dict[str, Any]:
    """The report of a comparison's folder from the counts and the spending of its runs; compare.json says only which.

    What was tuned is no figure of these runs and is taken over.
    """
    known = read_json(root / REPORT)
    report = read_off(root, list(known["questions"]), known["seeds"], ks=known["ks"], **known["counts_by"])
    return report | {"tuned": known["tuned"]}


def main(arguments: list[str]) -> int:
    """Prints the tables; status 2 where there is no comparison."""
    path = Path(arguments[0]) if len(arguments) == 1 else None
    if path is None or not (path / REPORT if path.is_dir() else path).is_file():
        print(f"expected the folder of a comparison or its {REPORT}, got {' '.join(arguments)!r}", file=sys.stderr)
        return 2
    print(as_text(recomputed(path) if path.is_dir() else read_json(path)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
