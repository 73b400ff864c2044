"""Tiny models with random weights, made on the spot: GGUF by the gguf package, others by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Tensors = dict[str, tuple[Array, str]]  # name -> values or raw blocks, GGUF type

BYTE_TOKENS = [chr(c) for c in range(0x21, 0x7F)] + ["Ġ", "Ċ"]


def random_blocks(kind: str, rows: int, columns: int, seed: int = 0) -> Array:
    """Raw blocks of a type with random content, as uint8 (rows, bytes); scales are kept finite."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, columns)).astype(np.float32)
    number = gguf.GGMLQuantizationType[kind]
    if kind == "F32":
        return values.view(np.uint8)
    try:
        return np.asarray(gguf.quantize(values, number)).view(np.uint8).reshape(rows, -1)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[number]
        raw = rng.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
        where = {"Q2_K": (80, 84), "Q3_K": (108, 110), "Q6_K": (208, 210)}.get(kind, (0, 4))
        scales = rng.uniform(0.001, 0.1, (rows, columns // block, (where[1] - where[0]) // 2))
        raw[..., where[0] : where[1]] = scales.astype(np.float16).view(np.uint8)
        return raw.reshape(rows, -1)


def llama_tensors(
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    ffn: int = 96,
    vocab: int = 128,
    kind: str = "F32",
    bias: bool = False,
) -> Tensors:
    """GGUF tensors of a llama with the given sizes; matrices in ``kind``, vectors in F32."""
    head_dim = hidden // heads
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab, hidden)}
    for n in range(layers):
        shapes |= {
            f"blk.{n}.attn_norm.weight": (hidden,),
            f"blk.{n}.attn_q.weight": (heads * head_dim, hidden),
            f"blk.{n}.attn_k.weight": (kv_heads * head_dim, hidden),
            f"blk.{n}.attn_v.weight": (kv_heads * head_dim, hidden),
            f"blk.{n}.attn_output.weight": (hidden, heads * head_dim),
            f"blk.{n}.ffn_norm.weight": (hidden,),
            f"blk.{n}.ffn_gate.weight": (ffn, hidden),
            f"blk.{n}.ffn_up.weight": (ffn, hidden),
            f"blk.{n}.ffn_down.weight": (hidden, ffn),
        }
        if bias:
            shapes |= {
                f"blk.{n}.attn_q.bias": (heads * head_dim,),
                f"blk.{n}.attn_k.bias": (kv_heads * head_dim,),
                f"blk.{n}.attn_v.bias": (kv_heads * head_dim,),
            }
    shapes["output_norm.weight"] = (hidden,)
    rng = np.random.default_rng(7)
    tensors: Tensors = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        if len(shape) == 1:
            tensors[name] = (rng.standard_normal(shape).astype(np.float32), "F32")
        else:
            tensors[name] = (random_blocks(kind, shape[0], shape[1], seed), kind)
    return tensors


def write_gguf(
    path: Path,
    tensors: Tensors,
    *,
    arch: str = "llama",
    metadata: dict[str, Any] | None = None,
    tokenizer: bool = True,
) -> Path:
    """Write a GGUF file; ``metadata`` adds to (or with None removes from) the usual keys."""
    writer = gguf.GGUFWriter(path, arch)
    layers = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blk."))
    hidden = len(tensors["output_norm.weight"][0])
    keys: dict[str, Any] = {
        "block_count": layers,
        "context_length": 256,
        "embedding_length": hidden,
        "feed_forward_length": len(tensors.get("blk.0.ffn_up.weight", [[]])[0]),
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "rope.freq_base": 10000.0,
        "attention.layer_norm_rms_epsilon": 1e-5,
    } | (metadata or {})
    for key, value in keys.items():
        name = f"{arch}.{key}"
        if isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif value is not None:
            writer.add_uint32(name, value)
    if tokenizer:
        tokens = [*BYTE_TOKENS, "ab", "<|endoftext|>"]
        tokens += [f"<unused{n}>" for n in range(128 - len(tokens))]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(tokens)
        types = [1] * len(BYTE_TOKENS) + [1, 3] + [5] * (126 - len(BYTE_TOKENS))
        writer.add_token_types(types)
        writer.add_token_merges(["a b"])
        writer.add_eos_token_id(tokens.index("<|endoftext|>"))
        writer.add_chat_template("{{ messages[0].content }}")
    for name, (data, kind) in tensors.items():
        number = gguf.GGMLQuantizationType[kind]
        if data.dtype == np.uint8:
            writer.add_tensor(name, data, raw_dtype=number)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_safetensors(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> Path:
    """Write a safetensors file of raw bytes: ``name -> (dtype, shape, bytes)``."""
    header, data = {}, b""
    for name, (kind, shape, raw) in tensors.items():
        header[name] = {
            "dtype": kind,
            "shape": list(shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)
    return path
