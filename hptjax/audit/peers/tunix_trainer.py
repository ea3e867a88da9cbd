"""tunix's `PeftTrainer` as a target: its gradient accumulation and the loss that it has where none is given to it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.sft import hooks, peft_trainer, utils

from hptjax.audit.job import IGNORED, Job, accepts
from hptjax.audit.peers import token_batches, window_length


class Table(nnx.Module):
    """logits[b, t] = theta[input_tokens[b, t]], with the arguments and results of tunix's own models."""

    def __init__(self, theta: jax.Array) -> None:
        self.theta = nnx.Param(theta)

    def __call__(
        self, input_tokens: jax.Array, positions: jax.Array, cache: Any, attention_mask: jax.Array
    ) -> tuple[jax.Array, Any]:
        return self.theta[...][input_tokens].astype(jnp.float32), cache


class AfterUpdates(hooks.TrainingHooks):
    """Keeps the parameters after every update: as they stand when the next window begins, and when training ends.

    The trainer reports the end of an update one update late, so it is read at these places. A window that is open when
    training ends had no update.
    """

    def __init__(self, window_length: int) -> None:
        self.window_length = window_length
        self.parameters: list[np.ndarray] = []

    def keep(self, trainer: peft_trainer.PeftTrainer) -> None:
        if trainer.iter_steps and trainer.iter_steps % self.window_length == 0:
            self.parameters.append(np.array(trainer.model.theta[...].astype(jnp.float32)))

    def on_train_step_start(self, train_ctx: Any) -> None:
        self.keep(train_ctx)

    def on_train_end(self, train_ctx: Any) -> None:
        self.keep(train_ctx)

    def on_train_start(self, train_ctx: Any) -> None:
        pass

    def on_train_step_end(self, train_ctx: Any, train_step: int, train_loss: Any) -> None:
        pass

    def on_eval_step_start(self, train_ctx: Any) -> None:
        pass

    def on_eval_step_end(self, train_ctx: Any, eval_loss: Any) -> None:
        pass


def model_input(batch: peft_trainer.TrainingInput) -> dict[str, jax.Array]:
    """What the trainer's default loss takes; its input_mask is True on tokens that are trained on."""
    everywhere = jnp.ones(batch.input_tokens.shape, bool)
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": utils.build_positions_from_mask(everywhere),
        "attention_mask": utils.make_causal_attn_mask(everywhere),
    }


@accepts("tokens")
def target(job: Job) -> list[np.ndarray]:
    """Parameters after every update, [V V] float32 each."""
    batches = token_batches(job)
    length = window_length(job)
    rates = jnp.asarray(job.learning_rates, jnp.float32)
    optimizer = optax.sgd(lambda step: rates[jnp.minimum(step, len(rates) - 1)])
    if job.clip_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(job.clip_norm), optimizer)
    trainer = peft_trainer.PeftTrainer(
        Table(jnp.asarray(job.parameters, job.parameter_dtype)),
        optimizer,
        peft_trainer.TrainingConfig(
            eval_every_n_steps=len(batches) + 1, gradient_accumulation_steps=length if length > 1 else None
        ),
    )
    after = AfterUpdates(length)
    trainer.with_gen_model_input_fn(model_input)
    trainer.with_training_hooks(after)
    trainer.train(
        [
            peft_trainer.TrainingInput(input_tokens=batch.input_ids, input_mask=batch.labels != IGNORED)
            for batch in batches
        ]
    )
    return after.parameters
