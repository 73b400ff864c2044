"""Tensors of a Hugging Face folder as canonical weights: names, stacked experts, packed linears."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from models.errors import CorruptModel, UnsupportedModel
from models.layout import expected_tensors
from models.quant import to_float32
from models.quantization_hf import Quantization
from models.row_order import latent_order
from models.safetensors_files import StoredTensor, check_kind
from models.spec import ModelSpec
from models.weights import Longs, Weight
from models.weights_hf import GroupedWeight, ScaledWeight

Array = npt.NDArray[Any]
# Parts of a vision model's file that its text half does not need.
OTHER_HALVES = ("vision_tower.", "multi_modal_projector.", "visual.", "mtp.")
PREFIXES = ("model.language_model.", "language_model.model.", "model.", "language_model.")
MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
PARTS = ("weight_scale_inv", "qweight", "qzeros", "scales", "g_idx")
NUMPY = {"F32": "<f4", "F16": "<f2", "I32": "<i4"}
_MIXTRAL = re.compile(r"\.block_sparse_moe\.(gate|experts\.[0-9]+\.(w[123]))\.")
_LAYER = re.compile(r"layers\.([0-9]+)\.")


def canonical_weights(
    stored: Mapping[str, StoredTensor],
    spec: ModelSpec,
    quantization: Quantization | None,
    *,
    rotary_pairs: bool,
) -> dict[str, Weight]:
    """Every weight by canonical name; whether they are the right ones is not checked here.

    Args:
        stored: tensors of all files.
        spec: of the model.
        quantization: how packed linears are to be read.
        rotary_pairs: rotated rows of latent attention lie pairwise in the file.

    Raises:
        CorruptModel: parts of a packed linear are missing or contradict each other.
        UnsupportedModel: a format or shape that is not read, naming the tensor.
    """
    whole: dict[str, StoredTensor] = {}
    parts: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in stored.items():
        known = canonical(name, spec)
        if known is None:
            continue
        module, _, part = known.rpartition(".")
        if part in PARTS:
            parts.setdefault(module, {})[part] = tensor
        else:
            whole[known] = tensor
    found: dict[str, Weight] = {}
    for module, group in parts.items():
        order = latent_order(module.rpartition(".")[2], spec) if rotary_pairs else None
        found[f"{module}.weight"] = _packed(
            f"{module}.weight", group, whole.pop(f"{module}.weight", None), quantization, order
        )
    for name, tensor in whole.items():
        if len(tensor.shape) == 3 and name.startswith("layers."):
            found |= _stacked(name, tensor)
            continue
        if len(tensor.shape) not in (1, 2) or 0 in tensor.shape:
            raise UnsupportedModel(tensor.path, f"tensor {name!r} of shape {tensor.shape}")
        order = latent_order(name.split(".")[-2], spec) if rotary_pairs and "." in name else None
        kind = check_kind(tensor)
        if kind == "F8_E4M3" and quantization is not None:
            raise CorruptModel(tensor.path, "fp8 without its weight_scale_inv", tensor=name)
        data = tensor.data.reshape(tensor.shape[0], -1)
        found[name] = Weight(name, tensor.shape, kind, data, order)
    if quantization is not None and quantization.method == "gptq":
        _drop_empty_biases(found, spec)
    return found


def is_read_at_once(tensor: StoredTensor, quantization: Quantization | None) -> bool:
    """Whether ``canonical_weights`` reads the values of a tensor, not its header alone."""
    part = tensor.name.rpartition(".")[2]
    if part == "bias":
        return quantization is not None and quantization.method == "gptq"
    return part in ("weight_scale_inv", "g_idx") or (part == "scales" and tensor.kind == "BF16")


def canonical(name: str, spec: ModelSpec) -> str | None:
    """Canonical name of a stored tensor; None for one that the text model does not use."""
    if name.removeprefix("model.").startswith(OTHER_HALVES):
        return None
    for prefix in PREFIXES:
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            break
    if name.endswith("rotary_emb.inv_freq"):
        return None  # older files store what the spec says
    if name.startswith("lm_head.") and spec.tied_embeddings:
        return None  # a copy of the embeddings
    layer = _LAYER.match(name)
    if layer is not None and int(layer[1]) >= spec.num_layers and spec.latent is not None:
        return None  # multi-token prediction, which DeepSeek keeps behind the last layer
    match = _MIXTRAL.search(name)
    if match is None:
        return name
    part = match[1] if match[2] is None else match[1].removesuffix(match[2]) + MIXTRAL[match[2]]
    return f"{name[: match.start()]}.mlp.{part}.{name[match.end() :]}"


def _stacked(name: str, tensor: StoredTensor) -> dict[str, Weight]:
    """Experts that one tensor holds: (experts, outputs, inputs), gate over up where joined."""
    module, _, part = name.rpartition(".")
    joined = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(part)
    if not module.endswith(".mlp.experts") or joined is None or 0 in tensor.shape:
        raise UnsupportedModel(tensor.path, f"tensor {name!r} of shape {tensor.shape}")
    kind, (count, outputs, inputs) = check_kind(tensor), tensor.shape
    rows = outputs // len(joined)
    data = tensor.data.reshape(count, len(joined), rows, -1)
    return {
        (full := f"{module}.{expert}.{into}.weight"): Weight(
            full, (rows, inputs), kind, data[expert, place]
        )
        for expert in range(count)
        for place, into in enumerate(joined)
    }


def _drop_empty_biases(found: dict[str, Weight], spec: ModelSpec) -> None:
    """AutoGPTQ writes a bias of zeros for each linear that has none."""
    expected = expected_tensors(spec)
    for name in [name for name in found if name.endswith(".bias") and name not in expected]:
        if not found[name].dequantize().any():
            del found[name]


def _packed(
    name: str,
    group: Mapping[str, StoredTensor],
    weight: StoredTensor | None,
    quantization: Quantization | None,
    order: Longs | None,
) -> Weight:
    some = next(iter(group.values()))
    if quantization is None:
        raise UnsupportedModel(
            some.path, f"tensor {some.name!r}, but config.json names no quantization_config"
        )
    if quantization.method == "fp8":
        return _scaled(name, group, weight, quantization, order)
    return _grouped(name, group, quantization, order)


def _scaled(
    name: str,
    group: Mapping[str, StoredTensor],
    weight: StoredTensor | None,
    quantization: Quantization,
    order: Longs | None,
) -> Weight:
    scale = group.get("weight_scale_inv")
    if scale is None or weight is None or len(weight.shape) != 2:
        path = next(iter(group.values())).path
        raise CorruptModel(path, "fp8 needs a matrix and its weight_scale_inv", tensor=name)
    rows, columns = weight.shape
    height, width = quantization.block
    blocks = (-(-rows // height), -(-columns // width))
    if scale.shape != blocks:
        raise _wrong(scale, f"blocks of {height} x {width} of {weight.shape}: {blocks}")
    values = to_float32(scale.data.reshape(blocks[0], -1), check_kind(scale))
    data = weight.data.reshape(rows, -1)
    if check_kind(weight) != "F8_E4M3":
        raise UnsupportedModel(weight.path, f"tensor {name!r}: {weight.kind} beside a scale")
    return ScaledWeight(
        name, weight.shape, "F8_E4M3", data, order, scales=values, block=quantization.block
    )


def _grouped(
    name: str,
    group: Mapping[str, StoredTensor],
    quantization: Quantization,
    order: Longs | None,
) -> Weight:
    for part in ("qweight", "qzeros", "scales"):
        if part not in group:
            path = next(iter(group.values())).path
            raise CorruptModel(path, f"{quantization.method} without its {part}", tensor=name)
    words, zeros, scales = (_array(group[part]) for part in ("qweight", "qzeros", "scales"))
    count, awq = 32 // quantization.bits, quantization.method == "awq"
    inputs = words.shape[0] * (1 if awq else count)
    outputs = words.shape[1] * (count if awq else 1)
    size = inputs if quantization.group_size == -1 else quantization.group_size
    groups = -(-inputs // size)
    if scales.shape != (groups, outputs):
        raise _wrong(group["scales"], f"{(groups, outputs)}")
    if zeros.shape != (groups, outputs // count) or outputs % count:
        raise _wrong(group["qzeros"], f"{(groups, outputs // count)}")
    group_of = None
    if "g_idx" in group and not awq:
        group_of = _array(group["g_idx"])
        if group_of.shape != (inputs,) or group_of.min() < 0 or group_of.max() >= groups:
            raise _wrong(group["g_idx"], f"{inputs} numbers below {groups}")
        if np.array_equal(group_of, np.arange(inputs) // size):
            group_of = None
    return GroupedWeight(
        name,
        (outputs, inputs),
        quantization.method.upper(),
        group["qweight"].data.reshape(words.shape[0], -1),
        order,
        words=words,
        zeros=zeros,
        scales=scales,
        bits=quantization.bits,
        group_size=size,
        group_of=group_of,
        zero_offset=quantization.zero_offset,
    )


def _array(tensor: StoredTensor) -> Array:
    """A part of a packed linear as numbers of its own type, a view of the file where possible."""
    if tensor.kind == "BF16":
        return to_float32(tensor.data.reshape(tensor.shape[0], -1), "BF16")
    part = tensor.name.rpartition(".")[2]
    integers, dims = part != "scales", 1 if part == "g_idx" else 2
    if tensor.kind not in NUMPY or (tensor.kind == "I32") != integers or 0 in tensor.shape:
        raise UnsupportedModel(tensor.path, f"tensor {tensor.name!r} is stored as {tensor.kind}")
    if len(tensor.shape) != dims:
        raise _wrong(tensor, f"{dims} dimensions")
    return tensor.data.view(NUMPY[tensor.kind]).reshape(tensor.shape)


def _wrong(tensor: StoredTensor, expected: str) -> CorruptModel:
    return CorruptModel(
        tensor.path, "wrong shape", tensor=tensor.name, expected=expected, found=tensor.shape
    )
