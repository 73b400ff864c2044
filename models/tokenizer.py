"""Text to token ids and back, the same for every format; streams never split a character."""

from __future__ import annotations

import codecs
import threading
from collections.abc import Iterable, Mapping
from typing import Literal

import tokenizers

Spelling = Literal["byte_level", "pieces"]
# Texts that end a turn in some model, whatever its metadata calls the end of a sequence.
# Source: llama.cpp, llama_vocab::impl::load, special_eog_ids.
END_TEXTS = (
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>"),
    *("<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<|eot|>", "<EOT>", "_<EOT>"),
    *("<|END_OF_TURN_TOKEN|>", "<｜end▁of▁sentence｜>"),
)


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies, reversed.

    Source: openai/gpt-2 ``encoder.py``, bytes_to_unicode.
    """
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in shown}
    hidden = [byte for byte in range(256) if byte not in shown]
    alphabet.update({chr(256 + n): byte for n, byte in enumerate(hidden)})
    return alphabet


BYTE_OF = _byte_alphabet()


class Detokenizer:
    """Text of one answer, token by token; holds back the bytes of an unfinished character."""

    def __init__(self, tokenizer: Tokenizer, *, hidden_ids: frozenset[int]) -> None:
        self._tokenizer, self._hidden_ids = tokenizer, hidden_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Text that is certain now; empty while a character is incomplete."""
        if token_id in self._hidden_ids:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class Tokenizer:
    """One model's tokenizer. Thread-safe.

    Attributes:
        vocab_size: ids are ``0 <= id < vocab_size`` (the model's own vocabulary may be padded).
        special_ids: control tokens; they are matched in text only where ``parse_special`` and
            never shown.
        eos_ids: every token that ends an answer.
        bos_id: token before a text; None if the model has none.
        add_bos: a plain prompt starts with ``bos_id`` (chat templates write it themselves).
        bos_token, eos_token: their texts, "" where absent, as chat templates want them.
        backend: the tokenizer of the ``tokenizers`` package.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        spelling: Spelling,
        added: Mapping[int, str],
        special_ids: Iterable[int],
        eos_ids: Iterable[int],
        eos_id: int | None = None,
        bos_id: int | None = None,
        add_bos: bool = False,
        strip_first_space: bool = False,
    ) -> None:
        self.backend = backend
        ids = backend.get_vocab(with_added_tokens=True).values()
        self.vocab_size: int = max(ids, default=-1) + 1
        self.special_ids = frozenset(special_ids)
        ends = {
            token_id
            for text in END_TEXTS
            if (token_id := backend.token_to_id(text)) is not None and token_id in added
        }
        self.eos_ids = frozenset(eos_ids) | ends
        self.bos_id, self.add_bos = bos_id, add_bos and bos_id is not None
        self.bos_token = self._text_of(bos_id)
        self.eos_token = self._text_of(eos_id)
        self._added, self._spelling = dict(added), spelling
        self._strip_first_space = strip_first_space
        self._lock = threading.Lock()

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Ids of ``text``, with no bos or eos added.

        Args:
            text: lone surrogates count as U+FFFD.
            parse_special: control tokens written in the text become those tokens; otherwise
                they are ordinary characters. Use False for text from outside.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        with self._lock:
            self.backend.encode_special_tokens = not parse_special
            # The batch form alone lets other threads run meanwhile; 8 MB of text take seconds.
            found = self.backend.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = found[0].ids
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of a whole sequence; bytes that are no UTF-8 become U+FFFD."""
        raw = b"".join(
            self.token_bytes(token_id)
            for token_id in ids
            if not (skip_special and token_id in self.special_ids)
        )
        text = raw.decode("utf-8", "replace")
        return text.removeprefix(" ") if self._strip_first_space else text

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that one token stands for; empty for an id without a token (padding)."""
        literal = self._added.get(token_id)
        if literal is not None:
            return literal.encode()
        piece = self.backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        if piece is None:
            return b""
        if self._spelling == "byte_level":
            try:
                return bytes([BYTE_OF[char] for char in piece])
            except KeyError:
                return str(piece).encode()  # a literal among byte-level tokens
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            try:
                return bytes([int(piece[3:5], 16)])
            except ValueError:
                pass  # looks like a byte and is none
        return str(piece).replace("▁", " ").encode()

    def stream(
        self, *, skip_special: bool = True, shown: frozenset[int] = frozenset()
    ) -> Detokenizer:
        """A fresh detokenizer for one answer; ``shown`` are control tokens not to be skipped."""
        hidden = self.special_ids - shown if skip_special else frozenset()
        return Detokenizer(self, hidden_ids=hidden)

    def id_of(self, token: str) -> int | None:
        """Id of a token by its exact spelling in the vocabulary."""
        token_id: int | None = self.backend.token_to_id(token)
        return token_id

    def _text_of(self, token_id: int | None) -> str:
        return "" if token_id is None else str(self.backend.id_to_token(token_id) or "")
