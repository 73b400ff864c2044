"""Hostile bytes: only DecodeError ever, in bounded time and memory."""

from __future__ import annotations

import random
import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge import etf
from bridge.errors import DecodeError
from tests.bridge.golden.record import load
from tests.bridge.terms import examples, terms

NUM_MUTANTS = 40_000
TAGS = bytes(range(70, 122)) + b"\0\1\2\x7f\x80\xff"


def _try(data: bytes) -> bool:
    try:
        term = etf.decode(data, max_inflated_bytes=1 << 20)
    except DecodeError:
        return False
    etf.encode(term)  # whatever is read can be written
    return True


@given(st.binary(max_size=200))
def test_random_bytes(data: bytes) -> None:
    _try(data)
    _try(b"\x83" + data)


@pytest.mark.slow
def test_mutated_terms() -> None:
    chance = random.Random(20260724)
    corpus = [data for found in load().values() for data in found.values() if len(data) < 4000]
    corpus += [etf.encode(term) for term in examples(terms, 150)]
    num_read = 0
    start_s = time.monotonic()
    for _ in range(NUM_MUTANTS):
        data = bytearray(chance.choice(corpus))
        for _ in range(chance.randint(1, 4)):
            match chance.randrange(5):
                case 0:
                    data[chance.randrange(len(data))] = chance.randrange(256)
                case 1:
                    data[chance.randrange(len(data))] = chance.choice(TAGS)
                case 2:
                    del data[chance.randrange(1, len(data) + 1) :]
                case 3:
                    other = chance.choice(corpus)
                    cut = chance.randrange(1, len(data) + 1)
                    data[cut:cut] = other[chance.randrange(len(other)) :]
                case _:
                    cut = chance.randrange(len(data))
                    data[cut : cut + 4] = b"\xff\xff\xff\xff"
        num_read += _try(bytes(data))
    assert 0 < num_read < NUM_MUTANTS
    assert time.monotonic() - start_s < 60


HUGE = b"\xff\xff\xff\xff"


@pytest.mark.parametrize(
    "wire",
    [
        b"m" + HUGE,
        b"l" + HUGE + b"j",
        b"i" + HUGE,
        b"t" + HUGE,
        b"o" + HUGE + b"\0",
        b"M" + HUGE + b"\1",
        b"p" + HUGE,
        b"P" + HUGE + b"x\x9c",
        b"k\xff\xff",
        b"v\xff\xff",
        b"d\xff\xff",
        b"h\xff" * 200,
        (b"l" + HUGE) * 200,
        (b"t\x7f\xff\xff\xff") * 200,
    ],
)
def test_a_length_field_of_4_gb_costs_nothing(wire: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError):
            etf.decode(b"\x83" + wire)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 200_000
