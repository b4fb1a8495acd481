"""The keys of a GGUF file that describe its vocabulary."""

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from moekit.checkpoint.gguf.pieces import falls_back_on_bytes, merged_pairs, piece_fields, scores_suffice
from moekit.checkpoint.gguf.splitting import splitting_rule
from moekit.config.errors import InputError
from moekit.data.tokenizer import PAD, end_of_text, size

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""tokenizer.ggml.token_type"""

END_KEYS = ("eos", "eot", "eom")
"""Names under which llama.cpp knows tokens that end a text."""


class Vocabulary(NamedTuple):
    """Keys for the file, and what its user should know."""

    fields: dict[str, Any]
    notes: list[str]


def vocabulary(tokenizer: Tokenizer | None, vocab_size: int, ends: tuple[int, ...]) -> Vocabulary:
    """The keys of a byte-level BPE; without one, llama.cpp takes token ids alone. InputError for ids out of range."""
    if tokenizer is None:
        return Vocabulary({"tokenizer.ggml.model": "none"}, ["there is no tokenizer: llama.cpp takes token ids alone"])
    if size(tokenizer) > vocab_size:
        message = f"the tokenizer has {size(tokenizer)} ids, but `vocab_size` = {vocab_size}"
        raise InputError(message, "export the tokenizer the model was trained with")
    wrong = [end for end in ends if not 0 <= end < vocab_size]
    if wrong:
        raise InputError(f"the token {wrong[0]} that ends a text is outside `vocab_size` = {vocab_size}")
    contents = json.loads(tokenizer.to_str())
    described = _described(contents, _tokens(tokenizer, contents["model"], vocab_size))
    if described is None:
        why = "llama.cpp does not know this kind of tokenizer, which is left out: it takes token ids alone"
        return Vocabulary({"tokenizer.ggml.model": "none"}, [why])
    special = _special(tokenizer, ends)
    return Vocabulary(described.fields | special.fields | _frame(tokenizer), described.notes + special.notes)


def _described(contents: Mapping[str, Any], tokens: dict[str, Any]) -> Vocabulary | None:
    """How a text becomes tokens, as far as llama.cpp knows the way."""
    fields = dict(tokens)
    if falls_back_on_bytes(contents):
        fields |= {"tokenizer.ggml.model": "llama", **piece_fields(contents, tokens["tokenizer.ggml.tokens"])}
        exact = scores_suffice(contents)
    elif _is_byte_level(contents):
        rule = splitting_rule(contents)
        fields |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": rule.name}
        fields["tokenizer.ggml.merges"] = [" ".join(pair) for pair in merged_pairs(contents)]
        exact = rule.exact
    else:
        return None
    why = "llama.cpp splits text by another rule than this tokenizer: give it token ids, or expect some other tokens"
    return Vocabulary(fields, [] if exact else [why])


def _is_byte_level(contents: Mapping[str, Any]) -> bool:
    model, decoder = contents["model"], contents.get("decoder") or {}
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    return model["type"] == "BPE" and decoder.get("type") == "ByteLevel" and not affixes


def _tokens(tokenizer: Tokenizer, model: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Texts and types by id. Ids without a token are unused; their texts must differ from all others."""
    texts = {number: text for text, number in tokenizer.get_vocab(with_added_tokens=True).items()}
    added = tokenizer.get_added_tokens_decoder()
    known = set(texts.values())
    tokens, types = [], []
    for number in range(vocab_size):
        text = texts.get(number, f"[PAD{number}]")
        while number not in texts and text in known:
            text = f"[{text}]"
        tokens.append(text)
        special = added[number].special if number in added else None
        types.append(_type(text, special, model) if number in texts else UNUSED)
    return {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}


def _type(text: str, special: bool | None, model: Mapping[str, Any]) -> int:
    """`special` says what kind of added token it is, None: none."""
    if model.get("byte_fallback") and text == model.get("unk_token"):
        return UNKNOWN
    if model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", text):
        return BYTE
    return NORMAL if special is None else CONTROL if special else USER_DEFINED


def _special(tokenizer: Tokenizer, ends: tuple[int, ...]) -> Vocabulary:
    notes = []
    if not ends:
        try:
            ends = (end_of_text(tokenizer),)
        except InputError:
            return Vocabulary({}, ["no token ends a text: llama.cpp writes on until it is told to stop"])
    if len(ends) > len(END_KEYS):
        notes.append(f"llama.cpp knows {len(END_KEYS)} tokens that end a text: {list(ends[3:])} are left out")
    pad = tokenizer.token_to_id(PAD)
    fields = {f"tokenizer.ggml.{key}_token_id": end for key, end in zip(END_KEYS, ends, strict=False)}
    fields["tokenizer.ggml.bos_token_id"] = ends[0]
    fields["tokenizer.ggml.padding_token_id"] = ends[0] if pad is None else pad
    return Vocabulary(fields, notes)


def _frame(tokenizer: Tokenizer) -> dict[str, Any]:
    """What the tokenizer puts before and behind every text; moekit's own puts nothing."""
    probe = tokenizer.encode("a")
    added = [bool(special) for special in probe.special_tokens_mask] or [False]
    fields = {"tokenizer.ggml.add_bos_token": added[0], "tokenizer.ggml.add_eos_token": added[-1]}
    return fields | ({"tokenizer.ggml.bos_token_id": probe.ids[0]} if added[0] else {})
