"""A plain PyTorch loop as a target: backward() on every micro-batch, one optimizer step per window."""

from __future__ import annotations

import numpy as np
import torch

from hptjax.audit.job import Job, LinearBatch, accepts
from hptjax.audit.peers import require

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def token_loss_sum(theta: torch.Tensor, batch: LinearBatch) -> torch.Tensor:
    """Sum over the live tokens of features . theta; scalar, float32.

    The product is taken in float32 also of bf16 parameters, as language models do with their logits. So what bf16
    parameters lose here is lost by PyTorch in `.grad`, which it sums in the parameters' dtype.
    """
    features = torch.tensor(batch.features[batch.mask])  # [live F]
    return (features @ theta.float()).sum()


@accepts("linear")
def target(job: Job) -> list[np.ndarray]:
    """Parameters after every update, [F] float32 each."""
    require(job, "linear")
    theta = torch.nn.Parameter(torch.tensor(job.parameters).to(DTYPES[job.parameter_dtype]))
    optimizer = torch.optim.SGD([theta], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: job.learning_rates[min(step, len(job.learning_rates) - 1)]
    )
    after = []
    for window in job.windows:
        batches = [batch for batch in window if isinstance(batch, LinearBatch)]
        live_tokens = sum(int(batch.mask.sum()) for batch in batches)
        for batch in batches:
            (token_loss_sum(theta, batch) / live_tokens).backward()
        if job.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_([theta], job.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        after.append(theta.detach().float().numpy().copy())
    return after
