"""The composition root: the one place that sees the whole config and puts the parts together.

`train`, `evaluate` and `sample` are what the commands call, and what a notebook calls.
"""

from hptjax.build.commands import evaluate, sample
from hptjax.build.run import train

__all__ = ["evaluate", "sample", "train"]
