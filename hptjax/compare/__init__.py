"""Several methods from the same base model under the same budget: one table, one plot, whatever comes out.

Budgets come from the first arm's own run: its updates, its tokens (generated + trained) and its FLOPs. Every other arm
is read off three times, where it had spent each budget (on the straight line between the two nearest evaluations), or
at its end where it never did: an arm that samples nothing is made long enough for all three, an arm with SFT before it
has the first arm's number of steps after its own SFT steps, the others have the first arm's number of steps. Equal
updates favour arms that generate much per update, equal FLOPs favour SFT. Which figure and which budget count is said
in the config before anything runs (`compare.metric`, `compare.axis`). Nothing is chosen on test questions.

FLOPs are 2 N per token generated or prefilled and 6 N per position trained, N the parameters a token meets.
Source `spec/diagnostics.md` 6.1, 6.2 and 12.3.
"""

from hptjax.compare.run import compare

__all__ = ["compare"]
