"""What is wrong with a config, in three texts."""

from __future__ import annotations

Problem = tuple[str, str, str]
"""What was expected, what came, what to change."""
