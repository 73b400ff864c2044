"""Which quantisation a ``config.json`` declares: fp8 blocks, AWQ and GPTQ; others by name only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from models.errors import CorruptModel, UnsupportedModel
from models.hf_config import HfConfig

INSTEAD = "take GGUF, or plain safetensors in f32, f16 or bf16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How the linears of a checkpoint are packed.

    Attributes:
        method: fp8 (e4m3 with a float scale for each block), awq, or gptq.
        bits: of a weight.
        group_size: inputs that share a scale (awq, gptq); -1: all.
        block: outputs and inputs that share a scale (fp8).
        zero_offset: what gptq's stored zero points lack.
    """

    method: Literal["fp8", "awq", "gptq"]
    bits: int
    group_size: int = -1
    block: tuple[int, int] = (1, 1)
    zero_offset: int = 0


def quantization_of(config: Mapping[str, Any], path: Path) -> Quantization | None:
    """Read ``quantization_config``; None where weights are plain.

    Raises:
        CorruptModel: a field is missing, of the wrong type or impossible.
        UnsupportedModel: a method or variant that is not read, by name.

    Source: transformers ``FineGrainedFP8Config``, ``AwqConfig``, ``GPTQConfig``.
    """
    values = config.get("quantization_config")
    if not values:
        return None
    if not isinstance(values, dict):
        raise CorruptModel(
            path, "field 'quantization_config'", expected="an object", found=repr(values)[:80]
        )
    fields = HfConfig(path, values)
    match values.get("quant_method"):
        case "fp8":
            return _fp8(fields)
        case "awq":
            return _awq(fields)
        case "gptq":
            return _gptq(fields)
        case method:
            raise UnsupportedModel(
                path, f"weights quantised by {method or 'an unnamed method'!r}; {INSTEAD}"
            )


def _only(fields: HfConfig, key: str, known: tuple[Any, ...], default: Any) -> Any:
    """A field whose other values are not read; absent means ``default``."""
    value = fields.values.get(key)
    value = default if value is None else value
    if value not in known:
        method = fields.values["quant_method"]
        names = ", ".join(repr(item) for item in known)
        raise UnsupportedModel(
            fields.path, f"{method} with {key} {value!r} (read are {names}); {INSTEAD}"
        )
    return value


def _fp8(fields: HfConfig) -> Quantization:
    _only(fields, "fmt", ("e4m3",), "e4m3")
    _only(fields, "activation_scheme", ("dynamic",), "dynamic")
    size = fields.values.get("weight_block_size")
    if (
        not isinstance(size, list)
        or len(size) != 2
        or not all(type(n) is int and n > 0 for n in size)
    ):
        raise fields.wrong("weight_block_size", "two positive integers", size)
    return Quantization(method="fp8", bits=8, block=(size[0], size[1]))


def _group(fields: HfConfig) -> int:
    size = fields.integer("group_size", 128)
    if size != -1 and size < 1:
        raise fields.wrong("group_size", "positive, or -1", size)
    return size


def _awq(fields: HfConfig) -> Quantization:
    bits = _only(fields, "bits", (4,), 4)
    _only(fields, "version", ("gemm", "GEMM"), "gemm")
    _only(fields, "zero_point", (True,), True)
    return Quantization(method="awq", bits=bits, group_size=_group(fields))


def _gptq(fields: HfConfig) -> Quantization:
    bits = _only(fields, "bits", (4, 8), 4)
    layout = _only(fields, "checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    offset = 1 if layout == "gptq" else 0
    return Quantization(method="gptq", bits=bits, group_size=_group(fields), zero_offset=offset)
