"""Tokenizers: the ids of transformers for the same file, and text that streams whole characters."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from models import tokenizer_hf
from models.checkpoint import open_checkpoint
from models.errors import CorruptModel, NoSuchModel, UnsupportedModel
from models.gguf import open_gguf
from models.pretokenizers import PRE_TOKENIZERS
from models.tokenizer import BYTE_OF, Tokenizer
from models.tokenizer_gguf import load
from tests.models.default_model import default_model_path
from tests.models.tiny_tokenizers import gguf_with_tokenizer

CHAR_OF = {byte: char for char, byte in BYTE_OF.items()}
TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two leading, and   three inside \n\n\n\tnewlines  ",
    "I'm we'll THEY'VE it's 'quoted'",
    "3.14159 and 1234567890, 12 34; x2y3",
    "naïve café Ünïcödé – “quotes” … €",
    "日本語のテキスト 中文 한국어",
    "emoji 👩‍👩‍👧‍👦 🇩🇪 \U0001f680",
    "def f(x):\n    return x**2  # comment\n",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "a\x00b\x7f\x80\u200b\ufeff",
    "ﷺ Å Å",
]


@pytest.fixture(scope="module")
def smollm() -> Tokenizer:
    return open_checkpoint(default_model_path()).tokenizer()


@pytest.fixture(scope="module")
def oracle() -> Any:
    from transformers import AutoTokenizer

    path = default_model_path()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
def test_same_ids_as_transformers(smollm: Tokenizer, oracle: Any, text: str) -> None:
    ids = smollm.encode(text)
    assert ids == oracle(text, add_special_tokens=False)["input_ids"]
    assert smollm.decode(ids, skip_special=False) == text
    assert smollm.decode(ids) == oracle.decode(ids, skip_special_tokens=True)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60))
def test_same_ids_as_transformers_for_any_text(smollm: Tokenizer, oracle: Any, text: str) -> None:
    ids = smollm.encode(text)
    assert ids == oracle(text, add_special_tokens=False)["input_ids"]
    assert smollm.decode(ids) == oracle.decode(ids, skip_special_tokens=True)


def test_what_the_default_model_has(smollm: Tokenizer) -> None:
    assert (smollm.vocab_size, smollm.bos_id, smollm.add_bos) == (49152, 1, False)
    assert (smollm.bos_token, smollm.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert {smollm.id_of("<|im_end|>"), smollm.id_of("<|endoftext|>")} == smollm.eos_ids
    assert smollm.token_bytes(smollm.encode(" the")[0]) == b" the"
    assert smollm.token_bytes(49152) == b""
    assert smollm.token_bytes(-1) == b""


def test_control_tokens_in_text_are_plain_unless_asked_for(smollm: Tokenizer) -> None:
    text = "<|im_end|>"
    assert smollm.encode(text) == [2]
    plain = smollm.encode(text, parse_special=False)
    assert 2 not in plain
    assert smollm.decode(plain) == text
    assert smollm.encode(text) == [2]


def test_a_lone_surrogate_becomes_the_replacement_character(smollm: Tokenizer) -> None:
    assert smollm.decode(smollm.encode("a\ud800b")) == "a\ufffdb"


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(max_codepoint=0x1FFFF, codec="utf-8"), max_size=40))
def test_a_stream_gives_whole_characters_that_add_up(smollm: Tokenizer, text: str) -> None:
    # this vocabulary lacks the tokens of a few control bytes
    assume(all(smollm.id_of(CHAR_OF[byte]) is not None for byte in text.encode()))
    stream = smollm.stream(skip_special=False)
    parts = [stream.push(token) for token in smollm.encode(text)]
    assert "".join(parts) + stream.flush() == text
    assert all("\ufffd" not in part for part in parts) or "\ufffd" in text


def test_a_stream_holds_back_half_a_character(smollm: Tokenizer) -> None:
    raw = "🚀".encode()
    ids = [smollm.id_of(CHAR_OF[byte]) for byte in raw]
    stream = smollm.stream()
    assert [stream.push(n) for n in ids if n is not None] == ["", "", "", "🚀"]
    assert stream.flush() == ""
    assert [stream.push(n) for n in ids[:3] if n is not None] == ["", "", ""]
    assert stream.flush() == "\ufffd"
    assert stream.push(smollm.encode("x")[0]) == "x"


def test_special_tokens_are_shown_only_on_demand(smollm: Tokenizer) -> None:
    assert smollm.stream().push(2) == ""
    assert smollm.stream(skip_special=False).push(2) == "<|im_end|>"
    assert smollm.decode([2, 19556]) == "Hello"


# --- SentencePiece vocabularies ------------------------------------------------------------

PIECES = {
    "<unk>": (0.0, 2),
    "<s>": (0.0, 3),
    "</s>": (0.0, 3),
    "<end_of_turn>": (0.0, 4),
    **{f"<0x{n:02X}>": (0.0, 6) for n in range(256)},
    **{
        piece: (-float(n), 1)
        for n, piece in enumerate(
            ["▁t", "he", "▁the", "er", "▁a", "in", "ther", "▁ther", "▁▁", "é", "ab", "abc", "bc"]
        )
    },
    **{char: (-100.0 - n, 1) for n, char in enumerate("▁thereinabcé.")},
}


def spm_reference(text: str) -> list[str]:
    """llama.cpp's SentencePiece merging: always the best-scored neighbours, leftmost first."""
    parts = list(text.replace(" ", "▁"))
    while True:
        best = None
        for n in range(len(parts) - 1):
            score, kind = PIECES.get(parts[n] + parts[n + 1], (0.0, 0))
            score = 1.0 if parts[n] + parts[n + 1] == "▁▁" else score  # user-defined: before all
            if kind in (1, 4) and (best is None or score > best[0]):
                best = (score, n)
        if best is None:
            break
        parts[best[1] : best[1] + 2] = [parts[best[1]] + parts[best[1] + 1]]
    out: list[str] = []
    for part in parts:
        out += [part] if part in PIECES else [f"<0x{byte:02X}>" for byte in part.encode()]
    return out


@pytest.fixture(scope="module", params=[True, False])
def pieces(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = gguf_with_tokenizer(
        tmp_path_factory.mktemp("spm") / "m.gguf",
        "llama",
        [piece if piece != "▁▁" else "  " for piece in PIECES],  # as Gemma's files have it
        types=[kind if piece != "▁▁" else 4 for piece, (_, kind) in PIECES.items()],
        scores=[score for score, _ in PIECES.values()],
        space_prefix=request.param,
    )
    tokenizer = load(open_gguf(path))
    assert tokenizer.add_bos
    return tokenizer


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="thereinabcé. 日🚀x", min_size=1, max_size=30))
def test_sentencepiece_merges_by_score(pieces: Tokenizer, text: str) -> None:
    names = list(PIECES)
    prefix = " " if len(pieces.encode("b")) == 2 else ""  # ▁ and b
    ids = pieces.encode(text)
    assert [names[n] for n in ids] == spm_reference(prefix + text)
    assert pieces.decode(ids) == text
    stream = pieces.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == prefix + text


def test_byte_tokens_and_ends_of_pieces(pieces: Tokenizer) -> None:
    assert pieces.token_bytes(list(PIECES).index("<0xE6>")) == b"\xe6"
    assert pieces.eos_ids >= {list(PIECES).index("<end_of_turn>")}
    assert pieces.encode("<end_of_turn>", parse_special=False)[-1] == 3  # user-defined, not control
    assert pieces.encode("<s>") != pieces.encode("<s>", parse_special=False)


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_every_pre_tokenizer_builds_and_loses_nothing(tmp_path: Path, name: str) -> None:
    tokens = [*BYTE_OF, "ab"]
    path = gguf_with_tokenizer(tmp_path / "m.gguf", "gpt2", tokens, merges=["a b"], pre=name)
    tokenizer = load(open_gguf(path))
    for text in TEXTS[:-1]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"model": "bert"}, UnsupportedModel, "tokenizer 'bert'"),
        ({"pre": "klingon"}, UnsupportedModel, "pre-tokenizer 'klingon'"),
        ({"tokens": ["a", "a"]}, CorruptModel, "twice"),
        ({"merges": ["a z"]}, CorruptModel, "expected two tokens, found a z"),
        ({"merges": None}, CorruptModel, "merges' is missing"),
        ({"types": [1]}, CorruptModel, "token types"),
        ({"eos": 7}, CorruptModel, "0 <= id < 3"),
        ({"model": "llama", "merges": None}, CorruptModel, "scores"),
    ],
)
def test_faulty_vocabularies_are_typed_errors(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    settings_ = {"model": "gpt2", "tokens": ["a", "b", "ab"], "merges": ["a b"], **options}
    with pytest.raises(error, match=says):
        load(open_gguf(gguf_with_tokenizer(tmp_path / "m.gguf", **settings_)))


# --- tokenizer.json --------------------------------------------------------------------------


def save_hf(folder: Path, *, byte_level: bool) -> None:
    if byte_level:
        vocab = {char: n for n, char in enumerate(BYTE_OF)} | {"ab": 256}
        backend = Backend(BPE(vocab=vocab, merges=[("a", "b")]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    else:
        vocab = {f"<0x{n:02X}>": n for n in range(256)} | {"▁": 256, "a": 257, "▁a": 258}
        backend = Backend(BPE(vocab=vocab, merges=[("▁", "a")], byte_fallback=True))
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        backend.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>", "<|eot_id|>")])
    backend.add_tokens([AddedToken("<tool>", special=False)])
    start = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", start)]
    )
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": "T"})
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 259]}))


@pytest.mark.parametrize("byte_level", [True, False])
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=20))
def test_tokenizer_json_decodes_as_its_own_decoder(
    tmp_path_factory: pytest.TempPathFactory, byte_level: bool, text: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / f"hf-{byte_level}"
    if not folder.exists():
        folder.mkdir()
        save_hf(folder, byte_level=byte_level)
    tokenizer = tokenizer_hf.load(folder)
    ids = tokenizer.encode(text)
    assert ids == tokenizer.backend.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == tokenizer.backend.decode(ids, skip_special_tokens=True)
    plain = tokenizer.encode(text, parse_special=False)
    assert tokenizer.decode(plain) == text


def test_what_the_files_beside_tokenizer_json_say(tmp_path: Path) -> None:
    save_hf(tmp_path, byte_level=True)
    tokenizer = tokenizer_hf.load(tmp_path)
    eot = tokenizer.id_of("<|eot_id|>")
    assert tokenizer.eos_ids == {258, 259, tokenizer.id_of("</s>"), eot}
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.add_bos) == ("<s>", "</s>", True)
    assert tokenizer.special_ids == {tokenizer.id_of(t) for t in ("<s>", "</s>", "<|eot_id|>")}
    assert tokenizer_hf.chat_template(tmp_path) == "T"
    named = [{"name": "tool_use", "template": "U"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert tokenizer_hf.chat_template(tmp_path) == "D"
    (tmp_path / "chat_template.jinja").write_text("é", encoding="utf-8")
    assert tokenizer_hf.chat_template(tmp_path) == "é"


def test_faulty_tokenizer_files_are_typed_errors(tmp_path: Path) -> None:
    with pytest.raises(NoSuchModel, match=r"tokenizer\.json"):
        tokenizer_hf.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CorruptModel, match="not JSON"):
        tokenizer_hf.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(CorruptModel, match="not a tokenizer"):
        tokenizer_hf.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": 3}')
    with pytest.raises(CorruptModel, match="chat_template"):
        tokenizer_hf.chat_template(tmp_path)
