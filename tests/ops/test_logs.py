"""One chain for structlog and stdlib; rotation; no secret in any line."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from ops import logs

SECRET = "QJ5XWZT0COOKIE7VALUE"


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    for handler in handlers:
        root.removeHandler(handler)  # configure() would close them
    yield
    for handler in root.handlers[:]:
        root.removeHandler(handler)
        handler.close()
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level)
    structlog.reset_defaults()


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "node.log").read_text().splitlines()]


def test_both_kinds_of_logger_end_in_the_same_file(tmp_path: Path) -> None:
    logs.configure(folder=tmp_path)
    structlog.get_logger("control.x").info("model loaded", model="m", seconds=1.5)
    logging.getLogger("control.y").warning("%d left", 3, extra={"request": "r-1"})
    logging.getLogger("control.y").debug("unseen")
    logging.getLogger("httpx").info("unseen")
    first, second = lines(tmp_path)
    assert (first["event"], first["model"], first["logger"]) == ("model loaded", "m", "control.x")
    assert (second["event"], second["level"], second["request"]) == ("3 left", "warning", "r-1")


@pytest.mark.parametrize("style", ["console", "json"])
def test_secrets_are_hidden_everywhere(
    style: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.hide(SECRET)
    logs.configure(folder=tmp_path, style="json" if style == "json" else "console")
    log = structlog.get_logger("x")
    log.info("joined", cookie="abc-short", api_key="k1-short", nested={"hf_token": "t1-short"})
    log.info(f"with {SECRET} inside", detail=[SECRET])
    logging.getLogger("y").info("header %s", "Authorization: Bearer aaaabbbbccccdddd")
    logging.getLogger("y").info("key sk-aaaabbbbccccddddeeee token_id=5")
    try:
        raise ValueError(f"bad {SECRET}")
    except ValueError:
        log.exception("failed")
    text = (tmp_path / "node.log").read_text()
    for written in (text, capsys.readouterr().err):
        assert "failed" in written
        assert "token_id=5" in written
        assert "ValueError: bad [hidden]" in written
        for secret in (SECRET, "abc-short", "k1-short", "t1-short", "aaaabbbbccccdddd"):
            assert secret not in written


def test_the_file_is_rotated(tmp_path: Path) -> None:
    logs.configure(folder=tmp_path, max_file_bytes=2000, num_files=3)
    for number in range(200):
        logging.getLogger("x").info("line %d", number)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["node.log", "node.log.1", "node.log.2"]
    assert all(path.stat().st_size <= 2000 for path in tmp_path.iterdir())
    assert lines(tmp_path)[-1]["event"] == "line 199"
