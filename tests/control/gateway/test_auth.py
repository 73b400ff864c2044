"""API keys at the HTTP edge: who is let in to what, in the words of each API."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import anthropic
import httpx
import ollama
import openai
import pytest

from control.gateway.auth import is_open_to_all, scope_for
from control.gateway.key_ring import KeyRing
from control.gateway.settings import GatewaySettings
from control.keys import ADMIN, INFER, ApiKey, make_key
from tests.control.gateway.fake_backend import MODEL, FakeBackend, FakeControl
from tests.control.gateway.live import Live, serve

ASK: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
CHAT = "/v1/chat/completions"


@dataclass
class Clock:
    now_s: float = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Closed:
    """A gateway with keys; the ring's clocks stand still unless a test moves them."""

    live: Live
    ring: KeyRing
    control: FakeControl
    clock: Clock
    records: list[ApiKey] = field(default_factory=list)

    def key(self, *scopes: str, **limits: Any) -> str:
        key, record = make_key(self.clock(), scopes=scopes or (INFER,), **limits)
        self.records.append(record)
        self.control.records[record.id] = record
        self.ring.update(self.control.records.values(), revoked=False)
        return key

    def ask(self, key: str, method: str, path: str, body: Any = None) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return self.live.http.request(method, path, json=body, headers=headers)


@pytest.fixture(scope="module")
def made() -> Iterator[Closed]:
    clock = Clock()
    ring = KeyRing(now_s=clock, monotonic_s=clock)
    control = FakeControl()
    control.on_keys = lambda keys, revoked: ring.update(keys, revoked=revoked)
    with serve(FakeBackend(), control=control, ring=ring) as live:
        yield Closed(live, ring, control, clock)


@pytest.fixture
def closed(made: Closed) -> Closed:
    made.live.backend.reset()
    made.control.records.clear()
    made.records.clear()
    made.key(INFER, name="somebody's")
    return made


def test_while_there_is_no_key_everybody_on_this_machine_is_let_in(made: Closed) -> None:
    made.ring.update([], revoked=False)
    assert made.ask("", "GET", "/v1/models").status_code == 200
    assert made.ask("any", "POST", CHAT, ASK).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/health/ready", "/docs", "/", "/healthy"])
def test_what_is_never_closed(closed: Closed, path: str) -> None:
    assert is_open_to_all(path)
    assert closed.ask("", "GET", path).status_code in (200, 404)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", CHAT), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/openapi.json"),
        ("GET", "/cluster/status"), ("GET", "/cluster/events"), ("POST", "/cluster/load"),
        ("GET", "/api/tags"), ("POST", "/v1/messages"), ("GET", "/nothing"), ("PUT", "/v1/models"),
        ("OPTIONS", CHAT), ("GET", "/docs/"), ("GET", "/cluster/keys"),
        ("HEAD", "/v1/models"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", ["", "none", "phx-000000000000-" + "a" * 43])
def test_everything_else_asks_for_a_key(closed: Closed, method: str, path: str, key: str) -> None:
    answer = closed.ask(key, method, path, {} if method == "POST" else None)
    assert answer.status_code == 401
    challenge = 'Bearer realm="phalanx"' + (', error="invalid_token"' if key else "")
    assert answer.headers["www-authenticate"] == challenge
    if method == "HEAD":
        return
    error = answer.json()["error"]
    text = error if path.startswith("/api/") else error["message"]
    assert "x-api-key" in text
    if not path.startswith("/api/"):
        assert error["type"] == "authentication_error"


def test_a_key_comes_in_either_header_and_in_any_case_of_its_word(closed: Closed) -> None:
    key = closed.key()
    wrong = "Bearer none"
    for headers in (
        {"Authorization": f"Bearer {key}"},
        {"authorization": f"bearer  {key}"},
        {"X-Api-Key": key},
        {"Authorization": wrong, "x-api-key": key},
    ):
        assert closed.live.http.get("/v1/models", headers=headers).status_code == 200
    for headers in ({"Authorization": key}, {"Authorization": f"Basic {key}"}, {"Cookie": key}):
        assert closed.live.http.get("/v1/models", headers=headers).status_code == 401
    assert closed.live.http.get(f"/v1/models?api_key={key}").status_code == 401


ADMINS = [
    ("POST", "/cluster/load"), ("POST", "/cluster/unload"), ("POST", "/cluster/swap"),
    ("POST", "/cluster/place"), ("POST", "/cluster/anything-new"), ("POST", "/api/pull"),
    ("DELETE", "/api/delete"), ("GET", "/cluster/keys"), ("POST", "/cluster/keys"),
    ("DELETE", "/cluster/keys/x"), ("PATCH", "/anything"),
]  # fmt: skip
INFERS = [
    ("POST", CHAT), ("POST", "/v1/completions"), ("POST", "/v1/messages"), ("POST", "/api/chat"),
    ("POST", "/v1/messages/count_tokens"), ("POST", "/v1/responses"), ("GET", "/v1/responses/x"),
    ("DELETE", "/v1/responses/x"), ("POST", "/api/generate"), ("POST", "/api/embed"),
]  # fmt: skip
READS = [
    ("GET", "/v1/models"), ("GET", "/v1/models/tiny"), ("POST", "/api/show"), ("GET", "/api/ps"),
    ("GET", "/cluster/status"), ("GET", "/metrics"), ("HEAD", "/api/tags"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "path", "scope"),
    [(*one, ADMIN) for one in ADMINS] + [(*one, INFER) for one in INFERS]
    + [(*one, "") for one in READS],
)  # fmt: skip
def test_each_route_has_its_scope(method: str, path: str, scope: str) -> None:
    assert scope_for(method, path) == scope


def test_every_route_that_there_is_has_the_scope_it_should(closed: Closed) -> None:
    """What changes something is for `admin`, or is a question to a model."""
    spec = closed.ask(closed.key(), "GET", "/openapi.json").json()
    for path, operations in spec["paths"].items():
        for method in operations:
            scope = scope_for(method.upper(), path)
            if is_open_to_all(path) or method == "get" or path == "/api/show":
                continue
            steers = path.startswith("/cluster") or path in ("/api/pull", "/api/delete")
            assert scope == (ADMIN if steers else INFER), path


def test_a_scope_that_is_missing_is_named(closed: Closed) -> None:
    infer, admin, both = closed.key(INFER), closed.key(ADMIN), closed.key(INFER, ADMIN)
    load = {"model": "m"}
    for key, method, path, body, scope in (
        (infer, "POST", "/cluster/load", load, ADMIN),
        (infer, "DELETE", "/api/delete", {"model": MODEL}, ADMIN),
        (admin, "POST", CHAT, ASK, INFER),
    ):
        answer = closed.ask(key, method, path, body)
        assert answer.status_code == 403
        assert f'insufficient_scope", scope="{scope}"' in answer.headers["www-authenticate"]
        assert f"'{scope}'" in answer.text
    assert closed.ask(infer, "POST", CHAT, ASK).status_code == 200
    assert closed.ask(admin, "POST", "/cluster/load", load).status_code == 200
    for path, body in ((CHAT, ASK), ("/cluster/load", load)):
        assert closed.ask(both, "POST", path, body).status_code == 200


def test_keep_alive_0_unloads_for_admins_alone(closed: Closed) -> None:
    body = {"model": MODEL, "keep_alive": 0}
    infer, both = closed.key(INFER), closed.key(INFER, ADMIN)
    closed.control.asked.clear()
    answer = closed.ask(infer, "POST", "/api/generate", body)
    assert (answer.status_code, closed.control.asked) == (403, [])
    assert isinstance(answer.json()["error"], str)
    assert closed.ask(infer, "POST", "/api/generate", {"model": MODEL}).status_code == 200
    assert closed.ask(both, "POST", "/api/generate", body).status_code == 200
    assert closed.control.asked == [("unload", "tiny-1")]


def test_the_official_clients_know_the_refusals(closed: Closed) -> None:
    live, admin = closed.live, closed.key(ADMIN)
    with pytest.raises(openai.AuthenticationError) as no:
        live.openai.chat.completions.create(**ASK)
    assert no.value.code == "invalid_api_key"
    with pytest.raises(openai.PermissionDeniedError):
        live.openai.with_options(api_key=admin).chat.completions.create(**ASK)
    with pytest.raises(anthropic.AuthenticationError) as never:
        live.anthropic.messages.create(**ASK, max_tokens=5)
    assert never.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]
    with pytest.raises(anthropic.PermissionDeniedError):
        live.anthropic.with_options(api_key=admin).messages.create(**ASK, max_tokens=5)
    with pytest.raises(ollama.ResponseError) as nor:
        live.ollama.chat(**ASK)
    assert nor.value.status_code == 401


def test_the_official_clients_are_let_in(closed: Closed) -> None:
    live, key = closed.live, closed.key()
    said = live.openai.with_options(api_key=key).chat.completions.create(**ASK)
    assert said.choices[0].message.content == "Hello there"
    assert live.anthropic.with_options(api_key=key).messages.create(**ASK, max_tokens=99).content
    other = ollama.Client(host=live.url, headers={"Authorization": f"Bearer {key}"})
    with other:
        assert other.chat(**ASK).message.content == "Hello there"


def test_a_key_that_has_ended_or_was_revoked_opens_nothing(closed: Closed) -> None:
    short = closed.key(expires_s=closed.clock() + 60)
    admin, other = closed.key(ADMIN), closed.key()
    assert closed.ask(short, "GET", "/v1/models").status_code == 200
    closed.clock.now_s += 60
    answer = closed.ask(short, "GET", "/v1/models")
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "expired_api_key")
    id_ = other.split("-")[1]
    assert closed.ask(admin, "DELETE", f"/cluster/keys/{id_}").json()["revoked"]
    assert closed.ask(other, "GET", "/v1/models").status_code == 401
    assert closed.ask(admin, "DELETE", f"/cluster/keys/{id_}").status_code == 404


def test_a_feed_ends_with_its_key(closed: Closed) -> None:
    key, other = closed.key(), closed.key()
    revoke = closed.control.revoke_key
    with closed.live.http.stream("GET", "/cluster/events", headers={"x-api-key": key}) as feed:
        lines = feed.iter_lines()
        assert next(lines) == "event: status"
        for one in (other, key):  # another's end is nothing to it
            closed.live.call(revoke(one.split("-")[1]))
        assert "event: instance" in list(lines)  # it has an end


def test_the_last_key_that_goes_does_not_open_the_door(closed: Closed) -> None:
    key = closed.key()
    closed.ring.update([], revoked=True)
    answer = closed.ask(key, "GET", "/v1/models")
    assert answer.status_code == 401
    assert "every API key was revoked" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("exposed", "insecure", "revoked", "is_open"),
    [
        (False, False, False, True), (False, False, True, False), (True, False, False, False),
        (True, True, False, True), (True, True, True, True), (False, True, True, True),
    ],
)  # fmt: skip
def test_who_is_let_in_while_there_is_no_key(
    exposed: bool, insecure: bool, revoked: bool, is_open: bool
) -> None:
    ring = KeyRing(known=False, exposed=exposed, insecure=insecure)
    assert not ring.is_open  # nobody, before it is sure that there is none
    ring.update([], revoked=revoked)
    assert ring.is_open is is_open
    ring.update([make_key(0)[1]], revoked=revoked)
    assert not ring.is_open


def test_a_gateway_that_does_not_know_the_keys_stays_closed() -> None:
    with serve(FakeBackend(), ring=KeyRing(known=False)) as live:
        answer = live.http.get("/v1/models", headers={"x-api-key": "phx-whatever"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert live.http.get("/health").status_code == 200


def test_keys_are_made_and_listed_over_http_by_admins(closed: Closed) -> None:
    admin = closed.key(ADMIN)
    body = {"name": "mine", "scopes": ["infer"], "rate_per_minute": 9}
    made = closed.ask(admin, "POST", "/cluster/keys", body).json()
    assert (made["name"], made["rate_per_minute"], made["expires_s"]) == ("mine", 9, None)
    assert closed.ask(made["key"], "GET", "/v1/models").status_code == 200
    listed = closed.ask(admin, "GET", "/cluster/keys")
    assert made["id"] in [one["id"] for one in listed.json()]
    for record in closed.control.records.values():
        assert record.hash not in listed.text
    assert made["key"] not in listed.text
    for bad in ({"scopes": ["root"]}, {"name": "x" * 65}, {"name": "\n"}, {"expires_s": 5}):
        answer = closed.ask(admin, "POST", "/cluster/keys", bad)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"].startswith(next(iter(bad))[:7])


def test_the_first_key_is_not_made_over_http(made: Closed) -> None:
    made.ring.update([], revoked=False)
    answer = made.ask("", "POST", "/cluster/keys", {})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "first_key_by_ctl")
    assert not made.ring.has_keys


def test_a_key_has_its_own_rate_and_is_told_the_truth(closed: Closed) -> None:
    slow, other = closed.key(rate_per_minute=2), closed.key(rate_per_minute=2)
    for _ in range(2):
        assert closed.ask(slow, "POST", CHAT, ASK).status_code == 200
    for path, body in ((CHAT, ASK), ("/v1/messages", {}), ("/api/chat", {})):
        answer = closed.ask(slow, "POST", path, body)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "30")
    assert closed.ask("", "GET", "/health").status_code == 200
    assert closed.ask(other, "POST", CHAT, ASK).status_code == 200
    closed.clock.now_s += 29
    assert closed.ask(slow, "POST", CHAT, ASK).headers["retry-after"] == "1"
    closed.clock.now_s += 1
    assert closed.ask(slow, "POST", CHAT, ASK).status_code == 200
    with pytest.raises(openai.RateLimitError):
        closed.live.openai.with_options(api_key=slow).chat.completions.create(**ASK)


def test_a_response_is_for_the_key_that_made_it(closed: Closed) -> None:
    mine, yours = closed.key(), closed.key()
    made = closed.ask(mine, "POST", "/v1/responses", {"model": MODEL, "input": "hi"}).json()
    path = f"/v1/responses/{made['id']}"
    more = {"model": MODEL, "input": "go on", "previous_response_id": made["id"]}
    assert closed.ask(yours, "GET", path).status_code == 404
    assert closed.ask(yours, "DELETE", path).status_code == 404
    answer = closed.ask(yours, "POST", "/v1/responses", more)
    assert answer.json()["error"]["code"] == "previous_response_not_found"
    assert closed.ask(mine, "POST", "/v1/responses", more).status_code == 200
    assert closed.ask(mine, "GET", path).json()["id"] == made["id"]
    assert closed.ask(mine, "DELETE", path).status_code == 200


def test_a_large_body_of_a_stranger_is_refused_and_not_looked_at(closed: Closed) -> None:
    answer = closed.live.http.post(CHAT, content=b"[" * 1_000_000)
    assert answer.status_code == 401


# -- browsers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://evil.example:52415", 403), ("null", 403), ("http://127.evil.example", 403),
        ("http://[::1", 403), ("http://localhost:3000", 200), ("http://127.0.0.1:8080", 200),
        ("http://[::1]:8080", 200),
    ],
)  # fmt: skip
def test_without_keys_foreign_pages_are_refused_even_as_the_same_origin(
    made: Closed, origin: str, status: int
) -> None:
    made.ring.update([], revoked=False)
    answer = made.live.http.post(CHAT, json=ASK, headers={"Origin": origin})
    assert answer.status_code == status
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_origins_that_are_listed_may_ask_and_others_are_not_told_so() -> None:
    settings = GatewaySettings(cors_origins=("https://chat.example",))
    ring = KeyRing()
    key, record = make_key(0)
    ring.update([record], revoked=False)
    with serve(FakeBackend(), settings=settings, ring=ring) as live:
        for origin, allowed in (("https://chat.example", True), ("https://evil.example", False)):
            headers = {
                "Origin": origin,
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization, x-stainless-os",
            }
            first = live.http.options(CHAT, headers=headers)  # browsers send it without the key
            assert first.status_code == (200 if allowed else 400)
            asked = {"Origin": origin, "x-api-key": key}
            then = live.http.post(CHAT, json=ASK, headers=asked)
            for answer in (first, then):
                found = answer.headers.get("access-control-allow-origin")
                assert found == (origin if allowed else None)
                assert "access-control-allow-credentials" not in answer.headers
        assert live.http.post(CHAT, json=ASK, headers={"Origin": origin}).status_code == 401
