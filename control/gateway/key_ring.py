"""What one gateway knows of the cluster's API keys, and whom it lets in by them."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Sequence

from control.gateway.errors import ApiError
from control.gateway.rate import Bucket, take
from control.keys import ApiKey, find_key

MOST_GIVEN = 4  # keys in the headers of one request that are looked at
REALM = 'Bearer realm="phalanx"'
ADVICE = "Send it as Authorization: Bearer KEY, or as x-api-key."


class KeyRing:
    """The keys, as the cluster's document has them, and how much each was used here.

    Open to everybody is only who listens on this machine alone while no key was ever made, and who
    was told to be (``--insecure``) while there is none. Before the document is known, nobody is
    let in.

    Args:
        known: False until ``update`` tells what keys there are.
        exposed: the endpoint is reached from other machines.
        insecure: open it where no key is left.
        now_s: seconds since 1970; keys end by it.
        monotonic_s: clock of the rate limits.

    Attributes:
        exposed: as given.
    """

    def __init__(
        self,
        *,
        known: bool = True,
        exposed: bool = False,
        insecure: bool = False,
        now_s: Callable[[], float] = time.time,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._known, self._insecure, self.exposed = known, insecure, exposed
        self._now_s, self._monotonic_s = now_s, monotonic_s
        self._keys: dict[str, ApiKey] = {}
        self._revoked = False
        self._buckets: dict[str, Bucket] = {}
        self._changed = asyncio.Event()

    @property
    def known(self) -> bool:
        return self._known

    @property
    def has_keys(self) -> bool:
        return bool(self._keys)

    @property
    def is_open(self) -> bool:
        """Whether no key is asked for."""
        if not self._known or self._keys:
            return False
        return self._insecure or not (self.exposed or self._revoked)

    def update(self, keys: Iterable[ApiKey], *, revoked: bool) -> None:
        """These are the keys now; ``revoked``: there were others."""
        self._keys = {key.id: key for key in keys}
        self._revoked, self._known = revoked, True
        self._changed.set()
        self._changed = asyncio.Event()
        self._buckets = {id_: one for id_, one in self._buckets.items() if id_ in self._keys}

    def admit(self, given: Sequence[bytes]) -> ApiKey:
        """The first of what a request gave that is a key. Raises ApiError: 401, or 503."""
        if not self._known:
            text = "this node does not know yet which keys there are; try again in a moment."
            raise ApiError(503, text, code="keys_unknown", headers={"Retry-After": "1"})
        found = None
        for one in given[:MOST_GIVEN]:
            found = find_key(self._keys, one) or found
        if found is None:
            raise self._refusal(bool(given))
        if found.expired(self._now_s()):
            text = f"the API key {found.id} has expired; ask the operator for another."
            raise _unauthorized(text, "expired_api_key", given=True)
        return found

    def _refusal(self, given: bool) -> ApiError:
        if not self._keys:
            why = "every API key was revoked" if self._revoked else "no API key exists yet"
            text = f"{why}, and this endpoint is not open without: make one with `ctl key create`."
            return _unauthorized(text, "no_api_key", given=given)
        if given:
            text = f"this is no API key of this cluster, or it was revoked. {ADVICE}"
            return _unauthorized(text, "invalid_api_key", given=True)
        return _unauthorized(f"an API key is needed. {ADVICE}", "missing_api_key", given=False)

    @property
    def next_change(self) -> asyncio.Event:
        """Set at the ``update`` that comes next after this was asked."""
        return self._changed

    def still_admits(self, id: str) -> bool:
        """Whether who was let in with this key (empty: without any) would be so again."""
        key = self._keys.get(id)
        return self.is_open if key is None else not key.expired(self._now_s())

    def spend(self, key: ApiKey) -> None:
        """Count one request of ``key``. Raises ApiError 429 where it has none left."""
        if not key.rate_per_minute:
            return
        now_s = self._monotonic_s()
        bucket, wait_s = take(self._buckets.get(key.id), key.rate_per_minute, now_s)
        self._buckets[key.id] = bucket
        if wait_s > 0:
            retry_s = math.ceil(wait_s)
            text = (
                f"the API key {key.id} may make {key.rate_per_minute} requests a minute here; "
                f"the next one in {retry_s} s."
            )
            headers = {"Retry-After": str(retry_s)}
            raise ApiError(429, text, code="rate_limit_exceeded", headers=headers)


def _unauthorized(text: str, code: str, *, given: bool) -> ApiError:
    fault = ', error="invalid_token"' if given else ""
    return ApiError(401, text, code=code, headers={"WWW-Authenticate": REALM + fault})
