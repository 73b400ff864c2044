"""A cluster in memory: scripted answers through a real tokenizer, with faults on demand."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from control.backend import (
    ClusterEvent,
    DoneEvent,
    FinishReason,
    GenerateRequest,
    LoadOptions,
    ModelInfo,
    OpenModel,
    PullProgress,
    Readiness,
    TokenEvent,
)
from control.errors import ControlError, NotReady, UnknownModel
from control.keys import ApiKey, NoSuchKey
from models.tokenizer import BYTE_OF, Tokenizer

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTEXT_TOKENS = 256
MODEL = "tiny"
STATUS: dict[str, Any] = {
    "cluster": "default",
    "node": "phalanx@127.0.0.1",
    "leader": "phalanx@127.0.0.1",
    "epoch": 1,
    "nodes": [{"name": "phalanx@127.0.0.1", "state": "up"}],
    "instances": [
        {
            "id": "tiny-1",
            "model": "tiny",
            "state": "ready",
            "ranks": [{"rank": 0, "state": "ready"}],
        }
    ],
}


def byte_tokenizer(*, add_bos: bool = False) -> Tokenizer:
    """A byte-level tokenizer with a few merges: an emoji is four tokens, " the" is one."""
    vocab = dict(BYTE_OF)
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("e", "l"), ("l", "o"), ("el", "lo")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<|im_start|>", "<|im_end|>", "<s>"]
    backend.add_special_tokens([tokenizers.AddedToken(one, special=True) for one in specials])
    added = {len(vocab) + n: one for n, one in enumerate(specials)}
    _start, end, bos = added
    assert backend.token_to_id("<|im_end|>") == end
    return Tokenizer(
        backend,
        spelling="byte_level",
        added=added,
        special_ids=added,
        eos_ids=[end],
        eos_id=end,
        bos_id=bos,
        add_bos=add_bos,
    )


@dataclass
class FakeBackend:
    """Answers every prompt with ``say``.

    Attributes:
        say: the answer's text, or how to make it from the request.
        end: how the answer ends once all of it is said.
        fail_at: the token index before which ``failure`` is raised (or a DoneEvent sent).
        hold_at: the token index before which the answer waits for ever.
        requests: every request, in the order of arrival.
        closed: gets the request whenever an iterator is closed or exhausted.
    """

    tokenizer: Tokenizer = field(default_factory=byte_tokenizer)
    say: str | Callable[[GenerateRequest], str] = "Hello there"
    end: FinishReason = "stop"
    fail_at: int | None = None
    failure: Exception | DoneEvent = field(default_factory=lambda: RuntimeError("secret detail"))
    hold_at: int | None = None
    open_error: Exception | None = None
    requests: list[GenerateRequest] = field(default_factory=list)
    closed: queue.Queue[GenerateRequest] = field(default_factory=queue.Queue)
    held: queue.Queue[GenerateRequest] = field(default_factory=queue.Queue)
    active: int = 0

    def reset(self) -> None:
        """Back to the defaults; what ran before is forgotten."""
        self.__init__(self.tokenizer)  # type: ignore[misc]

    async def models(self) -> list[ModelInfo]:
        return [
            _info("hf:org/remote-one", "remote"),
            _info(MODEL, "ready", aliases=("default",)),
            _info("mute", "ready"),
        ]

    async def open_model(self, model: str, *, timeout_s: float) -> OpenModel:
        if self.open_error is not None:
            raise self.open_error
        if model == "slow":
            raise NotReady("slow", "it is still loading", retry_after_s=6.2)
        if model not in (MODEL, "default", "mute"):
            raise UnknownModel(model, (MODEL, "mute"))
        template = None if model == "mute" else TEMPLATE
        name = MODEL if model == "default" else model
        return OpenModel(name, self.tokenizer, template, CONTEXT_TOKENS)

    async def generate(
        self, request: GenerateRequest
    ) -> AsyncGenerator[TokenEvent | DoneEvent, None]:
        self.requests.append(request)
        self.active += 1
        try:
            text = self.say if isinstance(self.say, str) else self.say(request)
            ids = self.tokenizer.encode(text)
            for index, token_id in enumerate(ids[: request.max_tokens]):
                if index == self.fail_at:
                    if isinstance(self.failure, Exception):
                        raise self.failure
                    yield self.failure
                    return
                if index == self.hold_at:
                    self.held.put(request)
                    await asyncio.get_running_loop().create_future()
                await asyncio.sleep(0)
                yield self._token(request, index, token_id)
            yield DoneEvent("length" if len(ids) > request.max_tokens else self.end)
        finally:
            self.active -= 1
            self.closed.put(request)

    def _token(self, request: GenerateRequest, index: int, token_id: int) -> TokenEvent:
        if request.logprobs is None:
            return TokenEvent(index, token_id)
        others = tuple((other, -1.0 - other) for other in range(request.logprobs))
        return TokenEvent(index, token_id, -0.5 if index else float("-inf"), others)

    async def status(self) -> dict[str, Any]:
        return STATUS


@dataclass
class FakeControl:
    """Records what operators ask."""

    asked: list[tuple[Any, ...]] = field(default_factory=list)
    ready: Readiness = field(default_factory=lambda: Readiness(True))
    happened: tuple[ClusterEvent, ...] = (ClusterEvent("instance", {"id": "tiny-1"}),)
    pulled: tuple[PullProgress | Exception, ...] = ()
    records: dict[str, ApiKey] = field(default_factory=dict)
    on_keys: Callable[[Iterable[ApiKey], bool], None] = lambda keys, revoked: None

    async def topology(self) -> list[dict[str, Any]]:
        return [{"from": "a", "to": "b", "latency_s": 0.001}]

    async def tree(self) -> dict[str, Any]:
        return {"id": "root_sup", "children": []}

    async def readiness(self) -> Readiness:
        return self.ready

    async def events(self) -> AsyncGenerator[ClusterEvent, None]:
        for event in self.happened:
            yield event
        await asyncio.get_running_loop().create_future()

    async def place(self, model: str, options: LoadOptions) -> dict[str, Any]:
        self.asked.append(("place", model, options))
        return {"model": model, "chosen": {"tensor_size": options.tensor or 1}}

    async def load(self, model: str, options: LoadOptions) -> str:
        self.asked.append(("load", model, options))
        if model == "nope":
            raise UnknownModel(model, (MODEL,))
        return f"{model}-1"

    async def unload(self, instance_id: str) -> None:
        self.asked.append(("unload", instance_id))
        if instance_id != "tiny-1":
            raise NoSuchInstance(instance_id)

    async def swap(self, old: str, new: str) -> str:
        self.asked.append(("swap", old, new))
        return f"{new}-1"

    async def keys(self) -> list[dict[str, Any]]:
        return [record.public(0) for record in self.records.values()]

    async def add_key(self, record: ApiKey) -> None:
        self.records[record.id] = record
        self.on_keys(self.records.values(), False)

    async def revoke_key(self, id: str) -> None:
        if self.records.pop(id, None) is None:
            raise NoSuchKey(id)
        self.on_keys(self.records.values(), True)

    async def pull(self, model: str) -> AsyncGenerator[PullProgress, None]:
        self.asked.append(("pull", model))
        if model == "nope":
            raise UnknownModel(model, (MODEL,))
        for step in self.pulled:
            if isinstance(step, Exception):
                raise step
            yield step

    async def remove(self, model: str) -> None:
        self.asked.append(("remove", model))
        if model != MODEL:
            raise UnknownModel(model, (MODEL,))


class NoSuchInstance(ControlError):
    kind = "not_found"


def _info(model: str, state: Any, aliases: tuple[str, ...] = ()) -> ModelInfo:
    return ModelInfo(
        id=model,
        name=model.title(),
        family="llama",
        state=state,
        size_bytes=1000,
        context_tokens=CONTEXT_TOKENS,
        aliases=aliases,
        created_s=1_700_000_000,
    )
