"""The default model gives the same greedy tokens as transformers loading the same file."""

from __future__ import annotations

import pytest

from compute.engine import load_engine
from compute.sampler import SamplingParams
from compute.worker import Submit, Token, Worker
from models.chat import render
from models.checkpoint import open_checkpoint
from tests.compute.oracle import ask
from tests.models.default_model import default_model_path

NUM_TOKENS = 32
CHATS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain recursion to a child in two sentences.",
    "Translate 'good morning' into German, Spanish and Japanese.",
    "List three prime numbers above 50.",
    "Why is the sky blue?",
    "Give me a recipe for pancakes.",
    "Schreibe einen Satz über Erlang.",
    "What does the Python expression `[x * x for x in range(4)]` evaluate to?",
    "Summarise: telephone switches must never stop, so each part restarts on its own.",
]
RAW = [
    "Once upon a time, in a village at the edge of the forest,",
    "def fibonacci(n):\n    ",
    "The quick brown fox",
    "SELECT name, count(*) FROM users",
    "1, 1, 2, 3, 5, 8, 13,",
    "Die Würde des Menschen ist",
    '{"name": "Ada", "born": 1815, "knows": [',
    "In thermodynamics, entropy is a measure of",
    "Q: How many legs does a spider have?\nA:",
    "日本の首都は",
]


@pytest.mark.slow
@pytest.mark.timeout(
    300
)  # transformers alone needs 20 s to import and load, more on a busy machine
def test_twenty_prompts_give_the_tokens_of_transformers() -> None:
    """Greedy decoding is a fixed point: every token is the likeliest after those before it.

    So one forward of transformers over prompt and answer checks all of the answer's tokens.
    """
    path = default_model_path()
    checkpoint = open_checkpoint(path)
    tokenizer = checkpoint.tokenizer()
    assert checkpoint.chat_template is not None
    chats = [
        render(
            checkpoint.chat_template,
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            bos_token="<|im_start|>",
            eos_token="<|im_end|>",
        )
        for text in CHATS
    ]
    prompts = [tuple(tokenizer.encode(text)) for text in (*chats, *RAW)]
    engine = load_engine(path, context_tokens=512, num_slots=8, threads=2, device="cpu")
    worker = Worker(engine, prefill_chunk_tokens=64)
    for number, ids in enumerate(prompts):
        worker.submit(
            Submit(
                request_id=number,
                prompt_ids=ids,
                max_tokens=NUM_TOKENS,
                params=SamplingParams(temperature=0),
            )
        )
    answers: list[list[int]] = [[] for _ in prompts]
    while not worker.idle:
        for event in worker.step():
            assert isinstance(event.request_id, int)
            if isinstance(event, Token):
                assert event.index == len(answers[event.request_id])
                answers[event.request_id].append(event.token_id)
            else:
                assert event.reason == "length", event
    engine.close()
    assert [len(answer) for answer in answers] == [NUM_TOKENS] * 20

    full = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    (said,) = ask({"gguf": str(path), "ids": full})
    for prompt, answer, reference in zip(prompts, answers, said, strict=True):
        expected = reference["ids"][len(prompt) - 1 : -1]
        assert answer == expected, (tokenizer.decode(list(prompt)), min(reference["gaps"]))
