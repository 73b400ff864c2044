"""From a request body to the generations it asks for: prompt ids, room, seeds and limits."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from control.backend import GenerateRequest, OpenModel
from control.gateway.errors import ApiError, context_exceeded
from control.gateway.gateway import Gateway
from control.gateway.sampling import SEED_MODULUS, Sampling
from control.gateway.turn import Turn
from models.chat import render
from models.errors import TemplateError

LONGEST_TOKEN_CHARS = 512  # the longest in known vocabularies are runs of 128 spaces


async def chat_prompt(
    opened: OpenModel, turns: Sequence[Turn], *, param: str = "messages", go_on: bool = False
) -> tuple[int, ...]:
    """Token ids of a conversation, rendered with the model's own template.

    Args:
        param: the field that holds the conversation, for errors.
        go_on: an assistant's turn at the end is the beginning of the answer.

    Raises:
        ApiError: 400 where the model has no template, or the template refuses the messages.
    """
    template = opened.chat_template
    if template is None:
        raise ApiError(
            400,
            f"model {opened.id!r} has no chat template, so it cannot chat; "
            "use /v1/completions, or load an instruction-tuned model.",
            param="model",
            code="no_chat_template",
        )
    _check_could_fit(sum(len(turn.text) for turn in turns), opened, param=param)
    begun = ""
    if go_on and turns[-1].role == "assistant":
        *turns, (_, begun) = turns
    messages = [
        {"role": "system" if role == "developer" else role, "content": text} for role, text in turns
    ]

    def encode() -> list[int]:
        tokenizer = opened.tokenizer
        text = render(
            template, messages, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token
        )
        return tokenizer.encode(text + begun)

    try:
        return tuple(await asyncio.to_thread(encode))
    except TemplateError as exc:
        text = f"the chat template of {opened.id!r} refuses these messages: {exc}"
        raise ApiError(400, text, param=param, code="template_error") from exc


async def text_prompts(
    opened: OpenModel, prompt: str | list[str] | list[int] | list[list[int]]
) -> list[tuple[int, ...]]:
    """Token ids of each prompt of a completion; texts begin as the model was trained to see them.

    Raises:
        ApiError: 400 for an id beyond the vocabulary.
    """
    prompts: list[str | list[int]] = []
    if isinstance(prompt, str):
        prompts = [prompt]
    elif isinstance(prompt[0], int):
        prompts = [[one for one in prompt if isinstance(one, int)]]
    else:
        prompts = [one for one in prompt if not isinstance(one, int)]
    tokenizer = opened.tokenizer
    encoded = []
    for one in prompts:
        if isinstance(one, str):
            _check_could_fit(len(one), opened, param="prompt")
            ids = await asyncio.to_thread(tokenizer.encode, one)
            if tokenizer.add_bos and tokenizer.bos_id is not None:
                ids = [tokenizer.bos_id, *ids]
        else:
            ids = one
            too_big = max(ids, default=0)
            if too_big >= tokenizer.vocab_size:
                raise ApiError(
                    400,
                    f"prompt: token id {too_big} is not in the vocabulary of {opened.id!r} "
                    f"(0 to {tokenizer.vocab_size - 1}).",
                    param="prompt",
                    code="invalid_value",
                )
        encoded.append(tuple(ids))
    return encoded


def _check_could_fit(num_chars: int, opened: OpenModel, *, param: str) -> None:
    """Refuse a hopeless text before seconds are spent on encoding it."""
    at_least = num_chars // LONGEST_TOKEN_CHARS
    if at_least >= opened.context_tokens:
        raise context_exceeded(at_least, opened.context_tokens, param=param)


def plan(
    gateway: Gateway,
    opened: OpenModel,
    sampling: Sampling,
    prompts: Sequence[tuple[int, ...]],
    *,
    param: str,
    max_tokens: int | None,
    logprobs: int | None,
    request_id: str,
) -> list[GenerateRequest]:
    """One generation a choice, in the order of the answer: all choices of the first prompt first.

    ``max_tokens`` is clamped to the room that the prompt leaves; None takes all of it.

    Raises:
        ApiError: 400 for a prompt that is empty or leaves no room, or a bias on an unknown id.
    """
    for ids in prompts:
        if not ids:
            raise ApiError(400, f"{param}: the prompt is empty.", param=param, code="invalid_value")
        if len(ids) >= opened.context_tokens:
            raise context_exceeded(len(ids), opened.context_tokens, param=param)
    bias = _bias(opened, sampling)
    seed = gateway.settings.random_bits(63) if sampling.seed is None else sampling.seed
    several = len(prompts) * sampling.n > 1
    gateway.metrics.tokens.labels("prompt").inc(sum(len(ids) for ids in prompts))
    return [
        GenerateRequest(
            model=opened.id,
            prompt_ids=ids,
            max_tokens=min(max_tokens or opened.context_tokens, opened.context_tokens - len(ids)),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            logit_bias=bias,
            seed=(seed + choice) % SEED_MODULUS,
            logprobs=logprobs,
            stop_ids=frozenset(opened.tokenizer.eos_ids),
            request_id=f"{request_id}.{number * sampling.n + choice}" if several else request_id,
        )
        for number, ids in enumerate(prompts)
        for choice in range(sampling.n)
    ]


def _bias(opened: OpenModel, sampling: Sampling) -> dict[int, float]:
    bias = {}
    for name, value in (sampling.logit_bias).items():
        known = name.isascii() and name.isdecimal() and len(name) < 10
        if not known or int(name) >= opened.tokenizer.vocab_size:
            raise ApiError(
                400,
                f"logit_bias: {name[:32]!r} is not a token id of {opened.id!r} "
                f"(0 to {opened.tokenizer.vocab_size - 1}).",
                param="logit_bias",
                code="invalid_value",
            )
        bias[int(name)] = value
    return bias
