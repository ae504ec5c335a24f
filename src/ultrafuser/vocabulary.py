"""The common vocabulary of specialists whose tokenizers agree or nearly agree, and the label that ends an answer."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ultrafuser.data.chat_format import ChatFormat
from ultrafuser.errors import TokenizerMismatchError

_TOKENS_SHOWN = 5
# Texts that tokenizers with different rules split differently: numbers, blanks, marks, line breaks, scripts.
_PROBES = (
    "The year 2024, 3.14 and 1,000,000.",
    "def f(x):\n    return {x: 1}\n\n\tx += 1",
    "  Don't  stop\u2026 caf\u00e9 na\u00efve \u4f60\u597d \u0928\u092e\u0938\u094d\u0924\u0947",
    "A\n\n\nB",
)


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that every specialist has, with the same ids.

    Attributes:
        size: the largest common id + 1.
        masked: the ids below it that are not common.
    """

    size: int
    masked: tuple[int, ...] = ()


def common_vocabulary(tokenizers: Mapping[str, PreTrainedTokenizerBase], table_rows: Mapping[str, int]) -> Vocabulary:
    """The tokens that every specialist can read and write.

    Added tokens that only some have, or have elsewhere, are left out. So are tokens without a row in an embedding table,
    and tokens by which one vocabulary is longer than another.

    Args:
        tokenizers: by specialist.
        table_rows: rows of each specialist's embedding table.

    Raises:
        TokenizerMismatchError: the vocabularies without added tokens contradict each other.
    """
    (first_name, first), *rest = tokenizers.items()
    for name, tokenizer in rest:
        if tokenizer is not first and (problem := _contradiction(first, tokenizer)):
            raise TokenizerMismatchError(
                f"specialist {name!r}: its tokenizer differs from that of {first_name!r}: {problem}. The specialists of a "
                "fused model need the same vocabulary apart from added tokens. Leave one of them out"
            )
    vocabularies = [tokenizer.get_vocab() for tokenizer in {id(t): t for t in tokenizers.values()}.values()]
    rows = min(table_rows.values())
    common = {
        index
        for token, index in vocabularies[0].items()
        if index < rows and all(vocabulary.get(token) == index for vocabulary in vocabularies[1:])
    }
    size = max(common, default=-1) + 1
    # ids without a token have padding rows in every table
    ids = {index for vocabulary in vocabularies for index in vocabulary.values() if index < size}
    return Vocabulary(size, tuple(sorted(ids - common)))


def shared_end(formats: Sequence[ChatFormat], vocabulary: Vocabulary) -> int:
    """The label that ends an answer: the first specialist's end token that lies in the common vocabulary's range.

    Raises:
        TokenizerMismatchError: no specialist has one there.
    """
    for end in [
        *(chat_format.end_token_id for chat_format in formats),
        *(chat_format.tokenizer.eos_token_id for chat_format in formats),
    ]:
        if end is not None and end < vocabulary.size:
            return end
    ends = ", ".join(f"{f.tokenizer.convert_ids_to_tokens(f.end_token_id)!r} of {f.name!r}" for f in formats)
    raise TokenizerMismatchError(
        f"no end token lies below the {vocabulary.size} tokens that all specialists have: {ends}. Set an eos_token that "
        "all have in one of the tokenizers"
    )


def is_same_tokenizer(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers read and write every text in the same way."""
    if first is second:
        return True
    if first.special_tokens_map != second.special_tokens_map or first.get_vocab() != second.get_vocab():
        return False
    return _fields(first) == _fields(second)


def _contradiction(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> str | None:
    """What makes two vocabularies unfit for each other, apart from added tokens."""
    added = set(first.get_added_vocab()) | set(second.get_added_vocab())
    vocab, second_vocab = (
        {token: index for token, index in tokenizer.get_vocab().items() if token not in added}
        for tokenizer in (first, second)
    )
    moved = sorted(token for token in vocab.keys() & second_vocab.keys() if vocab[token] != second_vocab[token])
    if moved:
        return f"the same tokens have other ids: {_some(f'{t} ({vocab[t]} and {second_vocab[t]})' for t in moved)}"
    by_id, second_by_id = ({index: token for token, index in v.items()} for v in (vocab, second_vocab))
    replaced = sorted(i for i in by_id.keys() & second_by_id.keys() if by_id[i] != second_by_id[i])
    if replaced:
        pairs = _some(f"{by_id[i]} and {second_by_id[i]}" for i in replaced)
        return f"the same ids are other tokens: {pairs}"
    only = sorted(vocab.keys() ^ second_vocab.keys())
    if len(only) > max(64, len(vocab) // 100):
        return f"vocabulary of {len(second_vocab)}, expected {len(vocab)}. Only one of them has: {_some(only)}"
    rules, second_rules = _fields(first), _fields(second)
    merges = [_common_merges(fields, vocab.keys() & second_vocab.keys()) for fields in (rules, second_rules)]
    if merges[0] != merges[1]:
        index = next((i for i, (a, b) in enumerate(zip(*merges, strict=False)) if a != b), "the end")
        return f"their merges differ from merge {index} on"
    if any(rules.get(key) != second_rules.get(key) for key in ("normalizer", "pre_tokenizer")):
        texts = [text for text in _PROBES if _encode(first, text) != _encode(second, text)]
        if texts:
            return f"they split or normalise text differently, for example {texts[0]!r}"
    return None


def _fields(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {}
    fields = json.loads(backend.to_str())
    return {key: fields.get(key) for key in ("normalizer", "pre_tokenizer", "model", "added_tokens")}


def _common_merges(fields: Mapping[str, Any], tokens: Collection[str]) -> list[Any]:
    """The merges whose result both vocabularies have."""
    merges = (fields.get("model") or {}).get("merges") or []
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges)
    return [pair for pair in pairs if "".join(pair) in tokens]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _some(tokens: Iterable[str]) -> str:
    tokens = list(tokens)
    rest = f" and {len(tokens) - _TOKENS_SHOWN} more" if len(tokens) > _TOKENS_SHOWN else ""
    return ", ".join(map(repr, tokens[:_TOKENS_SHOWN])) + rest
