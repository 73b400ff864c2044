"""Whatever a body says, the answer is an answer: never a 5xx, always the error shape."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from control.gateway.anthropic_types import MessagesRequest
from control.gateway.cluster import PlaceRequest
from control.gateway.ollama_types import OllamaChatRequest, OllamaGenerateRequest
from control.gateway.openai_types import ChatRequest, CompletionRequest
from control.gateway.responses_types import ResponsesRequest
from tests.control.gateway.fake_backend import MODEL
from tests.control.gateway.live import Live

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.sampled_from([MODEL, "user", "text", "auto", "none", 0, 1, 1.0, "65", "5m"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["role", "content", "type", "text", "65", "x"]), inner),
    ),
    max_leaves=6,
)
USER = [{"role": "user", "content": "x"}]
ROUTES: list[tuple[str, Any, dict[str, Any]]] = [
    ("/v1/chat/completions", ChatRequest, {"messages": USER}),
    ("/v1/completions", CompletionRequest, {"prompt": "x"}),
    ("/v1/responses", ResponsesRequest, {"input": "x"}),
    ("/v1/messages", MessagesRequest, {"messages": USER, "max_tokens": 5}),
    ("/api/chat", OllamaChatRequest, {"messages": USER}),
    ("/api/generate", OllamaGenerateRequest, {"prompt": "x"}),
    ("/cluster/load", PlaceRequest, {}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("path", "body", "base"), ROUTES)
def test_no_body_makes_the_server_fail(
    live: Live, path: str, body: Any, base: dict[str, Any]
) -> None:
    names = st.sampled_from([*body.model_fields, "what"])

    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    @given(fields=st.dictionaries(names, VALUES, max_size=4))
    def attempt(fields: dict[str, Any]) -> None:
        answer = live.http.post(path, json={"model": MODEL, **base, **fields})
        if answer.status_code == 200:
            return
        unsteered = "cluster" in path or path.startswith("/api/")  # no cluster is attached here
        assert answer.status_code in ((400, 404, 503) if unsteered else (400, 404))
        error = answer.json()["error"]
        if path.startswith("/api/"):
            assert isinstance(error, str)
        else:
            assert set(error) == {"message", "type", "param", "code"}

    attempt()
    assert live.backend.active == 0
