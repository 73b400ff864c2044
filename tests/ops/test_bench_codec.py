"""The codec benchmark measures what it says."""

from __future__ import annotations

import pytest

from bridge import etf
from ops.bench import codec


def test_its_messages_are_terms_and_the_same_in_every_run() -> None:
    kinds = codec.messages()
    assert kinds == codec.messages()
    assert len(kinds["token"]) == codec.NUM_TOKENS
    for terms in kinds.values():
        assert [etf.decode(etf.encode(term)) for term in terms] == terms


@pytest.mark.slow
def test_it_measures_both_directions() -> None:
    ours = codec.Codec("phalanx", etf.encode, etf.decode, lambda term: term)
    found = codec.bench(ours, {"done": codec.messages()["done"]})
    assert set(found["done"]) == {"encode_mb_s", "decode_mb_s"}
    assert min(found["done"].values()) > 0
