"""Reducers: what one live token of a sample weighs, decided on the host before an update is split.

    L = sum over samples i and their live tokens t of  w_i * loss_it,     w_i = c_i / Z    (`spec/accumulation.md` 3.1)

Nothing after this divides, so the gradients of any split into micro-batches simply add. A reducer is a function
`Population -> w [N]`, float64, where the population is that of one term: the demonstrations for SFT, the rollouts for
RL, either or both for entropy. The term's coefficient and the advantages come on top. Where terms share one normaliser
(preset `joint`) each of them hands in the samples of all and takes the weights of its own.

Symbols: n_i live tokens of sample i, N their sum, S samples with n_i > 0, P groups (prompts) with live tokens, n_p live
tokens of a group. A sample without live tokens weighs 0 and is not counted; an empty population gives zeros.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from hptjax.masked import inverse_count


@dataclasses.dataclass(frozen=True, eq=False)
class Population:
    """The samples of one term in one whole update.

    Args
      token_counts: live tokens of each sample; [N]; >= 0.
      group_ids: samples of one prompt share it; [N].
      partition: the logical micro-batch of each sample, numbered over all ranks; [N]. It is data, unrelated to how the
        update is run; only `legacy_micro_token_mean` and `official_sft` read it.
    Raises a negative token count, or arrays of different lengths -> ValueError.
    """

    token_counts: Int[np.ndarray, " N"]
    group_ids: Int[np.ndarray, " N"]
    partition: Int[np.ndarray, " N"] | None = None

    def __post_init__(self) -> None:
        lengths = {len(x) for x in (self.token_counts, self.group_ids, self.partition) if x is not None}
        if len(lengths) > 1:
            raise ValueError(f"population: expected arrays of one length, got {sorted(lengths)}")
        if (self.token_counts < 0).any():
            raise ValueError(f"token_counts: expected >= 0, got {int(self.token_counts.min())}")


Reducer = Callable[[Population], np.ndarray]


# The modes of spec/accumulation.md 3.1


def token_mean(population: Population) -> Float[np.ndarray, " N"]:
    """`1 / N`: every token weighs the same. DAPO (arXiv 2503.14476); verl token-mean; the correct SFT loss."""
    return _per_token(population, inverse_count(float(population.token_counts.sum())))


def seq_mean_token_mean(population: Population) -> Float[np.ndarray, " N"]:
    """`1 / (n_i S)`: every sequence weighs the same. GRPO (arXiv 2402.03300, Eq. 3)."""
    return _inverse_counts(population.token_counts) * inverse_count(_sequences(population))


def seq_mean_token_sum(population: Population) -> Float[np.ndarray, " N"]:
    """`1 / S`: the mean of the sequences' log-probs. RLOO and REINFORCE as published."""
    return _per_token(population, inverse_count(_sequences(population)))


def seq_sum_len(population: Population) -> Float[np.ndarray, " N"]:
    """`n_i / S`: a token weighs with the length of its sequence. LUSPO (TRL luspo)."""
    return population.token_counts * inverse_count(_sequences(population))


def prompt_mean(population: Population) -> Float[np.ndarray, " N"]:
    """`1 / (n_p P)`: every prompt weighs the same, and within it every token. Groups must be whole."""
    tokens_of_group = _sums_by(population.group_ids, population.token_counts)
    prompts = float(np.unique(population.group_ids[population.token_counts > 0]).size)
    return _live(population) * _inverse_counts(tokens_of_group) * inverse_count(prompts)


def dr_grpo(max_tokens: int) -> Reducer:
    """Makes `1 / (S max_tokens)`: a constant length, so that long and short sequences are judged alike.

    Args
      max_tokens: the configured limit on a completion's length (never a padded width).
    Source Liu et al. 2025, arXiv 2503.20783 (Dr.GRPO); TRL dr_grpo.
    """
    inverse_length = inverse_count(_positive("max_tokens", max_tokens))
    return lambda population: _per_token(population, inverse_length * inverse_count(_sequences(population)))


def constant(c: float | int) -> Reducer:
    """Makes `1 / c`: a sum on a fixed scale, the same for every update however large."""
    inverse = inverse_count(_positive("constant", c))
    return lambda population: _per_token(population, inverse)


def legacy_micro_token_mean(population: Population) -> Float[np.ndarray, " N"]:
    """`1 / (n_m k)`: mean over the k micro-batches of their token means. A mean of means, kept for comparison only.

    n_m are the live tokens of the sample's micro-batch, k the micro-batches with any. A token's weight depends on its
    neighbours: this is the defect of OpenRLHF up to 0.9.10 and of TRL's bnpo (`spec/accumulation.md` 1.2).
    Raises no partition -> ValueError.
    """
    partition = _partition(population, "legacy_micro_token_mean")
    micro_batches = float(np.unique(partition[population.token_counts > 0]).size)
    return _micro_token_mean(population, partition) * inverse_count(micro_batches)


# HPT's presets, design contract 5. Differences between them: spec/hpt.md 2.2 to 2.4

official_fixed_sft = token_mean  # total NLL / total demonstration tokens; the term's coefficient comes on top


def official_fixed_rl(max_tokens: int, rollout_rows: int) -> Reducer:
    """Makes `1 / (max_tokens C)` with C = rollout_rows / 64: the default, the same under any split.

    Args
      max_tokens: the configured maximum of response tokens (8192 in the recipes), never a shape.
      rollout_rows: configured rollout rows per update; 512 in the recipes, whose C = 8 sits where the published code's
        mean over 8 ranks does.
    """
    return constant(_positive("max_tokens", max_tokens) * _positive("rollout_rows", rollout_rows) / 64)


def official_rl(max_tokens: int, ranks: int) -> Reducer:
    """Makes `1 / (max_tokens ranks)`: a token sum over the padded response width, averaged over data-parallel ranks.

    No division by tokens, rows or groups, so a duplicated row counts twice.
    Source TsinghuaC3I/Unify-Post-Training@ae332f5, `compute_policy_loss` with both removals on (`spec/hpt.md` 2.2).
    """
    return constant(_positive("max_tokens", max_tokens) * _positive("ranks", ranks))


def official_sft(ranks: int) -> Reducer:
    """Makes `1 / (n_m ranks)`: token mean inside each logical micro-batch, summed over them, averaged over ranks.

    Depends on the partition, as published: two demonstrations with NLL sums 100 and 900 over 100 and 300 tokens cost
    2.5 in one micro-batch and 1 + 3 = 4 in two. A micro-batch without live tokens contributes 0 (the script skips its
    NaN). The script's entropy term has this form too, over rollouts and demonstrations together.
    Raises no partition -> ValueError, when called.
    Source TsinghuaC3I/Unify-Post-Training@ae332f5, `compute_sft_pure_loss` (`spec/hpt.md` 2.2).
    """
    inverse_ranks = inverse_count(_positive("ranks", ranks))
    return lambda population: (
        _micro_token_mean(population, _partition(population, "official_sft")) * inverse_ranks  # [N]
    )


def paper_rl(questions: int, max_tokens: int = 1) -> Reducer:
    """Makes `1 / (n_g questions max_tokens)`, n_g the group's rollouts: Eq. 11 per question, mean over questions.

    Args
      questions: of the whole update, SFT-gated ones included (the mean is over both kinds; the paper leaves it open).
      max_tokens: 1 is the equation as printed, a token sum beside Eq. 12's token mean, which outweighs it by about the
        response length. The configured maximum of response tokens brings the two to one scale.
    Source arXiv 2509.04419 v2, Eq. 11; `spec/hpt.md` 2.2.
    """
    inverse = inverse_count(_positive("questions", questions) * _positive("max_tokens", max_tokens))
    return lambda population: _inverse_counts(_sequences_of_group(population)) * _live(population) * inverse


def paper_sft(questions: int) -> Reducer:
    """Makes `1 / (n_i n_g questions)`: Eq. 12, token mean of the question's demonstration, mean over questions.

    Args
      questions: of the whole update, as in `paper_rl`. n_g counts the question's demonstrations, 1 in HPT.
    Source arXiv 2509.04419 v2, Eq. 12.
    """
    inverse = inverse_count(_positive("questions", questions))
    return lambda population: (
        _inverse_counts(population.token_counts) * _inverse_counts(_sequences_of_group(population)) * inverse  # [N]
    )


# Presets separate and joint (spec/accumulation.md 3.3): `token_mean` for every term. They differ in its population, the
# term's own samples or those of all terms together, which the term says (`hptjax.hpt.terms.Term.normalised_over`).


def _live(population: Population) -> np.ndarray:
    return (population.token_counts > 0).astype(np.float64)


def _per_token(population: Population, weight: float) -> np.ndarray:
    return _live(population) * weight


def _sequences(population: Population) -> float:
    return float((population.token_counts > 0).sum())


def _sequences_of_group(population: Population) -> np.ndarray:
    return _sums_by(population.group_ids, population.token_counts > 0)


def _micro_token_mean(population: Population, partition: np.ndarray) -> np.ndarray:
    return _live(population) * _inverse_counts(_sums_by(partition, population.token_counts))


def _sums_by(keys: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """For each sample, the sum of `counts` over the samples that share its key; int64, so exact."""
    _, key_of = np.unique(keys, return_inverse=True)
    sums = np.zeros(key_of.max(initial=-1) + 1, np.int64)
    np.add.at(sums, key_of, counts.astype(np.int64))
    return sums[key_of]


def _inverse_counts(counts: np.ndarray) -> np.ndarray:
    return np.array([inverse_count(float(count)) for count in counts], np.float64)


def _partition(population: Population, reducer: str) -> np.ndarray:
    if population.partition is None:
        raise ValueError(
            f"{reducer}: expected the logical micro-batch of every sample in Population.partition, got None; give it,"
            " or choose a reducer that needs no partition (token_mean, official_fixed)"
        )
    return population.partition


def _positive(name: str, value: float | int) -> float:
    if not value > 0:
        raise ValueError(f"{name}: expected a number > 0, got {value}")
    return float(value)
