"""Speed of the term codec on what a generation sends, beside `erlang-py` where it is installed.

    python -m ops.bench.codec

Prints JSON: megabytes (1e6 bytes of external term format) a second, for each kind of message and
for a whole request (one submit, 64 tokens, one done). Best of several rounds, since other work
on the machine only ever makes it slower.
"""

from __future__ import annotations

import importlib
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from bridge import etf
from bridge.term import Atom, Pid, Ref, Term

NODE: Final = "phalanx@127.0.0.1"
NUM_TOKENS: Final = 64
NUM_PROMPT_TOKENS: Final = 500
VOCABULARY: Final = 49_152
ROUND_S: Final = 0.1
NUM_ROUNDS: Final = 5


@dataclass(frozen=True)
class Codec:
    """Something that reads and writes terms; ``prepare`` turns ours into its own."""

    name: str
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]
    prepare: Callable[[Term], Any]


def messages(seed: int = 7) -> dict[str, list[Term]]:
    """What one request of ``NUM_TOKENS`` tokens sends, by kind."""
    chance = random.Random(seed)
    ref = Ref(NODE, 1_700_000_000, (chance.getrandbits(18), *_words(chance, 2)))
    client = Pid(NODE, 1234, 0, 1_700_000_000)
    # Token ids are about as unequal as words: the lower half of the bits is uniform.
    ids = [chance.randrange(VOCABULARY) >> chance.choice((0, 0, 0, 2, 6)) for _ in range(600)]
    options = {
        Atom("prompt"): ids[:NUM_PROMPT_TOKENS],
        Atom("generated"): [],
        Atom("max_tokens"): NUM_TOKENS,
        Atom("temperature"): 0.7,
        Atom("top_p"): 0.95,
        Atom("top_k"): 40,
        Atom("seed"): chance.getrandbits(31),
        Atom("stop_ids"): [0, 2],
    }
    tokens = ids[-NUM_TOKENS:]
    top = [(token, -chance.random() * 9) for token in ids[:5]]
    return {
        "submit": [(Atom("$gen_cast"), (Atom("submit"), client, ref, options))],
        "token": [
            (Atom("token"), ref, index, token, Atom("undefined"), [])
            for index, token in enumerate(tokens)
        ],
        "token_with_logprobs": [
            (Atom("token"), ref, index, token, -0.25, top) for index, token in enumerate(tokens)
        ],
        "text": [
            (Atom("phalanx"), ref, (Atom("token"), index, b" word" * chance.randint(1, 3)))
            for index in range(NUM_TOKENS)
        ],
        "done": [(Atom("done"), ref, Atom("stop"), b"")],
    }


def _words(chance: random.Random, count: int) -> list[int]:
    return [chance.getrandbits(32) for _ in range(count)]


def measure(work: Callable[[Any], object], items: Sequence[Any], num_bytes: int) -> float:
    """Megabytes a second of ``work`` over all ``items``: the best of some rounds."""
    best = 0.0
    for _ in range(NUM_ROUNDS):
        num_passes = 0
        start_s = time.process_time()
        while (spent_s := time.process_time() - start_s) < ROUND_S:
            for item in items:
                work(item)
            num_passes += 1
        best = max(best, num_bytes * num_passes / spent_s)
    return best / 1e6


def bench(codec: Codec, kinds: dict[str, list[Term]]) -> dict[str, dict[str, float]]:
    """MB/s of encode and decode for each kind."""
    found = {}
    for kind, terms in kinds.items():
        wires = [etf.encode(term) for term in terms]
        own = [codec.prepare(term) for term in terms]
        num_bytes = sum(map(len, wires))
        found[kind] = {
            "encode_mb_s": round(measure(codec.encode, own, num_bytes), 2),
            "decode_mb_s": round(measure(codec.decode, wires, num_bytes), 2),
        }
    return found


def erlang_py() -> Codec | None:
    """The peer, if it is installed (`pip install erlang-py`); it is no dependency of ours."""
    try:
        erlang = importlib.import_module("erlang")
    except ImportError:
        return None
    return Codec(
        "erlang_py",
        erlang.term_to_binary,
        erlang.binary_to_term,
        lambda term: erlang.binary_to_term(etf.encode(term)),
    )


def run() -> dict[str, Any]:
    """All figures, and how many times faster than the peer a whole request is."""
    kinds = messages()
    kinds = {"request": [*kinds["submit"], *kinds["token"], *kinds["done"]], **kinds}
    codecs = [Codec("phalanx", etf.encode, etf.decode, lambda term: term), erlang_py()]
    found: dict[str, Any] = {codec.name: bench(codec, kinds) for codec in codecs if codec}
    if "erlang_py" in found:
        found["times_erlang_py"] = {
            kind: {
                key: round(value / found["erlang_py"][kind][key], 1) for key, value in ours.items()
            }
            for kind, ours in found["phalanx"].items()
        }
    return found


if __name__ == "__main__":
    print(json.dumps(run(), indent=1))
