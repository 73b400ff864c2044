"""Tokenizer and chat template of a Hugging Face folder (``tokenizer.json`` and its companions)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from models.errors import CorruptModel, NoSuchModel
from models.safetensors_files import parse_json
from models.tokenizer import Spelling, Tokenizer


def load(folder: Path) -> Tokenizer:
    """Build the tokenizer of a folder.

    Raises:
        NoSuchModel: there is no ``tokenizer.json``.
        CorruptModel: a file is not what its name says.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise NoSuchModel(path, "no tokenizer.json (older formats are not read)")
    raw = path.read_bytes()
    described = parse_json(path, raw)
    try:
        backend = Backend.from_buffer(raw)
    except Exception as exc:  # the package raises bare Exception for a bad file
        raise CorruptModel(path, f"not a tokenizer: {exc}") from exc
    backend.no_truncation()
    backend.no_padding()
    settings = _optional(folder / "tokenizer_config.json")
    generation, config = (
        _optional(folder / "generation_config.json"),
        _optional(folder / "config.json"),
    )
    added = backend.get_added_tokens_decoder()
    eos_id = _id_of(backend, settings.get("eos_token"))
    bos_id = _id_of(backend, settings.get("bos_token"))
    starts = backend.encode("", add_special_tokens=True).ids
    if bos_id is None and starts:
        bos_id = starts[0]
    eos_ids = {
        *_ids(generation.get("eos_token_id")),
        *_ids(config.get("eos_token_id")),
        *([] if eos_id is None else [eos_id]),
    }
    declared = settings.get("add_bos_token")
    return Tokenizer(
        backend,
        spelling=_spelling(described),
        added={n: token.content for n, token in added.items()},
        special_ids=[n for n, token in added.items() if token.special],
        eos_ids=eos_ids,
        eos_id=eos_id,
        bos_id=bos_id,
        add_bos=declared if isinstance(declared, bool) else bool(starts and starts[0] == bos_id),
        strip_first_space='"Strip"' in json.dumps(described.get("decoder")),
    )


def chat_template(folder: Path) -> str | None:
    """The default chat template: ``chat_template.jinja``, else that of ``tokenizer_config.json``.

    Raises:
        CorruptModel: it is there and is no text.
    """
    own = folder / "chat_template.jinja"
    if own.is_file():
        try:
            return own.read_text(encoding="utf-8")
        except UnicodeDecodeError as exc:
            raise CorruptModel(own, "not UTF-8") from exc
    settings = folder / "tokenizer_config.json"
    template = _optional(settings).get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry for entry in template if isinstance(entry, dict)}
        template = named.get("default", {}).get("template")
    if template is not None and not isinstance(template, str):
        raise CorruptModel(
            settings, "field 'chat_template'", expected="text", found=type(template).__name__
        )
    return template


def _optional(path: Path) -> dict[str, Any]:
    return parse_json(path, path.read_bytes()) if path.is_file() else {}


def _id_of(backend: Backend, token: Any) -> int | None:
    text = token.get("content") if isinstance(token, dict) else token
    return backend.token_to_id(text) if isinstance(text, str) else None


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [n for n in values if isinstance(n, int) and not isinstance(n, bool)]


def _spelling(described: dict[str, Any]) -> Spelling:
    """Byte-level if the decoder or the pre-tokenizer says so, else SentencePiece's pieces."""
    parts = json.dumps([described.get("decoder"), described.get("pre_tokenizer")])
    return "byte_level" if '"ByteLevel"' in parts else "pieces"
