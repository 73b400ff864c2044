"""safetensors folders: exact weights in every dtype, sharded indexes, named damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.checkpoint import open_checkpoint
from models.errors import CorruptModel, ModelError, NoSuchModel, UnsupportedModel
from models.layout import expected_tensors
from models.safetensors_files import open_safetensors
from models.spec_hf import from_hf_config
from tests.models.tiny import write_safetensors

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
Raw = dict[str, tuple[str, tuple[int, ...], bytes]]


def raw_tensors(kind: str = "F32", prefix: str = "model.") -> Raw:
    rng = np.random.default_rng(1)
    out: Raw = {}
    for name, shape in expected_tensors(from_hf_config(CONFIG, Path("c"))).items():
        values = rng.standard_normal(shape).astype(np.float32)
        raw = {
            "F32": values.tobytes(),
            "F16": values.astype(np.float16).tobytes(),
            "BF16": (values.view(np.uint32) >> 16).astype(np.uint16).tobytes(),
        }[kind]
        out[name if name.startswith("lm_head") else prefix + name] = (kind, shape, raw)
    return out


def save(folder: Path, tensors: Raw, **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("prefix", ["model.", "", "model.language_model."])
def test_weights_come_out_exactly(tmp_path: Path, kind: str, prefix: str) -> None:
    tensors = raw_tensors(kind, prefix)
    checkpoint = open_checkpoint(save(tmp_path, tensors))
    _, shape, raw = tensors[f"{prefix}layers.1.mlp.up_proj.weight"]
    if kind == "BF16":
        expected = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        expected = np.frombuffer(raw, np.float32 if kind == "F32" else np.float16)
    weight = checkpoint.tensor("layers.1.mlp.up_proj.weight")
    whole = expected.astype(np.float32).reshape(shape)
    assert (weight.kind, weight.shape) == (kind, shape)
    np.testing.assert_array_equal(weight.dequantize(), whole)
    np.testing.assert_array_equal(weight.dequantize(slice(2, 5), slice(3, 7)), whole[2:5, 3:7])
    assert checkpoint.tensor("norm.weight").dequantize().shape == (16,)
    assert checkpoint.chat_template is None
    assert len(checkpoint.fingerprint) == 32


def test_a_tied_output_layer_is_not_read_twice(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(tmp_path, raw_tensors(), tie_word_embeddings=True))
    assert "lm_head.weight" not in checkpoint.names()


def sharded(folder: Path) -> dict[str, str]:
    tensors = raw_tensors()
    names = list(tensors)
    place: dict[str, str] = {}
    for n, part in enumerate((names[:9], names[9:])):
        file = f"model-0000{n + 1}-of-00002.safetensors"
        write_safetensors(folder / file, {name: tensors[name] for name in part})
        place |= dict.fromkeys(part, file)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return place


def test_sharded_files_are_one_model(tmp_path: Path) -> None:
    place = sharded(tmp_path)
    whole = open_checkpoint(tmp_path).names()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": place}))
    assert open_checkpoint(tmp_path).names() == whole
    index.write_text(json.dumps({"weight_map": {**place, "model.x": "../../etc/passwd"}}))
    with pytest.raises(CorruptModel, match="weight_map"):
        open_checkpoint(tmp_path)
    other = place | {"model.norm.weight": "model-00001-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": other}))
    with pytest.raises(CorruptModel, match=r"model\.norm\.weight.*index places it here"):
        open_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": place}))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(NoSuchModel, match="model-00002-of-00002"):
        open_checkpoint(tmp_path)


def test_missing_wrong_and_extra_tensors_are_named(tmp_path: Path) -> None:
    tensors = raw_tensors()
    name = "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(CorruptModel, match=r"layers\.0\.mlp\.down_proj\.weight.*\(16, 24\)"):
        open_checkpoint(save(tmp_path, {k: v for k, v in tensors.items() if k != name}))
    turned = tensors | {name: ("F32", (24, 16), tensors[name][2])}
    with pytest.raises(CorruptModel, match=r"expected \(16, 24\), found \(24, 16\)"):
        open_checkpoint(save(tmp_path, turned))
    extra = tensors | {"model.layers.0.mlp.gate.weight": ("F32", (4,), bytes(16))}
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.mlp\.gate\.weight"):
        open_checkpoint(save(tmp_path, extra))
    strange = tensors | {name: ("F8_E5M2", (16, 24), bytes(16 * 24))}
    with pytest.raises(UnsupportedModel, match="stored as F8_E5M2"):
        open_checkpoint(save(tmp_path, strange))


def _file(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def _entry(kind: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "shorter than a header"),
        ((2**60).to_bytes(8, "little") + b"{}", "absurd header length"),
        (_file(b"{nope"), "not JSON"),
        (_file(b"[" * 50_000), "not JSON"),
        (_file([1, 2, 3]), "expected an object"),
        (_file({"t": 3}), "'t': malformed"),
        (_file({"t": _entry("F32", [-1], 0, 4)}, bytes(4)), "'t': malformed"),
        (
            _file({"t": _entry("F32", [2], 0, 8)}, bytes(4)),
            r"'t': truncated file: no room for F32 \(2,\) .*expected 8",
        ),
        (_file({"t": _entry("F32", [3], 0, 8)}, bytes(8)), "wrong size"),
        (_file({"t": _entry("F32", [2], 8, 0)}, bytes(8)), "'t'"),
        (
            _file({"a": _entry("F32", [2], 0, 8), "b": _entry("F32", [1], 4, 8)}, bytes(8)),
            r"'b': F32 \(1,\) overlaps a",
        ),
        (
            _file({"a": _entry("F32", [1], 0, 4), "b": _entry("F32", [1], 8, 12)}, bytes(12)),
            r"'b': F32 \(1,\) lies apart from a .*expected data from byte 4, found 8",
        ),
        (_file({"a": _entry("F32", [1], 0, 4)}, bytes(8)), "data that no tensor has .*expected 4"),
        (
            _file(b'{"a": %s, "a": %s}' % ((json.dumps(_entry("F32", [1], 0, 4)).encode(),) * 2)),
            "'a': a name occurs twice",
        ),
        (_file({"a": _entry("F16", [2], 0, 8)}, bytes(8)), r"'a': wrong size for F16 \(2,\)"),
        ((70).to_bytes(8, "little") + b'{"a": 3}' + bytes(70), "not JSON"),  # a length that lies
        ((4).to_bytes(8, "little") + b'{"a": 3}', "not JSON"),
    ],
)
def test_damaged_headers_are_named(tmp_path: Path, raw: bytes, says: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CorruptModel, match=says) as caught:
        open_safetensors(path)
    assert "bad.safetensors" in str(caught.value)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("flip"), raw_tensors()) / "model.safetensors"


@settings(max_examples=200, deadline=None)
@given(flips=st.lists(st.integers(0, 2**24), min_size=1, max_size=3))
@pytest.mark.slow
def test_flipped_header_bits_give_a_model_or_a_typed_error(sound: Path, flips: list[int]) -> None:
    damaged = bytearray(sound.read_bytes())
    header_bits = (8 + int.from_bytes(damaged[:8], "little")) * 8
    for flip in flips:
        byte, bit = divmod(flip % header_bits, 8)
        damaged[byte] ^= 1 << bit
    folder = sound.parent / "flipped"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    path = folder / "model.safetensors"
    path.unlink(missing_ok=True)
    path.write_bytes(damaged)
    try:
        open_checkpoint(folder).tensor("norm.weight").dequantize()
    except ModelError:
        return


@pytest.mark.parametrize(
    ("config", "error", "says"),
    [
        ({"model_type": "deepseek_v4"}, UnsupportedModel, "'deepseek_v4'"),
        ({"model_type": "mamba"}, UnsupportedModel, "'mamba'"),
        ({"model_type": None}, CorruptModel, "model_type"),
        ({"quantization_config": {"quant_method": "aqlm"}}, UnsupportedModel, "'aqlm'"),
        ({"hidden_act": "relu"}, UnsupportedModel, "'relu'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, UnsupportedModel, "'longrope'"),
        ({"hidden_size": "big"}, CorruptModel, "hidden_size.*an integer"),
        ({"num_attention_heads": 0}, CorruptModel, "impossible"),
        ({"num_key_value_heads": 3}, CorruptModel, "num_kv_heads 3"),
        ({"rms_norm_eps": -1}, CorruptModel, "norm_eps"),
        ({"rope_scaling": [1]}, CorruptModel, "rope_scaling"),
    ],
)
def test_what_is_not_built_or_impossible_is_named(
    tmp_path: Path, config: dict[str, Any], error: type[ModelError], says: str
) -> None:
    with pytest.raises(error, match=says):
        open_checkpoint(save(tmp_path, raw_tensors(), **config))


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(NoSuchModel, match=r"no \*\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CorruptModel, match=r"config\.json"):
        open_checkpoint(tmp_path)
