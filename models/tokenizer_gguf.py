"""Tokenizer from GGUF metadata: byte-level BPE ("gpt2") and SentencePiece BPE ("llama")."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from models.errors import CorruptModel, UnsupportedModel
from models.gguf_file import GgufFile
from models.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from models.tokenizer import Spelling, Tokenizer

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def load(file: GgufFile) -> Tokenizer:
    """Build the tokenizer that a file describes.

    Raises:
        CorruptModel: the vocabulary is missing, or its parts contradict each other.
        UnsupportedModel: another kind of vocabulary or pre-tokenizer, by name.
    """
    model = file.text("tokenizer.ggml.model")
    tokens = _tokens(file)
    types = _types(file, len(tokens))
    add_bos = file.flag("tokenizer.ggml.add_bos_token")
    spelling: Spelling
    strip = False
    if model == "gpt2":
        words = _pre_tokenizer(file)
        backend, spelling = _byte_level(file, tokens, words), "byte_level"
        add_bos = words.add_bos if add_bos is None else add_bos
    elif model == "llama":
        prefix = file.flag("tokenizer.ggml.add_space_prefix")
        strip = prefix is None or prefix
        backend, spelling = _sentencepiece(file, tokens, types, strip), "pieces"
        add_bos = add_bos is None or add_bos
    else:
        raise UnsupportedModel(file.path, f"tokenizer {model!r}; read are 'gpt2' and 'llama'")
    special = [n for n, kind in enumerate(types) if kind == CONTROL]
    # tokens that the vocabulary spells otherwise (Gemma's runs of spaces) come about by merging
    plain = [
        n
        for n, kind in enumerate(types)
        if kind == USER_DEFINED and backend.token_to_id(tokens[n]) == n
    ]
    backend.add_special_tokens([_added(tokens[n], special=True) for n in special])
    backend.add_tokens([_added(tokens[n], special=False) for n in plain])
    ids = {key: _token_id(file, key, len(tokens)) for key in (*END_KEYS, "bos_token_id")}
    if model == "llama":  # ids that SentencePiece's files may leave out
        for key, usual in (("bos_token_id", 1), ("eos_token_id", 2)):
            if f"tokenizer.ggml.{key}" not in file.metadata and usual in special:
                ids[key] = usual
    return Tokenizer(
        backend,
        spelling=spelling,
        added={n: tokens[n] for n in (*special, *plain)},
        special_ids=[*special, *(n for n, kind in enumerate(types) if kind == UNKNOWN)],
        eos_ids=[n for key in END_KEYS if (n := ids[key]) is not None],
        eos_id=ids["eos_token_id"],
        bos_id=ids["bos_token_id"],
        add_bos=add_bos,
        strip_first_space=strip,
    )


def _tokens(file: GgufFile) -> list[str]:
    array = file.strings("tokenizer.ggml.tokens")
    if array is None or not len(array):
        raise CorruptModel(file.path, "metadata 'tokenizer.ggml.tokens' is missing")
    return array.to_list()


def _types(file: GgufFile, count: int) -> list[int]:
    array = file.array("tokenizer.ggml.token_type")
    if array is None:
        return [1] * count
    if len(array) != count:
        raise CorruptModel(file.path, "token types", expected=f"{count} of them", found=len(array))
    return [int(kind) for kind in array]


def _token_id(file: GgufFile, key: str, count: int) -> int | None:
    value = file.integer(f"tokenizer.ggml.{key}")
    if value is None or value == 0xFFFFFFFF or value == -1:  # both mean "none"
        return None
    if not 0 <= value < count:
        raise CorruptModel(
            file.path,
            f"metadata 'tokenizer.ggml.{key}'",
            expected=f"0 <= id < {count}",
            found=value,
        )
    return value


def _added(text: str, *, special: bool) -> AddedToken:
    return AddedToken(text, normalized=False, special=special)


def _vocabulary(path: Path, tokens: Sequence[str]) -> dict[str, int]:
    vocab = {token: n for n, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise CorruptModel(
            path, "tokens occur twice", expected=f"{len(tokens)} different", found=len(vocab)
        )
    return vocab


def _pre_tokenizer(file: GgufFile) -> PreTokenizer:
    name = file.text("tokenizer.ggml.pre") or "default"
    if name not in PRE_TOKENIZERS:
        raise UnsupportedModel(
            file.path, f"pre-tokenizer {name!r}; known are {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    return PRE_TOKENIZERS[name]


def _byte_level(file: GgufFile, tokens: Sequence[str], words: PreTokenizer) -> Backend:
    array = file.strings("tokenizer.ggml.merges")
    if array is None:
        raise CorruptModel(file.path, "metadata 'tokenizer.ggml.merges' is missing")
    vocab = _vocabulary(file.path, tokens)
    merges = []
    for merge in array.to_list():
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise CorruptModel(
                file.path, "a merge of no tokens", expected="two tokens", found=merge
            )
        merges.append((left, right))
    backend = Backend(BPE(vocab=vocab, merges=merges, ignore_merges=words.ignore_merges))
    if words.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(split), behavior="isolated") for split in words.splits),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return backend


def _sentencepiece(
    file: GgufFile, tokens: list[str], types: Sequence[int], space_prefix: bool
) -> Backend:
    # Gemma's files write runs of spaces as spaces; all other tokens write ▁ for a space.
    taken = set(tokens)
    runs = {token: "▁" * len(token) for token in taken if token and not token.strip(" ")}
    spelled = [
        run if (run := runs.get(token)) is not None and run not in taken else token
        for token in tokens
    ]
    vocab = _vocabulary(file.path, spelled)
    scores = file.array("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise CorruptModel(
            file.path,
            "token scores",
            expected=f"{len(tokens)} of them",
            found=None if scores is None else len(scores),
        )
    # user-defined tokens come first, in their order: llama.cpp matches them in the text
    mergeable = {
        token: math.inf if types[n] == USER_DEFINED else float(scores[n])
        for token, n in vocab.items()
        if types[n] not in (UNKNOWN, CONTROL, BYTE)
    }
    unknown = next((spelled[n] for n, kind in enumerate(types) if kind == UNKNOWN), None)
    backend = Backend(
        BPE(
            vocab=vocab,
            merges=list(_merges(mergeable, vocab)),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if space_prefix else spaces
    )
    return backend


def _merges(scores: Mapping[str, float], vocab: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Pairs of tokens that make a token, best first: SentencePiece merges by the result's score.

    Ties go to the lower id, then to the shorter left part.
    """
    pairs = []
    for token, score in scores.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in scores and right in scores:
                pairs.append((-score, vocab[token], left, right))
    pairs.sort(key=lambda pair: (pair[0], pair[1], len(pair[2])))
    return ((left, right) for _, _, left, right in pairs)
