"""What transformers says about a model: logits, gradients, greedy and sampled tokens. fp32, eager attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.oracles.cases import (
    GREEDY_TOKENS,
    LENGTHS,
    PROMPT_LENGTHS,
    SAMPLED_TOKENS,
    TEMPERATURE,
    padded,
    sequences,
)


def logits(model: Any, rows: np.ndarray, lengths: Any) -> np.ndarray:
    """[B T V] of right-padded rows, with the mask of their lengths."""
    mask = np.arange(rows.shape[1])[None, :] < np.asarray(lengths)[:, None]
    with torch.no_grad():
        found = model(input_ids=_ids(rows), attention_mask=torch.from_numpy(mask.astype(np.int64)))
    return found.logits.numpy()


def cached_logits(model: Any, tokens: np.ndarray, prompt: int) -> np.ndarray:
    """[T - P + 1, V]: of the prompt's last token, then of one token at a time through transformers' cache."""
    with torch.no_grad():
        step = model(input_ids=_ids(tokens[None, :prompt]), use_cache=True)
        found = [step.logits[0, -1]]
        for token in tokens[prompt:]:
            step = model(input_ids=_ids(np.array([[token]])), past_key_values=step.past_key_values, use_cache=True)
            found.append(step.logits[0, -1])
    return torch.stack(found).numpy()


def loss_and_gradients(model: Any, parts: list[np.ndarray], prompts: Any) -> tuple[float, dict[str, np.ndarray]]:
    """transformers' own loss, the mean over all completion tokens, and its gradient by key of the checkpoint."""
    rows, labels = (
        padded(parts),
        padded([_labels(part, prompt) for part, prompt in zip(parts, prompts, strict=True)], -100),
    )
    mask = np.arange(rows.shape[1])[None, :] < np.array([len(part) for part in parts])[:, None]
    model.zero_grad()
    found = model(input_ids=_ids(rows), attention_mask=torch.from_numpy(mask.astype(np.int64)), labels=_ids(labels))
    found.loss.backward()
    return float(found.loss.detach()), {key: value.grad.numpy().copy() for key, value in model.named_parameters()}


def generate(
    model: Any, prompt: np.ndarray, tokens: int, *, temperature: float | None = None, seed: int = 0
) -> np.ndarray:
    """The completion of a prompt by `generate`, greedy or sampled; nothing ends it before its length."""
    torch.manual_seed(seed)
    options = {"do_sample": False} if temperature is None else {"do_sample": True, "temperature": temperature}
    with torch.no_grad():
        found = model.generate(
            input_ids=_ids(prompt[None]),
            attention_mask=torch.ones((1, len(prompt)), dtype=torch.int64),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            eos_token_id=None,
            pad_token_id=0,
            top_k=0 if temperature is not None else None,
            **options,
        )
    return found[0, len(prompt) :].numpy().astype(np.int32)


def completion_logprobs(model: Any, prompt: np.ndarray, completion: np.ndarray, temperature: float) -> np.ndarray:
    """log softmax(logits / temperature) of each completion token, in float64."""
    whole = np.concatenate([prompt, completion])[None]
    scaled = logits(model, whole, [whole.shape[1]])[0, len(prompt) - 1 : -1].astype(np.float64) / temperature
    scaled -= scaled.max(axis=-1, keepdims=True)
    normalised = scaled - np.log(np.exp(scaled).sum(axis=-1, keepdims=True))
    return normalised[np.arange(len(completion)), completion]


def everything(model: Any) -> dict[str, np.ndarray]:
    """What is kept of a model: arrays by name; gradients as `gradient KEY`."""
    parts = sequences()
    prompts = [part[:length] for part, length in zip(parts, PROMPT_LENGTHS, strict=True)]
    loss, gradients = loss_and_gradients(model, parts, PROMPT_LENGTHS)
    greedy = [generate(model, prompt, GREEDY_TOKENS) for prompt in prompts]
    sampled = [
        generate(model, prompt, SAMPLED_TOKENS, temperature=TEMPERATURE, seed=seed)
        for seed, prompt in enumerate(prompts)
    ]
    scored = [
        completion_logprobs(model, prompt, completion, TEMPERATURE)
        for prompt, completion in zip(prompts, sampled, strict=True)
    ]
    return {
        "logits": logits(model, padded(parts), LENGTHS),
        "cached": np.concatenate(
            [cached_logits(model, part, length) for part, length in zip(parts, PROMPT_LENGTHS, strict=True)]
        ),
        "loss": np.float64(loss),
        "greedy": np.stack(greedy),
        "greedy_gap": np.array([_gap(model, prompt, one) for prompt, one in zip(prompts, greedy, strict=True)]),
        "sampled": np.stack(sampled),
        "sampled_logprobs": np.stack(scored).astype(np.float32),
    } | {f"gradient {key}": value for key, value in gradients.items()}


def _gap(model: Any, prompt: np.ndarray, completion: np.ndarray) -> float:
    """The smallest lead of a greedy token over the next best: far above rounding, or the test would be a coin toss."""
    whole = np.concatenate([prompt, completion])[None]
    ranked = np.sort(logits(model, whole, [whole.shape[1]])[0, len(prompt) - 1 : -1], axis=-1)
    return float((ranked[:, -1] - ranked[:, -2]).min())


def _labels(part: np.ndarray, prompt: int) -> np.ndarray:
    return np.where(np.arange(len(part)) < prompt, -100, part)


def _ids(rows: np.ndarray) -> Any:
    return torch.from_numpy(np.asarray(rows, np.int64))
