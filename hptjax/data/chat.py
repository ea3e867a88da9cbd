"""A tokenizer's own chat template, tried out and pinned: what it renders does not change from day to day.

The template is transformers' (`apply_chat_template`, a sandboxed jinja environment). What of a conversation is trained
on is found by rendering prefixes: the turns before an assistant's turn, rendered with the generation prompt, must be
the beginning of the rendering that includes the turn; what follows that beginning is the turn as the model writes it.
A template that breaks this, or drops a part of the turn, is refused: a mask by any other rule would be a guess.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from hptjax.data.tokenizer import Tokenizer, encode_rendered, special_ids

Message = Mapping[str, Any]
Render = Callable[..., str]
"""(messages, tools=(), generation_prompt=False) -> text."""

DATE_CALL = re.compile(r"""strftime_now\s*\(\s*(?P<quote>['"])(?P<format>[^'"]*)(?P=quote)""")
PINNED_DATE = (  # put before a template's own text, where it hides transformers' function of the same name
    "{%- macro strftime_now(format) -%}{%- if format not in pinned_dates -%}"
    "{{- raise_exception('this template makes a date format while it renders, which cannot be pinned to a day') -}}"
    "{%- endif -%}{{- pinned_dates[format] -}}{%- endmacro -%}"
)
OTHER_DAY = datetime.date(2001, 2, 3)
QUESTION: Message = {"role": "user", "content": "What is two and three?"}
ANSWER = "It is five."
ANSWERS = {"plain": ANSWER, "thinking": f"<think>\nTwo and three more.\n</think>\n\n{ANSWER}"}
"""What a template is tried with: an answer, and one with its reasoning between think tags."""


class TemplateRefusal(ValueError):
    """A conversation that the template cannot be used for; `reason` is one of `prepare.DROP_REASONS`."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclasses.dataclass(frozen=True, eq=False)
class ChatTemplate:
    """A template that has been tried out.

    Args
      render: a conversation as text; raises TemplateRefusal "template_refused" with the template's own words.
      stop, after: what it writes behind an answer: up to the stop token, and from there on (a line break, say).
      stop_tokens: the tokens of `stop`; the last one ends a completion. [s].
      answers: which of `ANSWERS` it renders whole; the other kind is refused row by row.
      dated: whether what it renders shows a date; it is then `date`, on every day.
      digest: of its text and of what it renders; 16 hexadecimal digits.
    """

    render: Render
    stop: str
    after: str
    stop_tokens: Int[np.ndarray, " s"]
    answers: frozenset[str]
    dated: bool
    date: datetime.date
    digest: str


@dataclasses.dataclass(frozen=True)
class Part:
    """A stretch of a rendered conversation, and whether it is trained on."""

    text: str
    trained: bool


def open_template(tokenizer: Tokenizer, *, date: datetime.date, stop_ids: frozenset[int]) -> ChatTemplate:
    """The tokenizer's template, tried out on a question and its answer.

    Args
      date: the day that the template is told, by `strftime_now` and by the variable `date_string`.
      stop_ids: the tokens that end a completion while sampling.
    Raises
      no template, one that fails on the question, renders it differently each time, has no generation prompt, lacks the
      prefix property, drops a part of the answer, or ends it without a stop token -> ValueError.
    """
    render = prompt_render(tokenizer, date=date)
    found: dict[str, str] = {}
    refusals: list[TemplateRefusal] = []
    for name, answer in ANSWERS.items():
        try:
            _, turn = _turn(render, [QUESTION], answer)
            if ANSWER not in turn:
                raise _changed(turn, answer)
            body, end = turn[: turn.rindex(ANSWER) + len(ANSWER)], turn[turn.rindex(ANSWER) + len(ANSWER) :]
            _check_whole(render([QUESTION], generation_prompt=True), body, answer)
            found[name] = end
        except TemplateRefusal as refusal:
            refusals.append(refusal)
    if not found:
        raise refusals[0]
    end = next(iter(found.values()))
    stop, tokens = _stop(tokenizer, end, stop_ids)
    question = render([QUESTION], generation_prompt=True)
    return ChatTemplate(
        render=render,
        stop=stop,
        after=end[len(stop) :],
        stop_tokens=tokens,
        answers=frozenset(found),
        dated=question != pinned_render(tokenizer, OTHER_DAY)([QUESTION], generation_prompt=True),
        date=date,
        digest=template_digest(tokenizer, render),
    )


def prompt_render(tokenizer: Tokenizer, *, date: datetime.date) -> Render:
    """`pinned_render`, once it is known that the template can render a prompt.

    Raises ValueError: no template, one that fails on a question, renders it differently each time, or has no
      generation prompt.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"expected a tokenizer with a chat template, got one without in '{tokenizer.name_or_path}'; put a "
            "chat_template.jinja into the folder, or set prompt.template to 'plain'"
        )
    render = pinned_render(tokenizer, date)
    prompt, again = (render([QUESTION], generation_prompt=True) for _ in range(2))
    if prompt != again:
        raise ValueError("expected a chat template that renders the same each time, got one that does not; change it")
    whole = render([QUESTION, {"role": "assistant", "content": ANSWER}])
    bare = render([QUESTION])
    header = whole[len(bare) : whole.rindex(ANSWER)] if whole.startswith(bare) and ANSWER in whole else ""
    if prompt == bare and header.strip():
        raise ValueError(
            f"expected a chat template with a generation prompt, got one that renders {prompt[-40:]!r} with and "
            f"without add_generation_prompt while an answer begins with {header!r}: a completion would have to write "
            "that itself; add the generation prompt to the template, or set prompt.template to 'plain'"
        )
    return render


def pinned_render(tokenizer: Tokenizer, date: datetime.date) -> Render:
    """`apply_chat_template` of a tokenizer, as a function of the conversation alone.

    A template learns the day from `strftime_now(format)`, which transformers provides, or from a variable
    `date_string`. Both say `date` here, the first by a macro of the same name.
    """
    text = _template_text(tokenizer)
    formats = {match["format"]: date.strftime(match["format"]) for match in DATE_CALL.finditer(text)}
    preamble = PINNED_DATE if "strftime_now" in text else ""

    def render(messages: Sequence[Message], tools: Sequence[Any] = (), generation_prompt: bool = False) -> str:
        given = list(tools) or None
        try:
            return tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=given,
                chat_template=preamble + tokenizer.get_chat_template(tools=given),
                add_generation_prompt=generation_prompt,
                tokenize=False,
                date_string=date.strftime("%d %b %Y"),
                pinned_dates=formats,
            )
        except ImportError:
            raise
        except Exception as error:  # jinja2's own errors, and Python's from inside a template
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise TemplateRefusal(
                "template_refused",
                f"expected the chat template to render a conversation of {roles}, got {type(error).__name__}: "
                f"{str(error)[:200]}",
            ) from None

    return render


def check_prompt(render: Render, prompt: str, messages: Sequence[Message], tools: Sequence[Any] = ()) -> None:
    """Nothing, where a rendered prompt says what its turns say: a template may leave whole turns out without a word.

    Looked for are the texts of system, developer and user, white space aside, and that there are tools at all. Answers
    before the last question may lose their reasoning.
    Raises TemplateRefusal "template_changed".
    """
    said = _squeezed(prompt)
    for message in messages:
        if message["role"] in ("system", "developer", "user") and _squeezed(message["content"]) not in said:
            raise TemplateRefusal(
                "template_changed",
                f"expected a chat template that renders what the {message['role']} says, got {prompt[:200]!r} without "
                f"{message['content'][:80]!r}; change the template, or leave such turns out",
            )
    if tools and prompt == render(messages, generation_prompt=True):
        raise TemplateRefusal(
            "template_changed",
            f"expected a chat template that renders tools, got {prompt[:200]!r} with and without them; change the "
            "template, or leave the tools out",
        )


def answer_parts(
    template: ChatTemplate, before: Sequence[Message], answer: str, tools: Sequence[Any] = ()
) -> tuple[str, str]:
    """(prompt, answer as the model is to write it after the prompt, without the stop token).

    The second is `answer` but for white space that the template changes, and for its beginning where the generation
    prompt has written that already (an opening think tag).

    Raises
      TemplateRefusal: "template_prefix" where the prompt is not the beginning of the whole conversation,
      "template_changed" where the template drops or adds text, "template_refused" where it raises.
    """
    prompt, turn = _turn(template.render, before, answer, tools)
    end = template.stop + template.after
    if not turn.endswith(end):
        raise _changed(turn[-60:], answer[-60:] + end)
    body = turn.removesuffix(end)
    _check_whole(prompt, body, answer)
    return prompt, body


def conversation_parts(
    template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Any] = ()
) -> tuple[Part, ...]:
    """A whole conversation as one text, cut where training begins and ends: every assistant's text and stop token.

    Raises TemplateRefusal as `answer_parts`, and "template_prefix" where a later turn changes how an earlier one is
      rendered, as templates do that strip the reasoning from history.
    """
    whole = template.render(messages, tools)
    parts: list[Part] = []
    done = 0
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, body = answer_parts(template, messages[:place], message["content"], tools)
        turn = prompt + body + template.stop
        if not whole.startswith(turn):
            raise _no_prefix(turn, whole)
        parts += [Part(whole[done : len(prompt)], False), Part(whole[len(prompt) : len(turn)], True)]
        done = len(turn)
    return tuple(part for part in (*parts, Part(whole[done:], False)) if part.text)


def conversation_mask(
    tokenizer: Tokenizer, parts: Sequence[Part]
) -> tuple[Int[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """The tokens of a conversation, and which of them are trained on: [n], [n].

    Each part is encoded alone: a prompt is sampled from as it stands, so no token may reach across its end.
    """
    encoded = [encode_rendered(tokenizer, part.text) for part in parts]
    mask = [np.full(len(tokens), part.trained) for tokens, part in zip(encoded, parts, strict=True)]
    return np.concatenate([np.zeros(0, np.int32), *encoded]), np.concatenate([np.zeros(0, np.bool_), *mask])


def template_digest(tokenizer: Tokenizer, render: Render) -> str:
    """16 hexadecimal digits of a template: its text, and what it renders for conversations of ours.

    The second half sees a change of the library that renders it, and of the date.
    """
    system: Message = {"role": "system", "content": "Think."}
    said = [_template_text(tokenizer)]
    for messages in ([QUESTION], [system, QUESTION], *([QUESTION, _assistant(answer)] for answer in ANSWERS.values())):
        for generation_prompt in (True, False):
            try:
                said.append(render(messages, generation_prompt=generation_prompt))
            except TemplateRefusal as refusal:
                said.append(refusal.reason)
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def _turn(render: Render, before: Sequence[Message], answer: str, tools: Sequence[Any] = ()) -> tuple[str, str]:
    """(prompt, everything that the conversation with the answer has after it)."""
    prompt = render(before, tools, generation_prompt=True)
    whole = render([*before, _assistant(answer)], tools)
    if not whole.startswith(prompt):
        raise _no_prefix(prompt, whole)
    return prompt, whole[len(prompt) :]


def _check_whole(prompt: str, body: str, answer: str) -> None:
    """Raises TemplateRefusal unless `body` is the answer, white space aside, or its rest after the prompt's end."""
    said, wanted = _squeezed(body), _squeezed(answer)
    written = len(wanted) - len(said)  # characters that the prompt must have written
    if written < 0 or wanted[written:] != said or not _squeezed(prompt).endswith(wanted[:written]):
        raise _changed(body, answer)


def _stop(tokenizer: Tokenizer, end: str, stop_ids: frozenset[int]) -> tuple[str, Int[np.ndarray, " s"]]:
    """The part of what follows an answer that a model must write, and its tokens: up to the first stop token."""
    tokens = encode_rendered(tokenizer, end)
    places = [place for place, token in enumerate(tokens.tolist()) if token in stop_ids]
    if not places:
        specials = sorted(special_ids(tokenizer).intersection(tokens.tolist()))
        add = f"add {specials[0]} to rollout.stop_ids" if specials else "change the template"
        known = {token: tokenizer.convert_ids_to_tokens(token) for token in sorted(stop_ids)}
        raise ValueError(
            f"expected a chat template that ends an answer with a token that stops sampling, one of {known}, got "
            f"{end!r} (tokens {tokens.tolist()}); {add}, or set prompt.end to 'eos'"
        )
    stop = tokens[: places[0] + 1]
    token = tokenizer.convert_ids_to_tokens(int(stop[-1]))
    if token in end:
        return end[: end.index(token) + len(token)], stop
    said = tokenizer.decode(stop.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if end.startswith(said):  # a piece of text, a line break say, which a vocabulary spells in its own way
        return said, stop
    raise ValueError(
        f"expected a chat template that ends an answer with a stop token of its own, got {end!r}, in which token "
        f"{int(stop[-1])} is {said!r} with what is before it; change the template, or set prompt.end to 'eos'"
    )


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _template_text(tokenizer: Tokenizer) -> str:
    """All its templates as one text."""
    found = tokenizer.chat_template
    return found if isinstance(found, str) else json.dumps(found, sort_keys=True)


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _no_prefix(prompt: str, whole: str) -> TemplateRefusal:
    place = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))
    return TemplateRefusal(
        "template_prefix",
        f"expected a chat template that renders a conversation as a continuation of its beginning, got "
        f"{whole[place : place + 40]!r} in the longer one where the shorter has {prompt[place : place + 40]!r}, after "
        f"{prompt[max(0, place - 40) : place]!r}: what is trained on cannot be told; change the template, or set "
        "prompt.end to 'eos', which takes demonstrations as they are",
    )


def _changed(said: str, wanted: str) -> TemplateRefusal:
    return TemplateRefusal(
        "template_changed",
        f"expected a chat template that renders an answer as it is, got {said[:80]!r} for {wanted[:80]!r}; change the "
        "template, or set prompt.end to 'eos', which takes demonstrations as they are",
    )
