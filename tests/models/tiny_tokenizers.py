"""GGUF files that hold nothing but a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf


def gguf_with_tokenizer(
    path: Path,
    model: str,
    tokens: Sequence[str],
    *,
    merges: Sequence[str] | None = None,
    types: Sequence[int] | None = None,
    scores: Sequence[float] | None = None,
    pre: str = "gpt-2",
    eos: int | None = None,
    space_prefix: bool | None = None,
) -> Path:
    """Write a GGUF file with these tokenizer keys and no tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(list(tokens))
    if types is not None:
        writer.add_token_types(list(types))
    if scores is not None:
        writer.add_token_scores(list(scores))
    if merges is not None:
        writer.add_token_merges(list(merges))
    if eos is not None:
        writer.add_eos_token_id(eos)
    if space_prefix is not None:
        writer.add_add_space_prefix(space_prefix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path
