"""Capability flags of a distribution link, and which of them we send and demand.

Source: erl_dist_protocol, "Distribution Flags"; what OTP 25 and 28 send and demand was
measured between stock nodes.
"""

from __future__ import annotations

from enum import IntFlag
from typing import Final


class Flag(IntFlag):
    PUBLISHED = 1 << 0  # a visible node
    EXTENDED_REFERENCES = 1 << 2
    DIST_MONITOR = 1 << 3
    FUN_TAGS = 1 << 4
    DIST_MONITOR_NAME = 1 << 5
    NEW_FUN_TAGS = 1 << 7
    EXTENDED_PIDS_PORTS = 1 << 8
    EXPORT_PTR_TAG = 1 << 9
    BIT_BINARIES = 1 << 10
    NEW_FLOATS = 1 << 11
    UNICODE_IO = 1 << 12
    DIST_HDR_ATOM_CACHE = 1 << 13
    SMALL_ATOM_TAGS = 1 << 14
    UTF8_ATOMS = 1 << 16
    MAP_TAG = 1 << 17
    BIG_CREATION = 1 << 18
    SEND_SENDER = 1 << 19
    EXIT_PAYLOAD = 1 << 22
    FRAGMENTS = 1 << 23
    HANDSHAKE_23 = 1 << 24
    UNLINK_ID = 1 << 25
    MANDATORY_25_DIGEST = 1 << 26  # stands for the eleven that OTP 25 demands
    SPAWN = 1 << 32
    NAME_ME = 1 << 33  # dynamic node names
    V4_NC = 1 << 34
    ALIAS = 1 << 35
    ALTACT_SIG = 1 << 37


_DIGEST: Final = (
    Flag.EXTENDED_REFERENCES
    | Flag.FUN_TAGS
    | Flag.NEW_FUN_TAGS
    | Flag.EXTENDED_PIDS_PORTS
    | Flag.EXPORT_PTR_TAG
    | Flag.BIT_BINARIES
    | Flag.NEW_FLOATS
    | Flag.UTF8_ATOMS
    | Flag.MAP_TAG
    | Flag.BIG_CREATION
    | Flag.HANDSHAKE_23
)

# What OTP 28 demands, and OTP 25 and later always send.
MANDATORY: Final = int(_DIGEST | Flag.UNLINK_ID | Flag.V4_NC)

# All that OTP 28 sends but the atom cache, which would tie every message to the link's
# history: without it packets carry an empty header and atoms are spelled out.
HIDDEN_NODE: Final = MANDATORY | int(
    Flag.DIST_MONITOR
    | Flag.DIST_MONITOR_NAME
    | Flag.UNICODE_IO
    | Flag.SMALL_ATOM_TAGS
    | Flag.SEND_SENDER
    | Flag.EXIT_PAYLOAD
    | Flag.FRAGMENTS
    | Flag.MANDATORY_25_DIGEST
    | Flag.SPAWN
    | Flag.ALIAS
    | Flag.ALTACT_SIG
)
VISIBLE_NODE: Final = HIDDEN_NODE | int(Flag.PUBLISHED)


def expand(flags: int) -> int:
    """``flags`` with the short form of the eleven written out."""
    return flags | int(_DIGEST) if flags & Flag.MANDATORY_25_DIGEST else flags


def missing(flags: int) -> list[str]:
    """Names of the mandatory flags that a peer's ``flags`` lack."""
    lack = MANDATORY & ~expand(flags)
    return [flag.name for flag in Flag if flag & lack and flag.name]
