"""Runs the bodies of processes as tasks: how a body's end becomes an exit reason, and its crash
a report in the log; how a killed body is made to stop."""

from __future__ import annotations

import asyncio
import logging
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bridge.exit_signals import KILLED, NORMAL, is_clean
from bridge.process_errors import Exit
from bridge.term import Atom, Term

if TYPE_CHECKING:
    from bridge.process import Body, Process

_log: Final = logging.getLogger("bridge.process")

_CANCEL_AGAIN_S: Final = 0.05  # first pause before a body that swallowed its end is told again
_CANCEL_AGAIN_MAX_S: Final = 1.0


def start(process: Process, body: Body) -> None:
    """Run ``body`` as the task of ``process``."""
    process.task = asyncio.get_running_loop().create_task(
        _run(process, body), name=f"{process.pid} {process.name or process.label}"
    )


def stop(process: Process) -> None:
    """Stop the code of a process that is dead already, however often it takes."""
    task = process.task
    if task is None:
        assert process.exit_reason is not None
        process.mailbox.wake(Exit(process.exit_reason))
    elif not task.done():
        _cancel(process, task, 0)


def _cancel(process: Process, task: asyncio.Task[None], attempt: int) -> None:
    if task.done():
        return
    if attempt == 3:
        _log.warning(
            "process %s (%s) is dead but its code goes on: it holds up its cancellation at\n%s",
            process.pid,
            process.label,
            "".join(
                line for frame in task.get_stack() for line in traceback.format_stack(frame, 1)
            ),
        )
    task.cancel()
    pause_s = min(_CANCEL_AGAIN_S * 2**attempt, _CANCEL_AGAIN_MAX_S)
    task.get_loop().call_later(pause_s, _cancel, process, task, attempt + 1)


async def _run(process: Process, body: Body) -> None:
    reason: Term = KILLED
    try:
        await body(process)
        reason = NORMAL
    except Exit as exc:
        reason = exc.reason
        report(process, reason, exc)
    except asyncio.CancelledError:
        if process.alive:  # not by a signal: the event loop is shutting down
            raise
    except Exception as exc:  # noqa: BLE001 -- a crashing process takes nothing down with it
        reason = crash_reason(exc)
        report(process, reason, exc)
    finally:
        process.task = None  # it ends by itself: nothing to cancel
        process.node.terminate(process, reason)


def crash_reason(error: BaseException) -> Term:
    """The exit reason of an uncaught Python error: ``{Type, Text, Stack}``.

    Stack entries have Erlang's shape: ``{File, Function, 0, [{line, N}]}``, innermost first.
    """
    if isinstance(error, Exit):
        return error.reason
    stack: list[Term] = [
        (
            Atom(Path(frame.filename).name[-255:]),
            Atom(frame.name[:255]),
            0,
            [(Atom("line"), frame.lineno)],
        )
        for frame in reversed(traceback.extract_tb(error.__traceback__))
    ]
    return (Atom(type(error).__name__), str(error).encode("utf-8", "replace"), stack)


def report(process: Process, reason: Term, error: Exception) -> None:
    """Write who crashed, why, and in which state, as proc_lib's crash report does.

    Nothing is written of an orderly end, nor of the cause for a process that is dead already.
    """
    if isinstance(error, Exit) and (error.quiet or is_clean(reason)):
        return
    if not process.alive:
        if not isinstance(error, Exit):
            _log.warning("process %s failed while it was stopped", process.pid, exc_info=error)
        return
    state: object = None
    if process.describe_state is not None:
        try:
            state = process.describe_state()
        except Exception as exc:  # noqa: BLE001 -- a broken state must not hide the crash
            state = f"(cannot be shown: {exc})"
    who = process.name or process.label or ":".join(process.initial_call[:2])
    _log.error(
        "crash report: %s %s ended with %s; state %s; ancestors %s; %d messages waiting, links %s",
        who,
        process.pid,
        error if isinstance(error, Exit) else f"{type(error).__name__}: {error}",
        state,
        process.ancestors,
        process.mailbox_length,
        list(process.links),
        exc_info=None if isinstance(error, Exit) else error,
        extra={"crashed": who, "pid": str(process.pid), "reason": repr(reason)},
    )
