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
        seen = ", ".join(sorted(self.known)[:20]) or "none"
        return f"unknown model {self.model!r}; known: {seen}. See `ctl model list`."


class NotReady(ControlError):
    """The model is known but no instance serves it now; ``kind`` says why."""

    kind = "not_ready"

    def __init__(
        self, model: str, why: str, *, retry_after_s: float = 5.0, kind: str = "not_ready"
    ) -> None:
        super().__init__(model, why, retry_after_s)
        self.model, self.why, self.retry_after_s = model, why, retry_after_s
        self.kind = kind

    def __str__(self) -> str:
        advice = (
            f" Load it with `ctl model load {self.model}`." if self.kind == "not_loaded" else ""
        )
        return f"model {self.model!r} is not ready: {self.why.rstrip('.')}.{advice}"


class NotAModel(UnknownModel):
    """The reference is a path or hub name, but nothing that can be loaded is there."""

    kind = "not_a_model"

    def __init__(self, model: str, why: str) -> None:
        ControlError.__init__(self, model, why)
        self.model, self.known, self.why = model, (), why

    def __str__(self) -> str:
        return (
            f"{self.model!r} is not a model: {self.why}. Give a card's id (`ctl model list`), a "
            "GGUF file, a folder with config.json and *.safetensors, or hf:ORG/REPO[/FILE]."
        )


class DownloadFailed(ControlError):
    """Something could not be fetched; what was fetched so far is kept for the next try."""

    kind = "download_failed"

    def __init__(
        self, what: str, why: str, advice: str = "Check the network and try again"
    ) -> None:
        super().__init__(what, why, advice)
        self.what, self.why, self.advice = what, why, advice

    def __str__(self) -> str:
        return f"cannot fetch {self.what}: {self.why}. {self.advice}."


class ChecksumMismatch(DownloadFailed):
    """What arrived is not what was promised; it has been thrown away."""

    kind = "checksum_mismatch"

    def __init__(self, what: str, expected: str, found: str) -> None:
        super().__init__(
            what,
            f"expected {expected}, got {found}; it was thrown away",
            "Try again; if it stays so, the source is damaged or not the one the card means",
        )


class NoSource(DownloadFailed):
    """Every source of a model failed; ``failures`` pairs each with its error's text."""

    def __init__(self, model: str, failures: tuple[tuple[str, str], ...]) -> None:
        tried = "; ".join(f"{source}: {why}" for source, why in failures)
        super().__init__(model, f"all {len(failures)} sources failed: {tried}")
        self.failures = failures


class DiskFull(ControlError):
    """The disk of the model store cannot take the model."""

    kind = "disk_full"

    def __init__(self, path: str, need_bytes: int, free_bytes: int) -> None:
        super().__init__(path, need_bytes, free_bytes)
        self.path, self.need_bytes, self.free_bytes = path, need_bytes, free_bytes

    def __str__(self) -> str:
        need = (
            f"{self.need_bytes / 1e6:.1f} MB more are needed" if self.need_bytes else "it is full"
        )
        return (
            f"no space in {self.path}: {need}, {self.free_bytes / 1e6:.1f} MB are free. Free some, "
            "or set models.dir to another disk."
        )


class UnknownNode(ControlError):
    """No node that is up has this name, or more than one."""

    kind = "unknown_node"

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        super().__init__(name, known)
        self.name, self.known = name, known

    def __str__(self) -> str:
        return f"no one node is meant by {self.name!r}; up are {', '.join(sorted(self.known))}."


class QuotaExceeded(ControlError):
    """A model does not fit in the quota of the model store, whatever else were deleted."""

    kind = "quota_exceeded"

    def __init__(
        self, model: str, need_bytes: int, quota_bytes: int, held_bytes: int, in_use_bytes: int
    ) -> None:
        super().__init__(model, need_bytes, quota_bytes, held_bytes, in_use_bytes)
        self.model, self.need_bytes, self.quota_bytes = model, need_bytes, quota_bytes
        self.held_bytes, self.in_use_bytes = held_bytes, in_use_bytes

    def __str__(self) -> str:
        return (
            f"no room for {self.model}: {self.need_bytes / 1e6:.1f} MB more are needed; the quota "
            f"is {self.quota_bytes / 1e6:.1f} MB, models take {self.held_bytes / 1e6:.1f} MB, "
            f"those that run {self.in_use_bytes / 1e6:.1f} MB of that. Unload or remove a model, "
            "or raise models.quota."
        )


class StoreUnusable(ControlError):
    """The folder of the model store cannot be read or written."""

    kind = "store_unusable"

    def __init__(self, path: str, why: str) -> None:
        super().__init__(path, why)
        self.path, self.why = path, why

    def __str__(self) -> str:
        return f"model store: {self.path}: {self.why}. Give it to your user or set models.dir."


class NoPlacement(ControlError):
    """No machine of the cluster may hold the model in this shape; ``why`` has every number."""

    kind = "no_placement"

    def __init__(self, model: str, shape: str, why: str) -> None:
        super().__init__(model, shape, why)
        self.model, self.shape, self.why = model, shape, why

    def __str__(self) -> str:
        return (
            f"cannot place {self.model} as {self.shape}: {self.why}. Give it fewer slots or less "
            "context, pick a smaller quantisation, or raise max_memory."
        )
