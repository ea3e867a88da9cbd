"""Splits, tokenizers, prepared questions and the stream of batches."""

from __future__ import annotations

import dataclasses
import functools
import json
import types
from collections import Counter

import numpy as np
import pytest

from hptjax.data.prepare import DROP_REASONS, Limits, prepare_questions
from hptjax.data.prompts import as_written, make_encode
from hptjax.data.split import split_by_canonical, split_position
from hptjax.data.stream import QuestionStream
from hptjax.data.tokenizer import (
    decode,
    encode_demonstration,
    encode_prompt,
    load_tokenizer,
    make_character_tokenizer,
    stop_ids,
    vocabulary_size,
)
from hptjax.records import Example, Question, Verdict
from hptjax.tasks.countdown import SYMBOLS, enumerate_instances, write_examples
from hptjax.tasks.countdown_verifier import verify


def example(index: int, canonical: str = "") -> Example:
    return Example(index, f"{index}:", f"1+{index}=2", {}, canonical or f"problem {index}")


def questions(count: int) -> list[Question]:
    return [Question(example(i), np.asarray([1, i], np.int32), np.asarray([i, 2], np.int32)) for i in range(count)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_character_tokenizer(SYMBOLS, tmp_path_factory.mktemp("tokenizer"))


# Splits


def test_split_is_disjoint_and_complete_and_near_its_fractions():
    items = enumerate_instances(3, 1, 7, 1, 60)
    splits = split_by_canonical(items, seed=3, fractions={"base": 0.3, "train": 0.5, "validation": 0.1, "test": 0.1})
    sets = {name: {item.canonical for item in members} for name, members in splits.items()}
    assert sum(map(len, sets.values())) == len(set.union(*sets.values())) == len(items)
    for name, fraction in (("base", 0.3), ("train", 0.5), ("validation", 0.1), ("test", 0.1)):
        expected, deviation = fraction * len(items), (len(items) * fraction * (1 - fraction)) ** 0.5
        assert abs(len(splits[name]) - expected) < 4 * deviation


def test_split_of_a_problem_does_not_depend_on_the_others():
    """A larger space, another order and limits never move a problem to another split."""
    small, large = enumerate_instances(3, 2, 5, 1, 30), enumerate_instances(3, 1, 7, 1, 60)
    where = {i.canonical: name for name, members in split_by_canonical(large, seed=1).items() for i in members}
    for items in (small, small[::-1], large[::2]):
        for name, members in split_by_canonical(items, seed=1, limits={"train": 20}).items():
            assert all(where[item.canonical] == name for item in members)
    assert split_by_canonical(large, seed=1) == split_by_canonical(large[::-1], seed=1)
    other = {i.canonical: name for name, members in split_by_canonical(large, seed=2).items() for i in members}
    assert other != where


def test_split_keeps_equal_problems_together():
    items = [example(i, canonical=f"problem {i % 40}") for i in range(200)]
    splits = split_by_canonical(items, seed=0, fractions={"train": 0.5, "test": 0.5})
    train, test = ({item.canonical for item in splits[name]} for name in ("train", "test"))
    assert not train & test
    assert len(splits["train"]) == 5 * len(train)


def test_split_position_is_even_in_the_unit_interval():
    positions = np.asarray([split_position(f"problem {i}", 0) for i in range(2000)])
    counts = np.histogram(positions, bins=10, range=(0.0, 1.0))[0]
    assert counts.sum() == 2000
    assert np.abs(counts - 200).max() < 5 * 200**0.5


def test_split_refuses_an_empty_split_and_bad_shares():
    items = [example(i) for i in range(20)]
    with pytest.raises(ValueError, match=r"test split.*data\.fractions\.test"):
        split_by_canonical(items, seed=0, fractions={"train": 0.9, "test": 1e-9})
    with pytest.raises(ValueError, match=r"data\.fractions to sum"):
        split_by_canonical(items, seed=0, fractions={"train": 0.9, "test": 0.2})
    with pytest.raises(ValueError, match=r"data\.fractions\.test"):
        split_by_canonical(items, seed=0, fractions={"train": 0.9, "test": 0.0})
    with pytest.raises(ValueError, match=r"data\.test_questions"):
        split_by_canonical(items, seed=0, limits={"test": 0})
    with pytest.raises(ValueError, match="tset"):
        split_by_canonical(items, seed=0, limits={"tset": 5})


# Tokenizer


def test_tokenizer_round_trip_is_exact_with_one_token_per_character(tokenizer):
    for written in write_examples(enumerate_instances(3, 1, 4, 1, 30)[::3], seed=0):
        prompt = encode_prompt(tokenizer, written.prompt)
        demonstration = encode_demonstration(tokenizer, written.demonstration)
        assert prompt.dtype == demonstration.dtype == np.int32
        assert prompt[0] == tokenizer.bos_token_id
        assert len(prompt) == len(written.prompt) + 1
        assert demonstration[-1] == tokenizer.eos_token_id
        assert len(demonstration) == len(written.demonstration) + 1
        assert decode(tokenizer, prompt[1:]) == written.prompt
        assert decode(tokenizer, demonstration) == written.demonstration
    assert encode_prompt(tokenizer, "1+", add_bos=False).tolist() == [3 + SYMBOLS.index(c) for c in "1+"]
    assert stop_ids(tokenizer, extra=(0,)) == {0, tokenizer.eos_token_id}
    assert len(tokenizer) == len(SYMBOLS) + 3


def test_tokenizer_with_gaps_between_its_ids_needs_rows_for_the_largest(tokenizer):
    assert vocabulary_size(tokenizer) == len(tokenizer)
    assert vocabulary_size(types.SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 7})) == 8


def test_tokenizer_round_trip_holds_for_spaces_and_line_ends(tmp_path):
    symbols = "ab \n\t.,'é<"
    made = make_character_tokenizer(symbols, tmp_path / "folder")
    text = "a  b .\n\n\tb , 'a é<b "
    assert decode(made, encode_demonstration(made, text)) == text
    again = load_tokenizer(tmp_path / "folder")
    assert encode_prompt(again, text).tolist() == encode_prompt(made, text).tolist()
    assert len(encode_prompt(again, text)) == len(text) + 1


def test_tokenizer_refuses_unknown_characters_and_written_specials(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"not in its vocabulary: \['x', '²'\]"):
        encode_prompt(tokenizer, "3x2²=1")
    with pytest.raises(ValueError, match="special tokens"):
        encode_demonstration(tokenizer, "1+1=2<eos>")
    with pytest.raises(FileNotFoundError, match=r"model\.path"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(ValueError, match="distinct symbols"):
        make_character_tokenizer("aa", tmp_path)


def test_tokenizer_decode_drops_specials_at_the_end_only(tokenizer):
    """A stop token or padding inside a completion must stay visible, or a verifier would accept a broken text."""
    one, two = (3 + SYMBOLS.index(c) for c in "12")
    pad, bos, eos = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
    assert decode(tokenizer, np.asarray([one, two, eos, pad, pad])) == "12"
    assert decode(tokenizer, np.asarray([one, bos, two, eos])) == "1<bos>2"
    assert decode(tokenizer, np.asarray([eos])) == decode(tokenizer, np.asarray([], np.int32)) == ""


# Prepare


def encoder(tokenizer, write=as_written):
    return make_encode(
        tokenizer,
        write,
        start=[tokenizer.bos_token_id],
        stop=np.asarray([tokenizer.eos_token_id], np.int32),
        rendered=False,
    )


def judge(texts, answers, prompts):
    return [verify(text, answer) for text, answer in zip(texts, answers, strict=True)]


def prepared(tokenizer, examples, *, max_prompt_tokens=24, max_completion_tokens=24, judge=judge, **limits):
    return prepare_questions(
        examples,
        encode=encoder(tokenizer),
        decode=functools.partial(decode, tokenizer),
        judge=judge,
        limits=Limits(max_prompt_tokens, max_completion_tokens, **limits),
    )


def test_prepare_drops_and_counts_each_reason(tokenizer):
    good = write_examples(enumerate_instances(3, 1, 4, 1, 30)[:12], seed=0)
    replace = dataclasses.replace
    bad = {
        "no_demonstration": replace(good[0], demonstration=""),
        "not_encodable": replace(good[1], demonstration="one and two"),
        "prompt_too_long": replace(good[2], prompt="1," * 20),
        "demonstration_too_long": replace(good[3], demonstration=good[3].demonstration + "," + "1-1=0," * 5),
        "demonstration_unverified": replace(good[4], demonstration="1+1=2,2+1=4"),
    }
    found = prepared(tokenizer, [*good[5:8], *bad.values(), *good[8:], bad["not_encodable"]])
    assert [q.example for q in found.questions] == good[5:]
    assert found.dropped == {**dict.fromkeys(DROP_REASONS, 0), **dict.fromkeys(bad, 1), "not_encodable": 2}
    assert prepared(tokenizer, good).dropped == dict.fromkeys(DROP_REASONS, 0)


def test_prepare_keeps_questions_without_a_demonstration_where_none_is_needed(tokenizer):
    """Evaluation, and RL alone: a demonstration that is absent, broken, too long or wrong costs nothing but itself."""
    good = write_examples(enumerate_instances(3, 1, 4, 1, 30)[:5], seed=0)
    replace = dataclasses.replace
    spoiled = [
        replace(good[0], demonstration=""),
        replace(good[1], demonstration="one and two"),
        replace(good[2], demonstration=good[2].demonstration + "," + "1-1=0," * 5),
        replace(good[3], demonstration="1+1=2,2+1=4"),
        replace(good[4], answer={}),
    ]
    found = prepared(tokenizer, spoiled, demonstration=False, answer=True)
    assert [len(q.demonstration_tokens) for q in found.questions] == [0, 0, 0, len("1+1=2,2+1=4") + 1]
    assert found.dropped == {**dict.fromkeys(DROP_REASONS, 0), "no_answer": 1}
    assert found.changed == {"demonstration_cut": 0, "without_demonstration": 3}


def test_prepare_cuts_a_long_demonstration_only_where_it_is_told_to(tokenizer):
    """The verifier judges the whole of it; what is trained on has no stop token."""
    (long,) = write_examples(enumerate_instances(3, 3, 3, 1, 9)[:1], seed=0)
    limit = len(long.demonstration) - 2
    with pytest.raises(ValueError, match="'demonstration_too_long': 1"):
        prepared(tokenizer, [long], max_completion_tokens=limit)
    found = prepared(tokenizer, [long], max_completion_tokens=limit, cut=True)
    assert decode(tokenizer, found.questions[0].demonstration_tokens) == long.demonstration[:limit]
    assert tokenizer.eos_token_id not in found.questions[0].demonstration_tokens
    assert found.changed == {"demonstration_cut": 1, "without_demonstration": 0}


def test_prepare_limits_count_the_stop_token_and_the_first_token(tokenizer):
    """hpt.md property 16: a demonstration of n characters is n + 1 tokens; it fits a limit of n + 1 and not of n."""
    written = write_examples(enumerate_instances(3, 3, 3, 1, 9)[:1], seed=0)
    n, p = len(written[0].demonstration), len(written[0].prompt)
    kept = prepared(tokenizer, written, max_prompt_tokens=p + 1, max_completion_tokens=n + 1).questions
    assert len(kept[0].demonstration_tokens) == n + 1
    assert len(kept[0].prompt_tokens) == p + 1
    assert kept[0].demonstration_tokens[-1] == tokenizer.eos_token_id
    for limits in ((p + 1, n), (p, n + 1)):
        with pytest.raises(ValueError, match=r"rollout\.max_completion_tokens"):
            prepared(tokenizer, written, max_prompt_tokens=limits[0], max_completion_tokens=limits[1])


def test_prepare_refuses_when_nothing_is_left(tokenizer):
    written = write_examples(enumerate_instances(3, 2, 3, 1, 30), seed=0, corrupt=1.0)
    wrong = [e for e in written if not verify(e.demonstration, e.answer).solved]
    with pytest.raises(ValueError, match=f"'demonstration_unverified': {len(wrong)}"):
        prepared(tokenizer, wrong)
    with pytest.raises(ValueError, match="at least one of 0 examples"):
        prepared(tokenizer, [])


def test_prepare_judges_what_the_tokens_say(tokenizer):
    seen = []

    def solves_all(texts, answers, prompts):
        seen.extend(texts)
        return [Verdict(1.0, True, "correct")] * len(texts)

    written = write_examples(enumerate_instances(3, 2, 3, 1, 30), seed=0)
    prepare_questions(
        written,
        encode=encoder(tokenizer, lambda e: dataclasses.replace(e, demonstration=e.demonstration[:-1])),  # loses text
        decode=functools.partial(decode, tokenizer),
        judge=solves_all,
        limits=Limits(24, 24),
    )
    assert seen == [e.demonstration[:-1] for e in written]


# Stream


def ids(batch) -> list[int]:
    return [question.question_id for question in batch.questions]


def test_stream_shows_every_question_once_in_a_pass_and_shuffles_each_anew():
    stream = QuestionStream(questions(23), questions_per_step=5, seed=4)
    passes = []
    for expected_round in range(6):
        batches = [stream.next_batch() for _ in range(5)]
        assert {batch.round for batch in batches} == {expected_round}
        assert [len(batch.questions) for batch in batches] == [5, 5, 5, 5, 3]
        passes.append([i for batch in batches for i in ids(batch)])
    assert all(sorted(seen) == list(range(23)) for seen in passes)
    assert len({tuple(seen) for seen in passes}) == 6
    assert stream.next_batch().index == 30


def test_stream_depends_on_the_seed_alone():
    first, again, other = (QuestionStream(questions(30), questions_per_step=6, seed=s) for s in (1, 1, 2))
    orders = [[ids(stream.next_batch()) for _ in range(10)] for stream in (first, again, other)]
    assert orders[0] == orders[1] != orders[2]


def test_stream_resume_continues_at_the_exact_position():
    whole = QuestionStream(questions(17), questions_per_step=4, seed=9)
    expected = [(batch.index, batch.round, ids(batch)) for batch in (whole.next_batch() for _ in range(25))]
    for position in (0, 1, 3, 4, 5, 11, 24):
        stopped = QuestionStream(questions(17), questions_per_step=4, seed=9)
        for _ in range(position):
            stopped.next_batch()
        saved = json.loads(json.dumps(stopped.get_state()))
        resumed = QuestionStream(questions(17), questions_per_step=4, seed=9)
        resumed.next_batch()  # a position is taken whatever came before
        resumed.set_state(saved)
        assert resumed.get_state() == saved
        rest = [resumed.next_batch() for _ in range(25 - position)]
        assert [(batch.index, batch.round, ids(batch)) for batch in rest] == expected[position:]


def test_stream_resume_refuses_another_streams_position():
    saved = QuestionStream(questions(20), questions_per_step=4, seed=9).get_state()
    changed = questions(20)
    changed[3] = dataclasses.replace(changed[3], example=example(3, canonical="another"))
    for stream, name in (
        (QuestionStream(questions(20), questions_per_step=4, seed=8), "seed"),
        (QuestionStream(questions(20), questions_per_step=5, seed=9), "questions_per_step"),
        (QuestionStream(questions(21), questions_per_step=4, seed=9), "questions = 21"),
        (QuestionStream(changed, questions_per_step=4, seed=9), "digest"),
    ):
        with pytest.raises(ValueError, match=f"position with {name}"):
            stream.set_state(saved)
        assert stream.next_batch().index == 0
    with pytest.raises(ValueError, match="keys"):
        QuestionStream(questions(20), questions_per_step=4, seed=9).set_state({"next_index": 3})


def test_stream_processes_share_each_batch_without_overlap():
    alone = QuestionStream(questions(24), questions_per_step=6, seed=5)
    shares = [
        QuestionStream(questions(24), questions_per_step=6, seed=5, process_index=i, process_count=3) for i in range(3)
    ]
    for _ in range(9):
        batch, parts = ids(alone.next_batch()), [ids(stream.next_batch()) for stream in shares]
        assert [len(part) for part in parts] == [2, 2, 2]
        assert Counter(i for part in parts for i in part) == Counter(batch)
        assert len({json.dumps(stream.get_state()) for stream in (alone, *shares)}) == 1


def test_stream_refuses_a_batch_that_cannot_be_filled():
    for count, per_step, shares in ((3, 4, (0, 1)), (8, 0, (0, 1)), (8, 6, (0, 4))):
        with pytest.raises(ValueError, match=r"data\.questions_per_step"):
            QuestionStream(
                questions(count),
                questions_per_step=per_step,
                seed=0,
                process_index=shares[0],
                process_count=shares[1],
            )
    with pytest.raises(ValueError, match="process index"):
        QuestionStream(questions(8), questions_per_step=4, seed=0, process_index=2, process_count=2)
    assert len(QuestionStream(questions(4), questions_per_step=4, seed=0).next_batch().questions) == 4
