"""Writes ``etf.json``: the bytes that stock OTP 28 and OTP 25 make of each case.

    python -m tests.bridge.golden.record

Run it by hand after adding a case, on a machine that has both releases.
"""

from __future__ import annotations

import asyncio
import base64
import json
import zlib
from pathlib import Path

from tests.bridge.golden.cases import CASES
from tests.otp.stock import Erl, installations

PATH = Path(__file__).parent / "etf.json"

# Opaque to us, so there is no term to compare with: funs and what only the writer can read.
OPAQUE = {
    "new_fun": "N = 5, term_to_binary(fun(X) -> X + N end, [{minor_version, 2}])",
    "local": "term_to_binary({self(), make_ref()}, [local])",
}


def pack(data: bytes) -> str:
    """Hexadecimal; long vectors shortened by zlib."""
    if len(data) < 1000:
        return data.hex()
    return "zlib:" + base64.b64encode(zlib.compress(data, 9)).decode()


def unpack(text: str) -> bytes:
    if text.startswith("zlib:"):
        return zlib.decompress(base64.b64decode(text[5:]))
    return bytes.fromhex(text)


def load() -> dict[str, dict[str, bytes]]:
    """Case name -> release ("otp28") -> bytes."""
    recorded = json.loads(PATH.read_text())
    return {
        name: {release: unpack(text) for release, text in found.items()}
        for name, found in recorded.items()
    }


async def _record() -> dict[str, dict[str, str]]:
    recorded: dict[str, dict[str, str]] = {}
    for otp in installations():
        async with Erl(otp, args=("+fnu",)) as erl:
            for name, expression in ({c.name: c.expression for c in CASES} | OPAQUE).items():
                if name == "local" and otp.release < 26:
                    continue  # the option came with OTP 26
                data = await erl.eval(expression)
                recorded.setdefault(name, {})[str(otp)] = pack(data)
    return dict(sorted(recorded.items()))


if __name__ == "__main__":
    PATH.write_text(json.dumps(asyncio.run(_record()), indent=1) + "\n")
