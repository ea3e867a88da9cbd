"""Token losses: array functions that return one value per token, and the host-side weights that turn tokens into a sum.

Nothing here reduces, knows a model or reads a config. Start with `table.py` (what each method chooses), then `upge.py`
(what all methods share).
"""
