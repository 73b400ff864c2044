"""Sentences of a placement's explanation: why one option is not the chosen one."""

from __future__ import annotations

from control.cost_model import Estimate, Goal, Policy


def slower(one: Estimate, best: Estimate, goal: Goal, policy: Policy) -> str:
    """A runner-up beside the chosen one, with the part that costs it the place."""
    if goal is Goal.THROUGHPUT:
        text = f"{one.tokens_per_s:.3g} tokens/s, chosen {best.tokens_per_s:.3g}"
    else:
        text = f"{seconds(one.request_s)} a request, chosen {seconds(best.request_s)}"
    text += f"; {figures(one)}"
    if one.start_s > best.start_s:
        text += f"; starts {seconds(one.start_s - best.start_s)} later"
        if one.request_s <= best.request_s:
            text += f", which {policy.requests} requests do not make up for"
    return text


def figures(estimate: Estimate) -> str:
    """A token's time and its parts."""
    parts = (
        ("multiplying", estimate.compute_s),
        ("sums", estimate.sums_s),
        ("hops", estimate.hops_s),
        ("orders and logits", estimate.head_s),
    )
    told = ", ".join(f"{name} {seconds(part)}" for name, part in parts if part > 0)
    return f"a token {seconds(estimate.token_s)} ({told})"


def roughly(cost_s: float, best: Estimate) -> str:
    """An option that was not worked out."""
    return f"about {cost_s / max(best.cost_s, 1e-12):.2g} times the chosen, by a rough estimate"


def seconds(value: float) -> str:
    """A duration for people."""
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"
