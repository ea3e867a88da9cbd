"""Examples as the model meets them: the prompt written out, by a chat template or around a plain text, and the tokens.

Prompt and demonstration are encoded apart, because the model continues the tokens of the prompt as it stands: no token
reaches across. Text of a user that writes a special token out is refused, row by row.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from hptjax.data.chat import ChatTemplate, Message, Render, TemplateRefusal, answer_parts, check_prompt
from hptjax.data.tokenizer import Tokenizer, encode_many, has_specials
from hptjax.records import Example, Question

Write = Callable[[Example], Example]
"""An example with its prompt written out, and its demonstration as it follows it. Raises TemplateRefusal."""

Encode = Callable[[Sequence[Example]], list[Question | str]]
"""Examples -> for each its question, or one of `prepare.DROP_REASONS`. No demonstration has no tokens."""

THINK = "<think>\n"
SYSTEM_ROLES = frozenset({"system", "developer"})


def with_turns(example: Example, *, system: str | None, suffix: str) -> Example:
    """The example with its turns as the config wants them.

    Args
      system: None: the row's own system turns; "": none; a text: one with this text instead of the row's.
      suffix: put after the last question, unless that ends with it.
    """
    turns = [dict(turn) for turn in example.messages]
    if system is not None:
        turns = [turn for turn in turns if turn["role"] not in SYSTEM_ROLES]
        turns = [{"role": "system", "content": system}, *turns] if system else turns
    if suffix and not turns[-1]["content"].endswith(suffix):
        turns[-1]["content"] += suffix
    return dataclasses.replace(example, messages=tuple(turns), prompt=turns[-1]["content"])


def chat_writer(tokenizer: Tokenizer, template: ChatTemplate) -> Write:
    """By a chat template, which also writes the demonstration: what it ends with is `template.stop_tokens`."""

    def write(example: Example) -> Example:
        _refuse_specials(tokenizer, example)
        if not example.demonstration:
            prompt, body = template.render(example.messages, example.tools, generation_prompt=True), ""
        else:
            prompt, body = answer_parts(template, example.messages, example.demonstration, example.tools)
        check_prompt(template.render, prompt, example.messages, example.tools)
        return dataclasses.replace(example, prompt=prompt, demonstration=body)

    return write


def chat_prompt_writer(tokenizer: Tokenizer, render: Render) -> Write:
    """The prompt by a chat template, the demonstration as it is, as HPT and LUFFY train; it ends with the eos.

    A `<think>` line that the prompt ends with is taken from the demonstration's beginning (spec/hpt.md 3.1).
    """

    def write(example: Example) -> Example:
        _refuse_specials(tokenizer, example)
        prompt = render(example.messages, example.tools, generation_prompt=True)
        check_prompt(render, prompt, example.messages, example.tools)
        return dataclasses.replace(example, prompt=prompt, demonstration=_continued(prompt, example.demonstration))

    return write


def plain_writer(form: str) -> Write:
    """One question within a text, for models without a chat template; the demonstration as it is.

    Args
      form: the prompt, with the question in the place of `{question}`.
    """

    def write(example: Example) -> Example:
        if len(example.messages) != 1:
            raise TemplateRefusal(
                "several_turns",
                f"expected a conversation of one question for prompt.template 'plain', got {len(example.messages)} "
                "turns; set prompt.system to '' where the first of them is a system turn",
            )
        prompt = form.replace("{question}", example.messages[0]["content"])
        return dataclasses.replace(example, prompt=prompt, demonstration=_continued(prompt, example.demonstration))

    return write


def as_written(example: Example) -> Example:
    """For tasks that write their own prompts."""
    return example


def make_encode(
    tokenizer: Tokenizer, write: Write, *, start: Sequence[int], stop: Int[np.ndarray, " s"], rendered: bool
) -> Encode:
    """The encoder of a run.

    Args
      start: tokens before the prompt's text: the bos, or none. stop: tokens after a demonstration, the stop one last.
      rendered: whether special tokens may stand in a prompt's text, because a template wrote them.
    """

    def encode(examples: Sequence[Example]) -> list[Question | str]:
        written = [_attempt(write, example) for example in examples]
        kept = [example for example in written if not isinstance(example, str)]
        prompts = iter(encode_many(tokenizer, [example.prompt for example in kept], specials=rendered))
        answers = iter(encode_many(tokenizer, [example.demonstration for example in kept], specials=False))
        found: list[Question | str] = []
        for example in written:
            if isinstance(example, str):
                found.append(example)
                continue
            prompt, answer = next(prompts), next(answers)
            if prompt is None or answer is None:
                found.append("not_encodable")
                continue
            whole = np.asarray([*answer, *stop.tolist()] if example.demonstration else [], np.int32)
            found.append(Question(_with_thinking(example), np.asarray([*start, *prompt], np.int32), whole))
        return found

    return encode


def _with_thinking(example: Example) -> Example:
    """The example; where its prompt has opened a thought, its gold answer says so: completions begin inside one."""
    if not example.prompt.rstrip().endswith(THINK.rstrip()) or "answer" not in example.answer:
        return example
    return dataclasses.replace(example, answer={**example.answer, "thinking": True})


def _attempt(write: Write, example: Example) -> Example | str:
    try:
        return write(example)
    except TemplateRefusal as refusal:
        return refusal.reason


def _refuse_specials(tokenizer: Tokenizer, example: Example) -> None:
    said: list[Message | Mapping[str, Any]] = [*example.messages, *example.tools]
    if has_specials(tokenizer, json.dumps(said, ensure_ascii=False)):
        raise TemplateRefusal("not_encodable", "expected turns without special tokens written out")


def _continued(prompt: str, demonstration: str) -> str:
    return demonstration.removeprefix(THINK) if prompt.endswith(THINK) else demonstration
