"""From the config and a tokenizer to the function that makes questions of examples."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hptjax.config import Config, PromptConfig
from hptjax.data.chat import (
    QUESTION,
    ChatTemplate,
    TemplateRefusal,
    open_template,
    prompt_render,
    template_digest,
)
from hptjax.data.prompts import (
    Encode,
    Write,
    as_written,
    chat_prompt_writer,
    chat_writer,
    make_encode,
    plain_writer,
    with_turns,
)
from hptjax.records import Example


@dataclasses.dataclass(frozen=True, eq=False)
class PromptFormat:
    """How examples become questions.

    Args
      encode: examples to questions. ask: a text of a user as an example, for `encode`.
      record: what a run is bound to, as JSON values: the template's digest, its date.
      template: the chat template, where it also writes the demonstrations.
    """

    encode: Encode
    ask: Callable[[str], Example]
    record: Mapping[str, Any]
    template: ChatTemplate | None = None


def build_prompts(config: Config, tokenizer: Any, stop_ids: frozenset[int]) -> PromptFormat:
    """The prompt format of a config.

    Args
      stop_ids: the tokens that end a completion.
    Raises a chat template that cannot be used -> ValueError that says what it does and what to change.
    """
    return turn_prompts(config, tokenizer, stop_ids) if config.data.files else task_prompts(tokenizer)


def task_prompts(tokenizer: Any) -> PromptFormat:
    """For a task's own questions, which are written out already."""
    eos, bos = _ends(tokenizer)
    encode = make_encode(tokenizer, as_written, start=bos, stop=eos, rendered=False)
    return PromptFormat(encode, lambda said: _example(said, turns=False), {})


def turn_prompts(config: Config, tokenizer: Any, stop_ids: frozenset[int]) -> PromptFormat:
    """For questions in turns, by `prompt.*`. Arguments and errors are those of `build_prompts`."""
    eos, bos = _ends(tokenizer)
    prompt = config.prompt
    if prompt.template == "plain":
        if prompt.bos and not bos:
            raise ValueError(
                f"expected a tokenizer with a bos token for prompt.bos, got none in '{tokenizer.name_or_path}'; change "
                "prompt.bos to false"
            )
        write = _with_turns(plain_writer(prompt.plain), prompt)
        encode = make_encode(tokenizer, write, start=bos if prompt.bos else [], stop=eos, rendered=False)
        return PromptFormat(encode, _example, {"template": "plain"})
    date = datetime.date.fromisoformat(prompt.date)
    if prompt.end == "eos":
        render = prompt_render(tokenizer, date=date)
        write = _with_turns(chat_prompt_writer(tokenizer, render), prompt)
        _try_out(write, prompt)
        bound = {"template": "chat", "digest": template_digest(tokenizer, render), "end": "eos"}
        return PromptFormat(make_encode(tokenizer, write, start=[], stop=eos, rendered=True), _example, bound)
    template = open_template(tokenizer, date=date, stop_ids=stop_ids)
    write = _with_turns(chat_writer(tokenizer, template), prompt)
    _try_out(write, prompt)
    record: dict[str, Any] = {
        "template": "chat",
        "digest": template.digest,
        "end": template.stop,
        "date": prompt.date if template.dated else None,
    }
    encode = make_encode(tokenizer, write, start=[], stop=template.stop_tokens, rendered=True)
    return PromptFormat(encode, _example, record, template)


def _ends(tokenizer: Any) -> tuple[np.ndarray, list[int]]:
    """(what ends a completion that no template ends, what stands before a prompt that none begins)."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return np.asarray([tokenizer.eos_token_id], np.int32), bos


def _with_turns(write: Write, prompt: PromptConfig) -> Write:
    return lambda example: write(with_turns(example, system=prompt.system, suffix=prompt.suffix))


def _try_out(write: Write, prompt: PromptConfig) -> None:
    """Raises ValueError where no question can be put with `prompt.system` and `prompt.suffix`, which each one has."""
    try:
        write(_example(str(QUESTION["content"])))
    except TemplateRefusal as refusal:
        fields = {"prompt.system": prompt.system, "prompt.suffix": prompt.suffix}
        if given := [name for name, said in fields.items() if said]:
            raise ValueError(f"{refusal} (change {' or '.join(given)}; '' is none)") from None
        raise


def _example(said: str, *, turns: bool = True) -> Example:
    messages = ({"role": "user", "content": said},) if turns else ()
    return Example(question_id=0, prompt=said, demonstration="", answer={}, canonical=said, messages=messages)
