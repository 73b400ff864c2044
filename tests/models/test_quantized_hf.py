"""fp8 blocks, AWQ and GPTQ: any part of a linear against formulas written out per element."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.checkpoint import open_checkpoint
from models.errors import CorruptModel, ModelError, UnsupportedModel
from models.layout import expected_tensors
from models.quant import E4M3
from models.spec_hf import from_hf_config
from models.weights import Weight
from models.weights_hf import GroupedWeight, ScaledWeight
from tests.models.tiny import write_safetensors

Array = npt.NDArray[Any]
Raw = dict[str, tuple[str, tuple[int, ...], bytes]]
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 64,
}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 20]}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False}


@pytest.mark.slow
def test_every_fp8_code_has_the_value_that_torch_gives_it() -> None:
    import torch

    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    np.testing.assert_array_equal(E4M3, codes.float().numpy())


def f32(values: Array) -> tuple[str, tuple[int, ...], bytes]:
    return "F32", values.shape, values.astype("<f4").tobytes()


def i32(values: Array) -> tuple[str, tuple[int, ...], bytes]:
    return "I32", values.shape, values.astype(np.uint32).tobytes()


def f16(values: Array) -> tuple[str, tuple[int, ...], bytes]:
    return "F16", values.shape, values.astype("<f2").tobytes()


def fp8_linear(rng: np.random.Generator, rows: int, columns: int) -> tuple[Raw, Array]:
    codes = rng.integers(0, 256, (rows, columns), dtype=np.uint8)
    codes[(codes & 127) == 127] = 0  # NaN
    scales = rng.uniform(0.01, 2, (-(-rows // 16), -(-columns // 20))).astype(np.float32)
    values = np.empty((rows, columns), dtype=np.float32)
    for r in range(rows):
        for c in range(columns):
            values[r, c] = E4M3[codes[r, c]] * scales[r // 16, c // 20]
    raw: Raw = {
        "weight": ("F8_E4M3", (rows, columns), codes.tobytes()),
        "weight_scale_inv": f32(scales),
    }
    return raw, values


def awq_linear(rng: np.random.Generator, rows: int, columns: int) -> tuple[Raw, Array]:
    numbers = rng.integers(0, 16, (columns, rows))
    zeros = rng.integers(0, 16, (columns // 16, rows))
    scales = rng.uniform(0.01, 2, zeros.shape).astype(np.float16)

    def pack(values: Array) -> Array:
        words = np.zeros((len(values), rows // 8), dtype=np.uint64)
        for at, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            words |= values[:, output::8].astype(np.uint64) << np.uint64(4 * at)
        return words

    values = np.empty((rows, columns), dtype=np.float32)
    for o in range(rows):
        for i in range(columns):
            g = i // 16
            values[o, i] = (int(numbers[i, o]) - int(zeros[g, o])) * np.float32(scales[g, o])
    return {
        "qweight": i32(pack(numbers)),
        "qzeros": i32(pack(zeros)),
        "scales": f16(scales),
    }, values


def gptq_linear(
    rng: np.random.Generator, rows: int, columns: int, *, bits: int = 4, act: bool = False
) -> tuple[Raw, Array]:
    count, top = 32 // bits, 1 << bits
    numbers = rng.integers(0, top, (columns, rows))
    zeros = rng.integers(0, top, (columns // 16, rows))  # as used; the file has them less one
    scales = rng.uniform(0.01, 2, zeros.shape).astype(np.float16)
    group_of = np.arange(columns) // 16
    if act:
        group_of = rng.permutation(group_of)
    qweight = np.zeros((columns // count, rows), dtype=np.uint64)
    qzeros = np.zeros((columns // 16, rows // count), dtype=np.uint64)
    for at in range(count):
        shift = np.uint64(bits * at)
        qweight |= numbers[at::count].astype(np.uint64) << shift
        qzeros |= ((zeros[:, at::count] - 1) % top).astype(np.uint64) << shift
    values = np.empty((rows, columns), dtype=np.float32)
    for o in range(rows):
        for i in range(columns):
            g = group_of[i]
            values[o, i] = (int(numbers[i, o]) - int(zeros[g, o])) * np.float32(scales[g, o])
    raw = {"qweight": i32(qweight), "qzeros": i32(qzeros), "scales": f16(scales)}
    return {**raw, "g_idx": i32(group_of)}, values


def checkpoint_folder(
    folder: Path, quantization: dict[str, Any], linear: Any, **options: Any
) -> dict[str, Array]:
    """Write a tiny llama whose layer is packed; its values by canonical name."""
    rng = np.random.default_rng(3)
    raw: Raw = {}
    values: dict[str, Array] = {}
    for name, shape in expected_tensors(from_hf_config(CONFIG, Path("c"))).items():
        full = name if name.startswith("lm_head") else f"model.{name}"
        if name.endswith("_proj.weight"):
            parts, values[name] = linear(rng, *shape, **options)
            module = full.removesuffix("weight")
            raw |= {module + part: tensor for part, tensor in parts.items()}
        else:
            values[name] = rng.standard_normal(shape).astype(np.float32)
            raw[full] = f32(values[name])
    config = {**CONFIG, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", raw)
    return values


CASES: list[tuple[dict[str, Any], Any, dict[str, Any]]] = [
    (FP8, fp8_linear, {}),
    (AWQ, awq_linear, {}),
    (GPTQ, gptq_linear, {}),
    (GPTQ, gptq_linear, {"act": True}),
    ({**GPTQ, "bits": 8}, gptq_linear, {"bits": 8}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("quantization", "linear", "options"), CASES)
def test_packed_linears_come_out_exactly(
    tmp_path: Path, quantization: dict[str, Any], linear: Any, options: dict[str, Any]
) -> None:
    values = checkpoint_folder(tmp_path, quantization, linear, **options)
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.names()) == set(values)
    for name in checkpoint.names():
        weight = checkpoint.tensor(name)
        assert weight.shape == values[name].shape
        np.testing.assert_array_equal(weight.dequantize(), values[name])
        weight.release()
    down = checkpoint.tensor("layers.0.mlp.down_proj.weight")
    if not options:
        sizes = {"fp8": 20, "awq": 16, "gptq": 16}
        assert down.block_columns == sizes[quantization["quant_method"]]
    assert len(checkpoint.fingerprint) == 32


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Weight, Array]]:
    out = []
    for quantization, linear, options in CASES:
        folder = tmp_path_factory.mktemp("packed")
        values = checkpoint_folder(folder, quantization, linear, **options)
        name = "layers.0.mlp.down_proj.weight"
        out.append((open_checkpoint(folder).tensor(name), values[name]))
    return out


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(data=st.data(), which=st.integers(0, len(CASES) - 1))
def test_any_part_in_any_row_order_is_that_part(
    packed: list[tuple[Weight, Array]], data: st.DataObject, which: int
) -> None:
    weight, values = packed[which]
    if data.draw(st.booleans()):
        order = np.array(data.draw(st.permutations(range(32))), dtype=np.int64)
        shuffled = {name: getattr(weight, name) for name in type(weight).__dataclass_fields__}
        weight, values = type(weight)(**{**shuffled, "row_order": order}), values[order]
    r0, r1 = sorted(data.draw(st.tuples(st.integers(0, 32), st.integers(0, 32))))
    c0, c1 = sorted(data.draw(st.tuples(st.integers(0, 48), st.integers(0, 48))))
    part = weight.dequantize(slice(r0, r1), slice(c0, c1))
    np.testing.assert_array_equal(part, values[r0:r1, c0:c1])
    narrow = weight.rows(slice(r0, r1))
    assert narrow.shape == (r1 - r0, 48)
    inner = slice((r1 - r0) // 3, None)
    np.testing.assert_array_equal(
        narrow.dequantize(inner, slice(c0, c1)), values[r0:r1, c0:c1][inner]
    )


@pytest.mark.parametrize("filled", [False, True])
def test_a_bias_of_zeros_that_gptq_adds_is_left_out(tmp_path: Path, filled: bool) -> None:
    def biased(rng: np.random.Generator, rows: int, columns: int) -> tuple[Raw, Array]:
        raw, values = gptq_linear(rng, rows, columns)
        return {**raw, "bias": f16(np.full(rows, float(filled)))}, values

    values = checkpoint_folder(tmp_path, GPTQ, biased)
    if filled:
        with pytest.raises(UnsupportedModel, match=r"self_attn\..*bias"):
            open_checkpoint(tmp_path)
    else:
        assert set(open_checkpoint(tmp_path).names()) == set(values)


def test_gptq_v2_keeps_zero_points_as_they_are(tmp_path: Path) -> None:
    checkpoint_folder(tmp_path, {**GPTQ, "checkpoint_format": "gptq_v2"}, gptq_linear)
    weight = open_checkpoint(tmp_path).tensor("layers.0.mlp.down_proj.weight")
    assert isinstance(weight, GroupedWeight)
    assert weight.zero_offset == 0
    with pytest.raises(ValueError, match="no blocks by rows"):
        weight.packed()


def test_a_scaled_weight_gives_its_raw_codes(tmp_path: Path) -> None:
    checkpoint_folder(tmp_path, FP8, fp8_linear)
    weight = open_checkpoint(tmp_path).tensor("layers.0.mlp.down_proj.weight")
    assert isinstance(weight, ScaledWeight)
    assert weight.packed(slice(2, 4), slice(3, 9)).shape == (2, 6)


@pytest.mark.parametrize(
    ("quantization", "error", "says"),
    [
        ({"quant_method": "bitsandbytes"}, UnsupportedModel, "'bitsandbytes'"),
        ({"quant_method": "compressed-tensors"}, UnsupportedModel, "'compressed-tensors'"),
        ({"bits": 4}, UnsupportedModel, "an unnamed method"),
        ({**AWQ, "version": "gemv"}, UnsupportedModel, "awq with version 'gemv'"),
        ({**AWQ, "bits": 3}, UnsupportedModel, "awq with bits 3"),
        ({**AWQ, "zero_point": False}, UnsupportedModel, "zero_point False"),
        ({**AWQ, "group_size": 0}, CorruptModel, "group_size"),
        ({**GPTQ, "bits": 3}, UnsupportedModel, "gptq with bits 3"),
        ({**GPTQ, "checkpoint_format": "marlin"}, UnsupportedModel, "'marlin'"),
        ({**FP8, "fmt": "e5m2"}, UnsupportedModel, "'e5m2'"),
        ({**FP8, "activation_scheme": "static"}, UnsupportedModel, "'static'"),
        ({**FP8, "weight_block_size": None}, CorruptModel, "weight_block_size"),
        ([1], CorruptModel, "quantization_config"),
    ],
)
def test_what_is_not_read_is_refused_by_name(
    quantization: Any, error: type[ModelError], says: str
) -> None:
    with pytest.raises(error, match=says):
        from_hf_config({**CONFIG, "quantization_config": quantization}, Path("config.json"))


@pytest.mark.parametrize(
    ("quantization", "linear", "part", "says"),
    [
        (FP8, fp8_linear, "weight_scale_inv", "fp8 without its weight_scale_inv"),
        (FP8, fp8_linear, "weight", "fp8 needs a matrix"),
        (AWQ, awq_linear, "qweight", "awq without its qweight"),
        (GPTQ, gptq_linear, "scales", "gptq without its scales"),
    ],
)
def test_a_missing_part_is_named(
    tmp_path: Path, quantization: dict[str, Any], linear: Any, part: str, says: str
) -> None:
    def without(rng: np.random.Generator, rows: int, columns: int) -> tuple[Raw, Array]:
        raw, values = linear(rng, rows, columns)
        return {name: tensor for name, tensor in raw.items() if name != part}, values

    checkpoint_folder(tmp_path, quantization, without)
    with pytest.raises(CorruptModel, match=rf"layers\.0\..*{says}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("quantization", "linear", "part", "wrong"),
    [
        (FP8, fp8_linear, "weight_scale_inv", f32(np.ones((2, 1)))),
        (AWQ, awq_linear, "qzeros", i32(np.zeros((1, 4)))),
        (AWQ, awq_linear, "scales", f16(np.zeros((2, 3)))),
        (GPTQ, gptq_linear, "g_idx", i32(np.full(32, 9))),
        (GPTQ, gptq_linear, "g_idx", i32(np.zeros((2, 16)))),
    ],
)
def test_a_part_of_the_wrong_shape_is_named(
    tmp_path: Path,
    quantization: dict[str, Any],
    linear: Any,
    part: str,
    wrong: tuple[str, tuple[int, ...], bytes],
) -> None:
    def changed(rng: np.random.Generator, rows: int, columns: int) -> tuple[Raw, Array]:
        raw, values = linear(rng, rows, columns)
        return {**raw, part: wrong}, values

    checkpoint_folder(tmp_path, quantization, changed)
    with pytest.raises(CorruptModel, match=rf"{part}'.*wrong shape"):
        open_checkpoint(tmp_path)


def test_packed_parts_without_a_declaration_are_named(tmp_path: Path) -> None:
    checkpoint_folder(tmp_path, GPTQ, gptq_linear)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UnsupportedModel, match="no quantization_config"):
        open_checkpoint(tmp_path)
