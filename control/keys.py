"""API keys: what one is, how it is made and checked, and its record. Pure but for the randomness.

A key is shown once, to whoever made it: ``phx-<id>-<secret>``. Everything else keeps the record,
which has the SHA-256 of the whole key instead of it. A fast hash is right here, and a slow one
(bcrypt, Argon2) is not: those make guesses dear where people choose secrets that can be guessed,
but nobody guesses one of 2**256 random secrets at any speed, and each request would pay for it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from bridge.term import Atom, Term
from bridge.text import text_of
from control.errors import ControlError

INFER: Final = "infer"  # asks models
ADMIN: Final = "admin"  # loads, unloads, swaps, places, pulls, deletes, and keys
SCOPES: Final = (INFER, ADMIN)
SECRET_BYTES: Final = 32
ID_BYTES: Final = 6
MAX_KEYS: Final = 1000  # in one cluster: they are in a document that every machine gets whole
MAX_REVOKED: Final = 1000
MAX_NAME: Final = 64
MAX_PER_MINUTE: Final = 1_000_000
_LAST_S: Final = 253_402_300_799  # the year 9999 ends
_ID: Final = re.compile(rf"[0-9a-f]{{{2 * ID_BYTES}}}")
_HASH: Final = re.compile(r"[0-9a-f]{64}")
_KEY: Final = re.compile(rb"phx-([0-9a-f]{12})-[A-Za-z0-9_-]{43}")
_NOBODY: Final = "0" * 64


class BadKey(ControlError):
    """A key that cannot be made as it was asked for."""

    kind = "bad_key"


class TooManyKeys(ControlError):
    kind = "too_many_keys"

    def __str__(self) -> str:
        return (
            f"a cluster keeps at most {MAX_KEYS} keys; revoke some first: `ctl key list` shows them"
        )


class NoSuchKey(ControlError):
    """No key has this id."""

    kind = "not_found"

    def __init__(self, id: str) -> None:
        super().__init__(id)
        self.id = id

    def __str__(self) -> str:
        return f"no key has the id {self.id[:64]!r}; `ctl key list` shows them"


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """The record of one key; nothing in it opens anything.

    Attributes:
        id: also a part of the key, so that it is found without trying all.
        hash: SHA-256 of the whole key, hexadecimal.
        scopes: some of ``SCOPES``, each for itself: ``admin`` does not ask models.
        rate_per_minute: requests on each node; 0: any number.
        created_s, expires_s: seconds since 1970; the key ends at ``expires_s``, 0: never.
    """

    id: str
    hash: str
    name: str = ""
    scopes: tuple[str, ...] = (INFER,)
    rate_per_minute: int = 0
    created_s: int = 0
    expires_s: int = 0

    def checked(self) -> ApiKey:
        """Raises BadKey for what no key may be."""
        if not _ID.fullmatch(self.id) or not _HASH.fullmatch(self.hash):
            raise BadKey("id and hash: this is no record of a key; make one with `ctl key create`")
        if len(self.name) > MAX_NAME or not self.name.isprintable():
            raise BadKey(f"name: at most {MAX_NAME} printable characters")
        if not self.scopes or set(self.scopes) - set(SCOPES):
            raise BadKey(f"scopes: give some of {', '.join(SCOPES)}")
        if not 0 <= self.rate_per_minute <= MAX_PER_MINUTE:
            raise BadKey(f"rate_per_minute: 1 to {MAX_PER_MINUTE} requests, or 0 for any number")
        if not (0 <= self.created_s <= _LAST_S and 0 <= self.expires_s <= _LAST_S):
            raise BadKey("created_s and expires_s: seconds since 1970")
        return self

    def expired(self, now_s: float) -> bool:
        """Whether it has ended at ``now_s`` (seconds since 1970)."""
        return bool(self.expires_s) and now_s >= self.expires_s

    def public(self, now_s: float) -> dict[str, Any]:
        """What may be shown of it, as JSON data."""
        return {
            "id": self.id,
            "name": self.name,
            "scopes": list(self.scopes),
            "rate_per_minute": self.rate_per_minute or None,
            "created_s": self.created_s,
            "expires_s": self.expires_s or None,
            "expired": self.expired(now_s),
        }


def make_key(
    now_s: float,
    *,
    name: str = "",
    scopes: Iterable[str] = (INFER,),
    rate_per_minute: int = 0,
    expires_s: float = 0,
    token_bytes: Callable[[int], bytes] = secrets.token_bytes,
) -> tuple[str, ApiKey]:
    """A new key and its record. Raises BadKey.

    Args:
        now_s, expires_s: seconds since 1970; 0 never expires.
    """
    if expires_s and expires_s <= now_s:
        raise BadKey("expires: that time is over")
    id_, secret = token_bytes(ID_BYTES).hex(), token_bytes(SECRET_BYTES)
    key = f"phx-{id_}-{_base64url(secret)}"
    record = ApiKey(
        id=id_,
        hash=hash_of(key.encode()),
        name=name,
        scopes=tuple(scope for scope in SCOPES if scope in set(scopes)),
        rate_per_minute=rate_per_minute,
        created_s=int(now_s),
        expires_s=int(expires_s),
    )
    unknown = sorted(set(scopes) - set(SCOPES))
    if unknown:
        raise BadKey(f"scopes: {unknown[0][:32]!r} is none of {', '.join(SCOPES)}")
    return key, record.checked()


def hash_of(key: bytes) -> str:
    """What is kept instead of a key."""
    return hashlib.sha256(key).hexdigest()


def find_key(keys: Mapping[str, ApiKey], given: bytes) -> ApiKey | None:
    """The record of what a client gave, by id; None: it is no key of ours.

    The hashes are compared in a time that does not depend on them, also where the id is unknown.
    """
    form = _KEY.fullmatch(given)
    record = keys.get(form[1].decode()) if form else None
    same = hmac.compare_digest(hash_of(given), record.hash if record else _NOBODY)
    return record if same else None


# -- as a term, between machines and on disk ------------------------------------------------


def key_term(key: ApiKey) -> dict[Term, Term]:
    """A record as a map."""
    return {Atom(name): _plain(value) for name, value in asdict(key).items()}


def key_of(term: Any) -> ApiKey:
    """Read ``key_term``'s answer, or JSON of it. Raises BadKey, which never quotes what it got."""
    if not isinstance(term, Mapping):
        raise BadKey("the record of a key is a map")
    fields = {text_of(name): value for name, value in term.items()}
    if unknown := sorted(set(fields) - set(ApiKey.__slots__)):
        raise BadKey(f"unknown field {unknown[0][:32]!r} in the record of a key")
    numbers = ("rate_per_minute", "created_s", "expires_s")
    for name, value in fields.items():
        form = int if name in numbers else (list | tuple if name == "scopes" else str | bytes)
        if not isinstance(value, form) or isinstance(value, bool):
            raise BadKey(f"{name}: of another form than in the record of a key")
    if not {"id", "hash"} <= set(fields):
        raise BadKey("the record of a key has an id and a hash")
    scopes = tuple(map(text_of, fields.get("scopes", (INFER,))))
    return ApiKey(
        id=text_of(fields["id"]),
        hash=text_of(fields["hash"]),
        name=text_of(fields.get("name", "")),
        scopes=scopes,
        **{name: fields[name] for name in numbers if name in fields},
    ).checked()


def _plain(value: Any) -> Term:
    return list(value) if isinstance(value, tuple) else value


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
