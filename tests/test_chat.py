"""Chat templates: what is rendered, what is trained on, what is refused; and that no day changes it."""

from __future__ import annotations

import datetime
import json
import random

import numpy as np
import pytest
import transformers.utils.chat_template_utils as rendering
from hypothesis import given, settings
from hypothesis import strategies as st

from hptjax.build.prompts import turn_prompts
from hptjax.config import Config, PromptConfig
from hptjax.data.chat import (
    TemplateRefusal,
    answer_parts,
    conversation_mask,
    conversation_parts,
    open_template,
    prompt_render,
    template_digest,
)
from hptjax.data.prompts import chat_prompt_writer, chat_writer
from hptjax.data.tokenizer import decode, encode_rendered, has_specials, load_tokenizer, special_ids
from hptjax.records import Example
from tests.chat_templates import BAD, CHAT, GENERATES, GOOD, OPENED, PLAIN, byte_tokenizer

DAY = datetime.date(2024, 7, 26)
EOS, END = 2, 4
STOPS = frozenset({EOS, END})
TOOLS = ({"type": "function", "function": {"name": "add", "parameters": {}}},)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Name of a good template -> its tokenizer, as it is loaded from a folder."""
    found = {}
    for name, template in GOOD.items():
        byte_tokenizer(tmp_path_factory.mktemp(name), template).save_pretrained(folder := tmp_path_factory.mktemp(name))
        found[name] = load_tokenizer(folder)
    return found


@pytest.fixture(scope="module")
def templates(tokenizers):
    return {name: open_template(tokenizer, date=DAY, stop_ids=STOPS) for name, tokenizer in tokenizers.items()}


def test_chat_prompts_hold_what_each_family_writes(templates):
    """Default system line, date, tools, generation prompt, an opened think tag: written out by hand."""
    hello = [{"role": "system", "content": "Be brief."}, user("Hello")]
    assert templates["chat"].render([user("Hello")], generation_prompt=True) == (
        "[turn]system\nYou are careful.[end]\n[turn]user\nHello[end]\n[turn]assistant\n"
    )
    assert templates["chat"].render(hello, TOOLS, generation_prompt=True) == (
        f"[turn]system\nBe brief.\nTools:\n{json.dumps(TOOLS[0])}[end]\n[turn]user\nHello[end]\n[turn]assistant\n"
    )
    assert templates["dated"].render(hello, generation_prompt=True) == (
        "[start][turn]system\nToday is 26 Jul 2024. Be brief.[end][turn]user\nHello[end][turn]assistant\n"
    )
    assert templates["opened"].render([user("Hello")], generation_prompt=True) == (
        "[turn]user\nHello[end]\n[turn]assistant\n<think>\n"
    )
    assert templates["instruct"].render([user("Hello")], generation_prompt=True) == "[start][turn] Hello [end]"


def test_chat_answers_end_with_the_templates_stop_token(templates):
    ends = {name: (found.stop, found.after, found.stop_tokens.tolist()) for name, found in templates.items()}
    assert ends["chat"] == ends["dated"] == ("[end]", "", [END])
    assert ends["opened"] == ("[end]", "\n", [END])
    assert ends["instruct"] == ("[eos]", "", [EOS])
    assert {name: sorted(found.answers) for name, found in templates.items()} == {
        **{each: ["plain", "thinking"] for each in ("chat", "dated", "clock", "instruct")},
        "opened": ["thinking"],
    }


def test_chat_answer_follows_its_prompt_and_loses_only_white_space_and_what_the_prompt_opened(templates):
    thought = "<think>\nhm\n</think>\n\nSo 5. "
    assert answer_parts(templates["chat"], [user("Q")], thought)[1] == thought
    assert answer_parts(templates["dated"], [user("Q")], thought)[1] == thought.strip()
    assert answer_parts(templates["opened"], [user("Q")], thought)[1] == "hm\n</think>\n\nSo 5. "
    with pytest.raises(TemplateRefusal, match=r"prompt\.end") as refused:
        answer_parts(templates["opened"], [user("Q")], "So 5.")  # the prompt opens a thought that this does not have
    assert refused.value.reason == "template_prefix"


@pytest.mark.parametrize("name", BAD)
def test_chat_template_that_cannot_be_used_is_refused_with_what_it_does(name, tmp_path):
    template, words = BAD[name]
    byte_tokenizer(tmp_path, template)
    with pytest.raises(ValueError, match="expected") as refused:
        open_template(load_tokenizer(tmp_path), date=DAY, stop_ids=STOPS)
    for word in words:
        assert word in str(refused.value)


def test_chat_template_that_is_absent_is_refused(tmp_path):
    byte_tokenizer(tmp_path, None)
    with pytest.raises(ValueError, match=r"without in .*prompt\.template to 'plain'"):
        open_template(load_tokenizer(tmp_path), date=DAY, stop_ids=STOPS)


def test_chat_template_that_strips_all_reasoning_can_write_prompts_only(tmp_path):
    """As of the distilled reasoning models: the prompt opens a thought, and no answer keeps one."""
    stripped = OPENED.replace("{{ message.content }}", "{{ message.content.split('</think>')[-1] }}")
    byte_tokenizer(tmp_path, stripped)
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"a continuation of its beginning.*prompt\.end to 'eos'"):
        open_template(tokenizer, date=DAY, stop_ids=STOPS)
    assert prompt_render(tokenizer, date=DAY)([user("Q")], generation_prompt=True).endswith("<think>\n")


def test_chat_row_that_the_template_refuses_or_garbles_is_told_from_the_others(tmp_path):
    byte_tokenizer(
        tmp_path,
        "{%- if messages[0].role == 'system' -%}{{ raise_exception('no system turns') }}{%- endif -%}"
        + PLAIN.replace("{{ message.content }}", "{{ message.content | replace('secret', 'public') }}")
        + GENERATES,
    )
    template = open_template(load_tokenizer(tmp_path), date=DAY, stop_ids=STOPS)
    for turns, answer, reason in (
        ([{"role": "system", "content": "S"}, user("Q")], "A", "template_refused"),
        ([user("Q")], "the secret is 5", "template_changed"),
    ):
        with pytest.raises(TemplateRefusal) as refused:
            answer_parts(template, turns, answer)
        assert refused.value.reason == reason


def test_chat_prompt_that_leaves_turns_or_tools_out_is_refused(tmp_path):
    """A template for which system turns, or tools, do not exist says nothing of it."""
    deaf = PLAIN.replace(
        "{%- for message in messages -%}", "{%- for message in messages if message.role != 'system' -%}"
    )
    byte_tokenizer(tmp_path, deaf + GENERATES)
    tokenizer = load_tokenizer(tmp_path)
    turns = [{"role": "system", "content": "Be brief."}, user(" Q ")]
    for write in (
        chat_writer(tokenizer, open_template(tokenizer, date=DAY, stop_ids=STOPS)),
        chat_prompt_writer(tokenizer, prompt_render(tokenizer, date=DAY)),
    ):
        for said, tools, demonstration in ((turns, (), "A"), (turns, (), ""), (turns[1:], TOOLS, "A")):
            with pytest.raises(TemplateRefusal) as refused:
                write(Example(0, "", demonstration, {}, "", messages=tuple(said), tools=tools))
            assert refused.value.reason == "template_changed"
        assert write(Example(0, "", "A", {}, "", messages=tuple(turns[1:]))).demonstration == "A"
    for prompt, words in (
        (PromptConfig(system="Be brief."), r"renders what the system says.*change prompt\.system;"),
        (PromptConfig(suffix=" [end]"), r"without special tokens written out.*change prompt\.suffix;"),
    ):
        with pytest.raises(ValueError, match=words):
            turn_prompts(Config(prompt=prompt), tokenizer, STOPS)


def test_chat_stop_token_may_be_a_piece_of_text(tmp_path):
    byte_tokenizer(tmp_path, PLAIN.replace("[end]", "") + GENERATES)
    tokenizer = load_tokenizer(tmp_path)
    (newline,) = tokenizer.encode("\n")
    found = open_template(tokenizer, date=DAY, stop_ids=frozenset({EOS, newline}))
    assert (found.stop, found.after, found.stop_tokens.tolist()) == ("\n", "", [newline])


def test_plain_prompt_asks_for_a_bos_only_where_there_is_one(tmp_path):
    byte_tokenizer(tmp_path, None, bos=None)
    config = Config(prompt=PromptConfig(template="plain", bos=True))
    with pytest.raises(ValueError, match=r"prompt\.bos"):
        turn_prompts(config, load_tokenizer(tmp_path), STOPS)


# No day changes it


def on(monkeypatch, day: datetime.datetime):
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return day

    monkeypatch.setattr(rendering, "datetime", Clock)


@pytest.mark.parametrize("name", GOOD)
def test_chat_rendering_is_the_same_on_every_day(name, tokenizers, monkeypatch):
    tokenizer, digests, said = tokenizers[name], set(), set()
    for year in (2024, 2031):
        on(monkeypatch, datetime.datetime(year, 3, 1))
        template = open_template(tokenizer, date=DAY, stop_ids=STOPS)
        digests.add(template.digest)
        said.add(template.render([user("Hello")], generation_prompt=True))
    assert len(digests) == len(said) == 1
    assert template.dated == (name in ("dated", "clock"))


def test_chat_clock_would_change_what_transformers_renders(tokenizers, monkeypatch):
    """The test above can fail: unpinned, the same template says another day."""
    tokenizer, said = tokenizers["clock"], set()
    for year in (2024, 2031):
        on(monkeypatch, datetime.datetime(year, 3, 1))
        said.add(tokenizer.apply_chat_template([user("Hello")], tokenize=False, add_generation_prompt=True))
    assert {text[: text.index(".")].split()[-1] for text in said} == {"2024", "2031"}


def test_chat_digest_sees_text_date_and_what_is_rendered(tokenizers, tmp_path):
    def digest(tokenizer, date=DAY):
        return template_digest(tokenizer, prompt_render(tokenizer, date=date))

    tokenizer = tokenizers["dated"]
    assert digest(tokenizer) == digest(load_tokenizer(tokenizer.name_or_path))
    assert digest(tokenizer) != digest(tokenizer, datetime.date(2024, 7, 27))
    assert digest(tokenizers["chat"]) == digest(tokenizers["chat"], datetime.date(2024, 7, 27))
    byte_tokenizer(tmp_path, CHAT.replace("careful", "careless"))
    assert digest(load_tokenizer(tmp_path)) != digest(tokenizers["chat"])


def test_chat_tokenizer_with_code_of_its_own_is_refused_and_never_run(tmp_path, capsys):
    byte_tokenizer(tmp_path, CHAT)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}, "tokenizer_class": "Mine"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "mine.py").write_text("print('ran')\nraise SystemExit(3)\n")
    with pytest.raises(ValueError, match=r"without code of its own.*model\.tokenizer"):
        load_tokenizer(tmp_path)
    assert "ran" not in capsys.readouterr().out


# The loss mask


CONVERSATION = [
    {"role": "system", "content": "Sum."},
    user("2 and 3?"),
    assistant("It is 5."),
    user("and 4?"),
    assistant("<think>\n5+4\n</think>\n\n9"),
]


def test_chat_mask_covers_answers_and_their_stop_tokens_by_hand(templates, tokenizers):
    parts = conversation_parts(templates["chat"], CONVERSATION)
    assert [(part.text, part.trained) for part in parts] == [
        ("[turn]system\nSum.[end]\n[turn]user\n2 and 3?[end]\n[turn]assistant\n", False),
        ("It is 5.[end]", True),
        ("[turn]user\nand 4?[end]\n[turn]assistant\n", False),
        ("<think>\n5+4\n</think>\n\n9[end]", True),
    ]
    tokens, mask = conversation_mask(tokenizers["chat"], parts)
    assert tokenizers["chat"].decode(tokens) == "".join(part.text for part in parts)
    assert tokens.shape == mask.shape
    assert tokenizers["chat"].decode(tokens[mask]) == "It is 5.[end]<think>\n5+4\n</think>\n\n9[end]"


def test_chat_mask_leaves_out_what_stands_after_the_stop_token(templates):
    parts = conversation_parts(templates["opened"], [user("Q"), assistant("<think>\nhm\n</think>5")])
    assert [(part.text, part.trained) for part in parts][1:] == [("hm\n</think>5[end]", True), ("\n", False)]


def test_chat_mask_is_refused_where_history_is_rendered_otherwise(templates):
    """The reasoning of an earlier answer is stripped: the whole does not begin with what that answer was written as."""
    turns = [user("2 and 3?"), assistant("<think>\n2+3\n</think>\n\n5"), user("and 4?"), assistant("9")]
    with pytest.raises(TemplateRefusal, match="cannot be told") as refused:
        conversation_parts(templates["chat"], turns)
    assert refused.value.reason == "template_prefix"
    prompt, body = answer_parts(templates["chat"], turns[:-1], "9")  # the last answer alone can be trained on
    assert "2+3" not in prompt
    assert body == "9"


WORDS = st.text(alphabet="ab 5\n.é🙂\t'", max_size=12)
TURNS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3)


def conversation(turns, *, system=False):
    pairs = [message for asked, said in turns for message in (user(asked), assistant(said))]
    return [{"role": "system", "content": "Sum."}, *pairs] if system else pairs


@settings(max_examples=60)
@given(st.sampled_from(["chat", "dated"]), TURNS, st.booleans(), st.booleans())
def test_chat_mask_equals_the_templates_own_generation_marks(tokenizers, templates, name, turns, system, with_tools):
    """Second route: transformers' `{% generation %}` blocks, which these two templates have and most published lack."""
    tokenizer = tokenizers[name]
    messages, tools = conversation(turns, system=system), TOOLS if with_tools else ()
    marked = tokenizer.apply_chat_template(
        messages, tools=list(tools) or None, return_assistant_tokens_mask=True, date_string="26 Jul 2024"
    )
    tokens, mask = conversation_mask(tokenizer, conversation_parts(templates[name], messages, tools))
    assert tokens.tolist() == marked["input_ids"]
    assert mask.astype(int).tolist() == marked["assistant_masks"]


@settings(max_examples=60)
@given(st.sampled_from(sorted(set(GOOD) - {"opened"})), TURNS)
def test_chat_mask_parts_make_the_whole_and_hold_every_answer_once(tokenizers, templates, name, turns):
    template, messages = templates[name], conversation(turns)
    parts = conversation_parts(template, messages)
    assert "".join(part.text for part in parts) == template.render(messages)
    assert [p.text.removesuffix(template.stop).split() for p in parts if p.trained] == [
        said.split() for _, said in turns
    ]
    assert all(part.text.endswith(template.stop) for part in parts if part.trained)
    tokens, mask = conversation_mask(tokenizers[name], parts)
    assert sum(tokens[mask] == template.stop_tokens[-1]) == len(turns)
    assert tokenizers[name].decode(tokens) == "".join(part.text for part in parts)
    for place in range(0, len(messages), 2):  # as each prompt is sampled from: its tokens begin the conversation's
        prompt = encode_rendered(tokenizers[name], template.render(messages[: place + 1], generation_prompt=True))
        assert tokens[: len(prompt)].tolist() == prompt.tolist()


@settings(max_examples=40)
@given(st.lists(WORDS, min_size=1, max_size=4), st.integers(0, 2**32))
def test_chat_text_that_writes_out_a_special_token_is_found(tokenizers, words, seed):
    tokenizer = tokenizers["chat"]
    text = "x".join(words)
    assert not has_specials(tokenizer, text)
    special = tokenizer.convert_ids_to_tokens(random.Random(seed).choice(sorted(special_ids(tokenizer))))
    place = random.Random(seed).randrange(len(text) + 1)
    assert has_specials(tokenizer, text[:place] + special + text[place:])
    assert not has_specials(tokenizer, "<think>" + text)  # an added token that is text


def test_chat_decode_drops_the_end_of_turn_and_keeps_think_tags(tokenizers):
    tokens = encode_rendered(tokenizers["chat"], "<think>\nhm\n</think>\n\n5[end][pad]")
    assert END in special_ids(tokenizers["chat"])
    assert decode(tokenizers["chat"], np.asarray(tokens)) == "<think>\nhm\n</think>\n\n5"
