"""Errors a caller of the control plane can do something about: what, numbers, next step."""

from __future__ import annotations


class ControlError(Exception):
    """Base of every control error; ``kind`` is the atom remote callers see."""

    kind = "error"


class UnknownModel(ControlError):
    """No card, instance, alias or path has this name."""

    kind = "unknown_model"

    def __init__(self, model: str, known: tuple[str, ...] = (), *, told: str = "") -> None:
        super().__init__(model, known, told)
        self.model, self.known, self.told = model, known, told  # told: text of another process

    def __str__(self) -> str:
        if self.told:
            return self.told
        seen = ", ".join(sorted(self.known)[:8]) or "none"
        return f"unknown model {self.model!r}; known: {seen}. See `ctl model list`."


class NotReady(ControlError):
    """The model is known but no instance serves it now."""

    kind = "not_ready"

    def __init__(self, model: str, why: str, *, retry_after_s: float = 5.0) -> None:
        super().__init__(model, why, retry_after_s)
        self.model, self.why, self.retry_after_s = model, why, retry_after_s

    def __str__(self) -> str:
        return f"model {self.model!r} is not ready: {self.why}. Load it with `ctl model load`."
