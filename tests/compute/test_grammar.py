"""Constrained answers of the real default model: in form each time, and the same after a crash."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from random import Random
from typing import Any

import jsonschema
import numpy as np
import pytest

from compute.engine import StageEngine, load_engine
from compute.errors import GrammarFailed
from compute.grammar import Grammars, Matcher
from compute.sampler import SamplingParams
from compute.worker import Done, Event, Submit, Token, Worker
from models.checkpoint import open_checkpoint
from models.constraint import Constraint, choice
from models.errors import BadConstraint
from models.tokenizer import Tokenizer
from tests.models.default_model import default_model_path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # compiles on a fresh machine
PADDING = 7  # ids of the model that its tokenizer lacks


@cache
def tokenizer() -> Tokenizer:
    return open_checkpoint(default_model_path()).tokenizer()


@cache
def grammars() -> Grammars:
    return Grammars(tokenizer(), tokenizer().vocab_size)


@pytest.fixture(scope="module")
def engine() -> Iterator[StageEngine]:
    """SmolLM2, with room for 16 answers."""
    loaded = load_engine(
        default_model_path(), context_tokens=400, num_slots=16, threads=2, device="cpu"
    )
    yield loaded
    loaded.close()


def ask(key: int, constraint: Constraint, **more: Any) -> Submit:
    prompt = tokenizer().encode(
        "<|im_start|>user\nAnswer in JSON.<|im_end|>\n<|im_start|>assistant\n"
    )
    generated: tuple[int, ...] = more.pop("generated_ids", ())
    params = {"temperature": 1.0, "seed": key} | more.pop("params", {})
    return Submit(
        request_id=key,
        prompt_ids=tuple(prompt),
        generated_ids=generated,
        max_tokens=more.pop("max_tokens", 200),
        params=SamplingParams(**params),
        stop_ids=tokenizer().eos_ids,
        constraint=constraint,
        matcher=grammars().matcher(constraint, generated),
        **more,
    )


def answers(engine: StageEngine, *requests: Submit) -> dict[Any, tuple[list[int], Done]]:
    worker = Worker(engine)
    for request in requests:
        worker.submit(request)
    events: list[Event] = []
    while not worker.idle:
        events += worker.step()
    out = {}
    for request in requests:
        mine = [event for event in events if event.request_id == request.request_id]
        assert isinstance(mine[-1], Done)
        ids = [event.token_id for event in mine if isinstance(event, Token)]
        out[request.request_id] = (ids, mine[-1])
    return out


def random_schema(rng: Random, depth: int = 0) -> dict[str, Any]:
    """Small enough that its values fit 200 tokens: a model of this size may never end a number."""
    kinds = ["integer", "number", "string", "enum", "boolean", "format", "pattern"]
    match rng.choice(kinds + ["object", "object", "array", "any"] * (depth < 1) * 3):
        case "integer":
            low = rng.randint(-1000, 1000)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 500)}
        case "number":
            range_ = {"minimum": rng.uniform(-50, 0), "exclusiveMaximum": 7.5}
            return {"type": "number", "multipleOf": 0.25, **range_}
        case "string":
            low = rng.randint(0, 5)
            return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 12)}
        case "enum":
            values: list[Any] = ["red", 'a "b"\\', "é日本", 7, 2.5, None, True, ["x", {"y": 1}]]
            return {"enum": rng.sample(values, rng.randint(1, 5))}
        case "format":
            return {"type": "string", "format": rng.choice(["date", "uuid", "ipv4", "time"])}
        case "pattern":
            return {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}(é|x)?$"}
        case "array":
            low = rng.randint(0, 2)
            items = random_schema(rng, depth + 1)
            return {"type": "array", "items": items, "minItems": low, "maxItems": low + 2}
        case "any":
            return {"anyOf": [random_schema(rng, depth + 1), {"type": "null"}]}
        case "object":
            names = rng.sample(["name", "age", "größe", "a b", "x.y", 'q"t'], rng.randint(1, 3))
            return {
                "type": "object",
                "properties": {name: random_schema(rng, depth + 1) for name in names},
                "required": names[: rng.randint(0, len(names))],
                "additionalProperties": False,
            }
        case _:
            return {"type": "boolean"}


def test_thirty_random_schemas_give_valid_json_at_temperature_one(engine: StageEngine) -> None:
    drawn = (json.dumps(random_schema(Random(seed), depth=-1)) for seed in range(60))
    texts = list(dict.fromkeys(drawn))[:30]
    assert len(texts) == 30
    schemas = [json.loads(text) for text in texts]
    requests = [ask(n, Constraint("json_schema", text)) for n, text in enumerate(texts)]
    found = answers(engine, *requests)
    for number, schema in enumerate(schemas):
        ids, done = found[number]
        text = tokenizer().decode(ids)
        assert done == Done(number, "stop"), (schema, text)
        jsonschema.validate(
            json.loads(text), schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
        )


PHONE = Constraint("regex", r"\([0-9]{3}\) [0-9]{3}-[0-9]{4}")
SHORT = Constraint("lark", 'start: "<" WORD ("," WORD){1,3} ">"\nWORD: /[a-zé]{2,5}/')
COLOURS = ["red", "green", "dark é日 green"]
FORMS = [(PHONE, r"\(\d{3}\) \d{3}-\d{4}"), (SHORT, r"<[a-zé]{2,5}(,[a-zé]{2,5}){1,3}>")]


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.3, "top_p": 0.9, "presence_penalty": 1.0, "frequency_penalty": 1.0},
        {
            "min_p": 0.2,
            "repetition_penalty": 1.3,
            "logit_bias": dict.fromkeys(range(40, 90), 50.0),
        },
    ],
)
def test_regex_choice_and_grammar_under_every_way_to_draw(
    engine: StageEngine, params: dict[str, Any]
) -> None:
    orders = [ask(n, form, params=params, logprobs=3) for n, (form, _) in enumerate(FORMS)]
    found = answers(engine, *orders, ask(9, choice(COLOURS), params=params))
    for number, (_, expected) in enumerate(FORMS):
        ids, done = found[number]
        assert re.fullmatch(expected, tokenizer().decode(ids)), tokenizer().decode(ids)
        assert done == Done(number, "stop")
    assert tokenizer().decode(found[9][0]) in COLOURS


def test_log_probabilities_are_the_models_own(engine: StageEngine) -> None:
    """The mask changes what is drawn, not what the model is said to think of it."""
    worker = Worker(engine)
    worker.submit(ask(0, choice(["zebra crossing"]), logprobs=2, params={"temperature": 0.0}))
    while worker.idle or not (events := worker.step()):
        pass
    first = events[0]
    assert isinstance(first, Token)
    assert first.logprob is not None
    assert first.logprob < first.top[1][1]
    assert first.token_id not in {token_id for token_id, _ in first.top}
    assert np.exp([value for _, value in first.top]).sum() <= 1.0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_same_tokens_after_a_crash_anywhere(engine: StageEngine, temperature: float) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "maximum": 99},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    form = Constraint("json_schema", json.dumps(schema))
    params = {"temperature": temperature, "seed": 5}
    whole, done = answers(engine, ask(0, form, params=params))[0]
    assert done == Done(0, "stop")
    cuts = (1, 2, len(whole) // 2, len(whole) - 1, len(whole))
    found = answers(
        engine, *(ask(n, form, params=params, generated_ids=tuple(whole[:n])) for n in cuts)
    )
    assert found == {n: (whole[n:], Done(n, "stop")) for n in cuts}


def test_an_answer_that_may_go_on_ends_by_an_end_token_alone() -> None:
    matcher = grammars().matcher(Constraint("regex", "(ab)+"))
    ends = sorted(tokenizer().eos_ids)
    assert not matcher.allowed(ends)[ends].any()
    for token_id in tokenizer().encode("abab"):
        matcher.accept(token_id)
    assert not matcher.complete
    assert matcher.allowed(ends)[ends].all()
    assert not matcher.allowed()[ends].any()  # they are no text, so no part of an answer
    once = grammars().matcher(Constraint("regex", "ab"), tokenizer().encode("ab"))
    assert once.complete


def test_ids_beyond_the_tokenizer_are_never_allowed() -> None:
    size = tokenizer().vocab_size
    padded = Grammars(tokenizer(), size + PADDING)
    mask = padded.matcher(Constraint("regex", "(?s:.*)")).allowed()
    assert mask.shape == (size + PADDING,)
    assert not mask[size:].any()
    assert not mask[sorted(tokenizer().special_ids)].any()
    cut = Grammars(tokenizer(), size - PADDING)
    assert cut.matcher(Constraint("json_object")).allowed().shape == (size - PADDING,)


def test_special_tokens_are_named_in_a_grammar() -> None:
    token_id = tokenizer().id_of("<|im_start|>")
    for name in ("<|im_start|>", f"<[{token_id}]>"):
        matcher = grammars().matcher(Constraint("lark", f'start: {name} "a"'))
        assert np.flatnonzero(matcher.allowed()).tolist() == [token_id]
    with pytest.raises(BadConstraint, match="unknown special token"):
        grammars().matcher(Constraint("lark", 'start: <|none|> "a"'))


def test_tokens_that_do_not_fit_and_dead_ends_are_errors(engine: StageEngine) -> None:
    with pytest.raises(GrammarFailed, match="doesn't satisfy"):
        grammars().matcher(PHONE, tokenizer().encode("hello"))
    token_id = tokenizer().id_of("<|im_end|>")
    stuck = ask(0, Constraint("lark", f'start: <[{token_id}]> "a"'))  # asks for what ends it
    uncompiled = replace(ask(1, PHONE), matcher=None)
    found = answers(engine, stuck, uncompiled, ask(2, PHONE))
    assert found[0][1].reason == "error"
    assert "no token of this model" in found[0][1].text
    assert "not compiled" in found[1][1].text
    assert found[2][1] == Done(2, "stop")  # others do not notice


def test_a_grammar_that_takes_too_long_ends_its_request() -> None:
    form = Constraint("lark", 'start: a\na: a a | "x" | a "y" a | b\nb: a? "x" a?')
    matcher = grammars().matcher(form)
    rng = np.random.default_rng(0)

    def go_on() -> None:
        for _ in range(400):
            matcher.accept(int(rng.choice(np.flatnonzero(matcher.allowed()))))

    with pytest.raises(GrammarFailed, match=r"ms for each token|items"):
        go_on()


def test_a_compiled_grammar_is_kept_and_its_matchers_are_apart() -> None:
    mine = Grammars(tokenizer(), tokenizer().vocab_size)
    one, two = mine.matcher(PHONE), mine.matcher(PHONE)
    one.accept(tokenizer().encode("(")[0])
    assert not np.array_equal(one.allowed(), two.allowed())
    for number in range(40):
        assert isinstance(mine.matcher(choice([f"t{number}", "x"])), Matcher)
    assert len(mine._compiled) == 32
