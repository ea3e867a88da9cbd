"""Text to tokens and back, with a Hugging Face tokenizer from a local folder.

A prompt is `<bos>` (where the tokenizer has one) and its text; a demonstration is its text and the stop token. A text
that cannot be encoded without loss of meaning is refused here, so nothing downstream meets an unknown token.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from hptjax.errors import first_line

Tokenizer = Any  # a transformers.PreTrainedTokenizerBase; transformers is imported only where one is loaded

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model folder. Local files only; code that lies in the folder is never run.

    Raises
      no such folder -> FileNotFoundError; a tokenizer that needs code of its own, that cannot be read, or without a
      stop token -> ValueError.
    """
    folder = Path(folder)
    if not os.path.isfile(folder / "tokenizer_config.json"):  # pathlib raises where a name is too long
        raise FileNotFoundError(
            f"expected a tokenizer (tokenizer_config.json, tokenizer.json) in {folder}, found none; set model.path "
            f"or model.tokenizer to a Hugging Face folder on this machine"
        )
    transformers = _transformers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers and tokenizers raise what they meet
        raise ValueError(
            f"expected a tokenizer that transformers can load from {folder} without code of its own, got "
            f"{type(error).__name__}: {first_line(error)}; change model.path or model.tokenizer"
        ) from None
    if tokenizer.eos_token_id is None:
        raise ValueError(f"expected the tokenizer in {folder} to have an eos_token, which ends a completion; got none")
    return tokenizer


def make_character_tokenizer(symbols: str, folder: str | Path) -> Tokenizer:
    """Writes a tokenizer with one token per character into a folder and returns it as `load_tokenizer` reads it.

    Ids: 0 pad, 1 bos, 2 eos, then the symbols in the given order. There is no unknown token, so a character outside
    the symbols is an error, never a token.
    """
    import tokenizers

    if not symbols or len(set(symbols)) != len(symbols):
        raise ValueError(f"expected distinct symbols, at least one, got {symbols!r}")
    vocabulary = {token: index for index, token in enumerate((PAD, BOS, EOS, *symbols))}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    tokenizer = _transformers().PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )
    Path(folder).mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(folder))
    return load_tokenizer(folder)


def encode_prompt(tokenizer: Tokenizer, text: str, *, add_bos: bool = True) -> Int[np.ndarray, " p"]:
    """The prompt's tokens, after `<bos>` if the tokenizer has one and `add_bos` asks for it; int32."""
    start = [tokenizer.bos_token_id] if add_bos and tokenizer.bos_token_id is not None else []
    return np.asarray(start + _encode(tokenizer, text), np.int32)


def encode_rendered(tokenizer: Tokenizer, text: str) -> Int[np.ndarray, " p"]:
    """The tokens of a text that a template has rendered: special tokens written out in it are what they say; int32.

    Nothing is added. Whether the user's own text holds special tokens must have been asked before (`has_specials`).
    """
    return np.asarray(_ids(tokenizer, text), np.int32)


def encode_demonstration(
    tokenizer: Tokenizer, text: str, stop: Int[np.ndarray, " s"] | None = None
) -> Int[np.ndarray, " c"]:
    """The demonstration's tokens and those that end it; int32. Nothing is cut: `prepare_questions` drops long ones.

    Args
      stop: what ends it, the stop token last; None: the tokenizer's eos.
    """
    end = [tokenizer.eos_token_id] if stop is None else stop.tolist()
    return np.asarray([*_encode(tokenizer, text), *end], np.int32)


def encode_many(tokenizer: Tokenizer, texts: Sequence[str], *, specials: bool) -> list[list[int] | None]:
    """The tokens of each text, on all cores; None for one that cannot be encoded.

    Args
      specials: whether special tokens may be written out in a text.
    """
    if not texts:
        return []
    try:
        found = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
    except Exception:  # one text is at fault, and the tokenizers library does not say which
        found = [_ids_or_none(tokenizer, text) for text in texts]
    if specials:
        return found
    outside = _no_text_ids(tokenizer)
    return [
        None if ids is None or outside.intersection(ids) or has_specials(tokenizer, text) else ids
        for text, ids in zip(texts, found, strict=True)
    ]


def decode(tokenizer: Tokenizer, tokens: Int[np.ndarray, " c"]) -> str:
    """The text of a completion. Special tokens at its end (stop token, padding) are dropped.

    Special tokens elsewhere stay visible as their text, because a verifier must not take `12-<bos>3` for `12-3`.
    """
    ids = np.asarray(tokens).tolist()
    special = special_ids(tokenizer)
    while ids and ids[-1] in special:
        ids.pop()
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Rows of an embedding that every token has its own in: the largest id and one; ids may have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def stop_ids(tokenizer: Tokenizer, extra: tuple[int, ...] = ()) -> frozenset[int]:
    """The tokens that end a completion: the tokenizer's eos and any extra ones that a chat format adds."""
    return frozenset({tokenizer.eos_token_id, *extra})


@functools.lru_cache(maxsize=8)
def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that are no text: those with a role (bos, eos ...) and the added ones that are marked special.

    Think tags that a tokenizer adds as plain text are not among them.
    """
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset({*tokenizer.all_special_ids, *added})


def has_specials(tokenizer: Tokenizer, text: str) -> bool:
    """Whether a special token is written out in a text, where it would be read as that token."""
    return _special_pattern(tokenizer).search(text) is not None


@functools.lru_cache(maxsize=8)
def _special_pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    words = sorted(tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer))), key=len, reverse=True)
    return re.compile("|".join(re.escape(word) for word in words) or r"(?!)")


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    ids = _ids(tokenizer, text)
    if _no_text_ids(tokenizer).intersection(ids) or has_specials(tokenizer, text):
        raise _cannot_encode(tokenizer, text)
    return ids


def _no_text_ids(tokenizer: Tokenizer) -> set[int]:
    """What the tokens of a text must not be."""
    return {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id} - {None}


def _ids_or_none(tokenizer: Tokenizer, text: str) -> list[int] | None:
    try:
        return _ids(tokenizer, text)
    except ValueError:
        return None


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:  # the tokenizers library raises bare Exception for an unknown character
        raise _cannot_encode(tokenizer, text) from error


def _cannot_encode(tokenizer: Tokenizer, text: str) -> ValueError:
    found = _special_pattern(tokenizer).search(text)
    if found is not None:
        why = f"which writes out the special token {found[0]!r}"
    else:
        vocabulary = tokenizer.get_vocab()
        unknown = sorted({character for character in text if character not in vocabulary})
        why = f"where these characters are not in its vocabulary: {unknown}"
    return ValueError(
        f"expected text that the tokenizer can represent, without special tokens written out; got {text[:80]!r}, {why}"
        "; change task.name or model.path so that they fit"
    )


def _transformers() -> Any:
    """The transformers package, without the notice that there is no torch: none is wanted."""
    logger = logging.getLogger("transformers")

    def keep(record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()

    logger.addFilter(keep)
    try:
        import transformers
    finally:
        logger.removeFilter(keep)
    return transformers
