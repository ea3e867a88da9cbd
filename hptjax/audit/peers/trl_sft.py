"""TRL's `SFTTrainer` as a target: its collator, and its loss from the fused head; tokens and labels are prepared."""

from __future__ import annotations

import tempfile

import datasets
import numpy as np
import tokenizers
import transformers
import trl

from hptjax.audit.job import Job, accepts
from hptjax.audit.peers import token_batches, unpadded_rows
from hptjax.audit.peers.transformers_trainer import settings, sgd, table_model, train


def tokenizer(vocab_size: int) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer that the trainer asks for its padding token and otherwise never uses; padding is token 0."""
    words = {f"<{index}>": index for index in range(vocab_size)}
    model = tokenizers.models.WordLevel(words, unk_token="<0>")  # noqa: S106  (a word of the vocabulary, no password)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model), pad_token="<0>")  # noqa: S106


@accepts("tokens")
def target(job: Job) -> list[np.ndarray]:
    """Parameters after every update, [V V] float32 each.

    Differs from the trainer's defaults where they would blur the comparison: no bf16 autocast, no gradient
    checkpointing. Rows are given as they are (`skip_prepare_dataset`), so nothing is packed, cut or added to them.
    """
    rows = [row for batch in token_batches(job) for row in unpadded_rows(batch)]
    model = table_model(job)
    with tempfile.TemporaryDirectory() as folder:
        return train(
            trl.SFTTrainer(
                model=model,
                args=trl.SFTConfig(
                    **settings(job, folder),
                    bf16=False,
                    gradient_checkpointing=False,
                    packing=False,
                    dataset_kwargs={"skip_prepare_dataset": True},
                ),
                train_dataset=datasets.Dataset.from_list(rows),
                processing_class=tokenizer(job.parameters.shape[0]),
                optimizers=sgd(model, job.learning_rates),
            )
        )
