"""Tiny tokenizers of the kinds that well-known models have, trained once per session on the zoo's rows."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files

from chat_formats import ChatFormat
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY_SIZE = 800
# Words with the blank before them, as GPT-2 splits them. Digits are split in groups of 1 (Qwen), 3 (Llama-3) or not at all.
_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|{digits}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
_DIGITS = {"byte-level": r" ?\p{N}+", "byte-level-single-digits": r"\p{N}", "byte-level-triple-digits": r"\p{N}{1,3}"}
# Where SentencePiece writes a blank of its own: before each text between special tokens (Llama-2 in its first, "legacy"
# form), before the first text only (Mistral v0.3), or nowhere (Gemma).
_PREFIXES = {"metaspace-prefix": "always", "metaspace-first": "first", "metaspace-bare": "never"}
VOCABULARIES = [*_DIGITS, *_PREFIXES]


def format_tokenizer(chat_format: ChatFormat) -> PreTrainedTokenizerFast:
    """A tokenizer of the format's kind, with its special tokens and its template."""
    return tiny_tokenizer(
        chat_format.vocabulary,
        special_tokens=chat_format.special_tokens,
        special_tokens_with_blanks=chat_format.special_tokens_with_blanks,
        added_tokens=chat_format.added_tokens,
        bos=chat_format.bos,
        eos=chat_format.eos,
        chat_template=chat_format.jinja,
    )


def tiny_tokenizer(
    vocabulary: str,
    *,
    special_tokens: list[str],
    eos: str,
    bos: str | None = None,
    special_tokens_with_blanks: list[str] | None = None,
    added_tokens: list[str] | None = None,
    chat_template: str | None = None,
) -> PreTrainedTokenizerFast:
    """A tokenizer with a vocabulary of VOCABULARIES. Equal arguments give equal ids.

    No token is added to a text by itself, so add_special_tokens changes nothing.
    """
    tokenizer = Tokenizer.from_str(_trained(vocabulary))
    special = [token for token in dict.fromkeys([bos, eos, *special_tokens]) if token is not None]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False, rstrip=True) for token in special_tokens_with_blanks or []]
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added_tokens or []])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=eos,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


@cache
def _trained(vocabulary: str) -> str:
    """The tokenizer.json of a kind, without special tokens."""
    tokenizer = _byte_level(_DIGITS[vocabulary]) if vocabulary in _DIGITS else _metaspace(_PREFIXES[vocabulary])
    return tokenizer.to_str()


@cache
def _texts() -> list[str]:
    """A few hundred messages of the zoo's rows."""
    folder = files("ultrafuser.zoo") / "data"
    lines = [
        line
        for domain in ("text", "code", "math", "mixed")
        for line in (folder / f"{domain}.train.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    ]
    return [message["content"] for line in lines for message in json.loads(line)["messages"]]


def _byte_level(digits: str) -> Tokenizer:
    """Byte-level BPE, as in GPT-2, Llama-3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS.replace("{digits}", digits)), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY_SIZE, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_texts(), trainer)
    return tokenizer


def _metaspace(prefix: str) -> Tokenizer:
    """BPE over text whose blanks are written `▁`, with byte fallback, as SentencePiece trains it."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY_SIZE - 256, show_progress=False)
    words.train_from_iterator([line for text in _texts() for line in text.splitlines()], trainer)
    model = json.loads(words.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]] + [("▁", "▁"), ("▁▁", "▁▁")]
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(model["vocab"], key=model["vocab"].get)]
    tokens += ["▁▁", "▁▁▁▁"]
    if prefix == "never":  # Gemma has tokens for line breaks, Llama-2 spells them in bytes
        tokens += ["\n", "\n\n"]
        merges.append(("\n", "\n"))
    ids = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    else:
        blanks = normalizers.Replace(" ", "▁")
        steps = [normalizers.Prepend("▁"), blanks] if prefix == "always" else [blanks]
        tokenizer.normalizer = normalizers.Sequence(steps)
    if prefix != "never":
        decoder.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(decoder)
    return tokenizer
