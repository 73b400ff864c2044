"""GGUF reading: every number format, exact rows, and typed errors for every damaged header."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.checkpoint import open_checkpoint
from models.errors import CorruptModel, ModelError, NoSuchModel, UnsupportedModel
from models.gguf import open_gguf
from models.quant import KINDS, SUPPORTED, to_float32
from tests.models.tiny import llama_tensors, random_blocks, write_gguf


@pytest.mark.parametrize("kind", SUPPORTED)
def test_dequantisation_is_that_of_ggml(kind: str) -> None:
    packed = random_blocks(kind, 6, 512, seed=3)
    number = gguf.GGMLQuantizationType[kind]
    expected = np.asarray(gguf.dequantize(packed, number), dtype=np.float32).reshape(6, 512)
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(to_float32(packed, kind), expected)


def test_a_q4_1_block_by_hand() -> None:
    """ggml: weight = d * nibble + m; low nibbles are the first half of the block."""
    block = np.frombuffer(struct.pack("<ee", 0.5, -1.0) + bytes(range(16)), dtype=np.uint8)
    values = to_float32(block.reshape(1, 20), "Q4_1")[0]
    assert values[:16].tolist() == [0.5 * n - 1 for n in range(16)]
    assert values[16:].tolist() == [-1.0] * 16


def test_a_q8_0_block_by_hand() -> None:
    block = np.frombuffer(struct.pack("<e32b", 0.25, *range(-16, 16)), dtype=np.uint8)
    values = to_float32(block.reshape(1, 34), "Q8_0")[0]
    assert values.tolist() == [0.25 * n for n in range(-16, 16)]


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_1", "Q8_0"])
def test_weights_are_read_by_row_and_column(tmp_path: Path, kind: str) -> None:
    tensors = llama_tensors(kind=kind)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors))
    weight = checkpoint.tensor("layers.1.mlp.down_proj.weight")
    assert (weight.shape, weight.kind, weight.num_rows, weight.num_columns) == (
        (64, 96),
        kind,
        64,
        96,
    )
    whole = to_float32(tensors["blk.1.ffn_down.weight"][0], kind)
    np.testing.assert_array_equal(weight.dequantize(), whole)
    np.testing.assert_array_equal(weight.dequantize(slice(3, 9), slice(5, 71)), whole[3:9, 5:71])
    np.testing.assert_array_equal(weight.rows(slice(3, 9)).dequantize(slice(1, 2)), whole[4:5])
    packed = weight.packed(slice(60, None))
    assert packed.shape == (4, 96 // KINDS[kind].block_size * KINDS[kind].block_bytes)
    assert not packed.flags.writeable
    with pytest.raises(ValueError, match="contiguous"):
        weight.packed(slice(0, 4, 2))


@pytest.mark.parametrize("bias", [False, True])
def test_query_and_key_rows_come_in_halves(tmp_path: Path, bias: bool) -> None:
    """The file holds (pair, half) within each head; readers get (half, pair)."""
    tensors = llama_tensors(bias=bias, kind="Q4_1")
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors))
    parts = [("attn_q.weight", "q_proj.weight", 4), ("attn_k.weight", "k_proj.weight", 2)]
    if bias:
        parts += [("attn_q.bias", "q_proj.bias", 4), ("attn_k.bias", "k_proj.bias", 2)]
    for stored, name, heads in parts:
        raw, kind = tensors[f"blk.0.{stored}"]
        rows = raw.view(np.uint8).reshape(heads * 16, -1)
        expected = rows.reshape(heads, 8, 2, -1).swapaxes(1, 2).reshape(heads * 16, -1)
        weight = checkpoint.tensor(f"layers.0.self_attn.{name}")
        np.testing.assert_array_equal(weight.packed(), expected)
        np.testing.assert_array_equal(weight.packed(slice(10, 30)), expected[10:30])
        values = to_float32(expected, kind).reshape(weight.shape)
        np.testing.assert_array_equal(weight.rows(slice(10, 30)).dequantize(), values[10:30])
    assert checkpoint.spec.attention_bias is bias
    value = checkpoint.tensor("layers.0.self_attn.v_proj.weight")
    np.testing.assert_array_equal(value.packed(), tensors["blk.0.attn_v.weight"][0])


def test_what_a_checkpoint_tells(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", llama_tensors()))
    assert checkpoint.names()[0] == "embed_tokens.weight"
    assert checkpoint.names()[-1] == "norm.weight"
    assert checkpoint.spec.tied_embeddings
    assert checkpoint.chat_template == "{{ messages[0].content }}"
    assert checkpoint.size_bytes == (tmp_path / "m.gguf").stat().st_size
    with pytest.raises(KeyError):
        checkpoint.tensor("lm_head.weight")
    copy = tmp_path / "elsewhere.gguf"
    copy.write_bytes((tmp_path / "m.gguf").read_bytes())
    assert open_checkpoint(copy).fingerprint == checkpoint.fingerprint
    other = write_gguf(tmp_path / "o.gguf", llama_tensors(), metadata={"context_length": 257})
    assert open_checkpoint(other).fingerprint != checkpoint.fingerprint


def test_a_folder_with_one_gguf_is_that_model(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", llama_tensors())
    assert open_checkpoint(tmp_path).spec.family == "llama"
    write_gguf(tmp_path / "n.gguf", llama_tensors())
    with pytest.raises(NoSuchModel, match="2 GGUF models"):
        open_checkpoint(tmp_path)
    with pytest.raises(NoSuchModel, match="No such file"):
        open_checkpoint(tmp_path / "nothing.gguf")


def test_a_split_model_is_one_model(tmp_path: Path) -> None:
    tensors = llama_tensors()
    writer = gguf.GGUFWriter(
        tmp_path / "m.gguf", "llama", split_max_tensors=8, small_first_shard=False
    )
    for key, value in {
        "block_count": 2,
        "context_length": 256,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    for name, (data, _) in tensors.items():
        writer.add_tensor(name, data.view(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) == 3
    checkpoint = open_checkpoint(parts[0])
    assert open_checkpoint(tmp_path).names() == checkpoint.names()
    np.testing.assert_array_equal(
        checkpoint.tensor("norm.weight").dequantize(), tensors["output_norm.weight"][0]
    )
    assert checkpoint.size_bytes == sum(part.stat().st_size for part in parts)
    with pytest.raises(CorruptModel, match="not the first part"):
        open_checkpoint(parts[1])
    parts[2].unlink()
    with pytest.raises(NoSuchModel, match="00003-of-00003"):
        open_checkpoint(parts[0])


def test_a_missing_or_misshapen_tensor_is_named_with_both_shapes(tmp_path: Path) -> None:
    tensors = llama_tensors()
    del tensors["blk.1.attn_v.weight"]
    with pytest.raises(CorruptModel, match=r"layers\.1\.self_attn\.v_proj\.weight.*\(32, 64\)"):
        open_checkpoint(write_gguf(tmp_path / "a.gguf", tensors))
    tensors = llama_tensors()
    tensors["blk.1.attn_v.weight"] = tensors["blk.1.attn_q.weight"]
    with pytest.raises(CorruptModel, match=r"expected \(32, 64\), found \(64, 64\)") as caught:
        open_checkpoint(write_gguf(tmp_path / "b.gguf", tensors))
    assert caught.value.tensor == "layers.1.self_attn.v_proj.weight"
    assert caught.value.path.endswith("b.gguf")


def test_tensors_of_another_architecture_are_refused_by_name(tmp_path: Path) -> None:
    tensors = llama_tensors()
    tensors["blk.0.ssm_conv.weight"] = (np.zeros((4, 64), np.float32), "F32")
    with pytest.raises(UnsupportedModel, match=r"blk\.0\.ssm_conv\.weight"):
        open_checkpoint(write_gguf(tmp_path / "a.gguf", tensors))


@pytest.mark.parametrize(
    ("arch", "metadata", "says"),
    [
        ("mamba", {}, "architecture 'mamba'"),
        ("deepseek", {}, "architecture 'deepseek'"),
        ("llama", {"expert_count": 8, "expert_used_count": 2, "expert_gating_func": 3}, "func 3"),
        ("llama", {"rope.scaling.type": "longrope"}, "rope scaling 'longrope'"),
        ("llama", {"attention.value_length": 24}, "values of 24 beside keys of 16"),
    ],
)
def test_what_is_not_built_is_refused_by_name(
    tmp_path: Path, arch: str, metadata: dict[str, object], says: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", llama_tensors(), arch=arch, metadata=metadata)
    with pytest.raises(UnsupportedModel, match=says):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"block_count": None}, r"'llama\.block_count' is missing"),
        ({"attention.head_count": 0}, "head_count 0"),
        ({"attention.head_count_kv": 3}, "not a multiple of num_kv_heads 3"),
        ({"context_length": "long"}, "expected an integer, found str"),
        ({"block_count": 4_000_000_000}, "impossible"),
        ({"block_count": 3}, r"layers\.2\.input_layernorm\.weight"),
        ({"attention.layer_norm_rms_epsilon": -1.0}, "norm_eps"),
    ],
)
def test_impossible_metadata_is_corrupt(
    tmp_path: Path, metadata: dict[str, object], says: str
) -> None:
    with pytest.raises(CorruptModel, match=says):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", llama_tensors(), metadata=metadata))


def _header(
    *, magic: bytes = b"GGUF", version: int = 3, tensors: int = 0, values: int = 0
) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, values)


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _tensor(name: bytes, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    return _text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


@pytest.mark.parametrize(
    ("raw", "error", "says"),
    [
        (b"", CorruptModel, "expected 24, found 0"),
        (_header(magic=b"GGML"), CorruptModel, "not a GGUF file"),
        (_header(version=1), UnsupportedModel, "GGUF version 1"),
        (_header(version=0x03000000), UnsupportedModel, "big-endian"),
        (_header(tensors=2**63), CorruptModel, "absurd tensor count"),
        (_header(values=2**40), CorruptModel, "absurd metadata count"),
        (
            _header(values=1) + _text(b"k") + struct.pack("<IQ", 8, 2**62) + b"x" * 9,
            CorruptModel,
            "truncated in the header",
        ),
        (
            _header(values=1) + _text(b"k") + struct.pack("<I", 99) + b"x" * 9,
            CorruptModel,
            "unknown value type 99",
        ),
        (
            _header(values=1) + _text(b"k") + struct.pack("<IIQ", 9, 4, 2**61),
            CorruptModel,
            "truncated",
        ),
        (
            _header(values=1) + _text(b"k") + struct.pack("<IIQ", 9, 8, 2**61),
            CorruptModel,
            "longer than the file",
        ),
        (
            _header(values=1) + _text(b"k") + struct.pack("<IIQ", 9, 9, 1) + b"x" * 9,
            CorruptModel,
            "items of an unknown type",
        ),
        (
            _header(values=2) + 2 * (_text(b"k") + struct.pack("<IH", 2, 1)),
            CorruptModel,
            "occurs twice",
        ),
        (_header(values=1) + _text(b"k" * 2000) + b"x" * 9, CorruptModel, "too long"),
        (_header(values=1) + _text(b"\xff") + b"x" * 9, CorruptModel, "not UTF-8"),
        (
            _header(values=1) + _text(b"general.alignment") + struct.pack("<II", 4, 33),
            CorruptModel,
            "alignment",
        ),
        (_header(tensors=1) + _tensor(b"t", (32,) * 5, 0, 0), CorruptModel, "dimensions"),
        (_header(tensors=1) + _tensor(b"t", (31,), 3, 0), CorruptModel, "multiple of 32"),
        (_header(tensors=1) + _tensor(b"t", (2**62, 2**62), 0, 0), CorruptModel, "truncated file"),
        (_header(tensors=1) + _tensor(b"t", (0,), 0, 0), CorruptModel, "impossible shape"),
        (_header(tensors=1) + _tensor(b"t", (32,), 0, 7), CorruptModel, "misaligned"),
        (_header(tensors=1) + _tensor(b"t", (32,), 16, 0), UnsupportedModel, "IQ2_XXS"),
        (_header(tensors=1) + _tensor(b"t", (32,), 200, 0), UnsupportedModel, "type 200"),
        (
            _header(tensors=2)
            + _tensor(b"a", (32,), 0, 0)
            + _tensor(b"b", (32,), 0, 64)
            + b"x" * 400,
            CorruptModel,
            "overlaps a",
        ),
        (
            _header(tensors=2)
            + _tensor(b"a", (32,), 0, 0)
            + _tensor(b"a", (32,), 0, 128)
            + b"x" * 400,
            CorruptModel,
            "occurs twice",
        ),
    ],
)
def test_damaged_headers_are_named(
    tmp_path: Path, raw: bytes, error: type[ModelError], says: str
) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    with pytest.raises(error, match=says) as caught:
        open_gguf(path)
    assert "bad.gguf" in str(caught.value)


def test_every_truncation_is_a_typed_error(tmp_path: Path) -> None:
    raw = write_gguf(tmp_path / "m.gguf", llama_tensors(layers=1)).read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [*range(0, len(raw) - 1, 997), len(raw) - 64]:
        cut.write_bytes(raw[:size])
        with pytest.raises(CorruptModel):
            open_checkpoint(cut)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("flip") / "m.gguf", llama_tensors(layers=1))


@settings(max_examples=300, deadline=None)
@given(flips=st.lists(st.integers(0, 2**20), min_size=1, max_size=3))
@pytest.mark.slow
def test_flipped_header_bits_give_a_model_or_a_typed_error(sound: Path, flips: list[int]) -> None:
    damaged = bytearray(sound.read_bytes())
    header_bits = open_gguf(sound).header_bytes * 8
    for flip in flips:
        byte, bit = divmod(flip % header_bits, 8)
        damaged[byte] ^= 1 << bit
    path = sound.with_name("flipped.gguf")
    path.unlink(missing_ok=True)
    path.write_bytes(damaged)
    try:
        checkpoint = open_checkpoint(path)
        tokenizer = checkpoint.tokenizer()
    except ModelError:
        return
    tokenizer.decode(tokenizer.encode("ab c <|endoftext|>"))
    checkpoint.tensor("norm.weight").dequantize()
