"""Hugging Face's `Trainer` as a target: its gradient accumulation and token count, and its causal models' loss."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import accelerate  # noqa: F401  (Trainer needs it; without it the import says so, rather than every job)
import numpy as np
import torch
import transformers
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from hptjax.audit.job import Job, accepts
from hptjax.audit.peers import token_batches, window_length

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class TableConfig(transformers.PreTrainedConfig):
    """The vocabulary's size."""

    model_type = "audit_table"

    def __init__(self, vocab_size: int = 2, **kwargs: Any) -> None:
        self.vocab_size = self.hidden_size = vocab_size
        super().__init__(**kwargs)


class Table(torch.nn.Module):
    """hidden[b, t] = theta[input_ids[b, t]], where theta [V V] is the only parameter trained."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(vocab_size, vocab_size)

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.embed_tokens(input_ids))


class TableForCausalLM(transformers.PreTrainedModel, transformers.GenerationMixin):
    """The table model in the parts that trainers look for: a backbone and a head, which is the frozen unit matrix.

    The class name ends as causal models' names do, because `Trainer` finds the loss by it.
    """

    config_class = TableConfig
    base_model_prefix = "model"

    def __init__(self, config: TableConfig) -> None:
        super().__init__(config)
        self.model = Table(config.vocab_size)
        self.lm_head = torch.nn.Linear(config.vocab_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.lm_head

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutput(loss=loss, logits=logits)


def table_model(job: Job) -> TableForCausalLM:
    """The table model that holds a job's parameters in the dtype asked for."""
    model = TableForCausalLM(TableConfig(vocab_size=job.parameters.shape[0]))
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.tensor(job.parameters))
        model.lm_head.weight.copy_(torch.eye(job.parameters.shape[0]))
    model.lm_head.requires_grad_(False)
    return model.to(DTYPES[job.parameter_dtype])


def sgd(
    model: TableForCausalLM, learning_rates: Sequence[float]
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """SGD and the schedule that gives update s the rate learning_rates[s]."""
    optimizer = torch.optim.SGD([model.model.embed_tokens.weight], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rates[min(step, len(learning_rates) - 1)]
    )
    return optimizer, schedule


class AfterUpdates(transformers.TrainerCallback):
    """Keeps the parameters after every update."""

    def __init__(self) -> None:
        self.parameters: list[np.ndarray] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.parameters.append(kwargs["model"].model.embed_tokens.weight.detach().float().numpy().copy())


def settings(job: Job, folder: str) -> dict[str, Any]:
    """Training arguments of a job, for `Trainer` and for the trainers built on it: one pass over the rows in order."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": token_batches(job)[0].input_ids.shape[0],
        "gradient_accumulation_steps": window_length(job),
        "num_train_epochs": 1,
        "max_grad_norm": job.clip_norm or 0.0,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def train(trainer: transformers.Trainer) -> list[np.ndarray]:
    """Parameters after every update of a prepared trainer."""
    after = AfterUpdates()
    trainer.add_callback(after)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return after.parameters


@accepts("tokens")
def target(job: Job) -> list[np.ndarray]:
    """Parameters after every update, [V V] float32 each."""
    rows = [
        {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        for batch in token_batches(job)
        for input_ids, attention_mask, labels in zip(
            batch.input_ids.astype(np.int64),
            batch.attention_mask.astype(np.int64),
            batch.labels.astype(np.int64),
            strict=True,
        )
    ]
    model = table_model(job)
    with tempfile.TemporaryDirectory() as folder:
        return train(
            transformers.Trainer(
                model=model,
                args=transformers.TrainingArguments(**settings(job, folder)),
                train_dataset=rows,
                optimizers=sgd(model, job.learning_rates),
            )
        )
