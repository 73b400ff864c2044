"""The registered process ``agent``: starts and stops groups of ranks here, as the leader says.

==============================================  ==============================================
call ``{start, Leader, Epoch, Spec}``           ``{ok, GroupPid}`` | ``{error, Kind, Text}``
call ``{stop, Leader, Epoch, Id, DrainS}``      ``ok`` once nothing of it is left
call ``running``                                list of maps: ``spec, group, epoch``; ``group`` is
                                                ``undefined`` where a former life of the control
                                                process had one whose ports still hold weights
call ``{why, Id}``                              ``{ok, #{alone, exhausted, epoch, last_error}}``:
                                                how a group came to its end
==============================================  ==============================================

``Epoch`` is the leader's: one that is over is refused (``old_epoch``), by what the ``election`` of
this machine knows. A group lives on its head's machine, under ``instance_sup``, and outlives the
leader. Each order runs in a process of its own, so that this one always answers.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

from bridge import etf, gen_server
from bridge.errors import DecodeError
from bridge.gen_server import NOREPLY, GenServer
from bridge.process import Process
from bridge.process_errors import ReceiveTimeout
from bridge.show import show
from bridge.term import Atom, Pid, Term
from bridge.text import text_of
from control.instance import History, instance_child
from control.instance_spec import InstanceSpec, spec_of, spec_term
from control.names import wait_for_names
from control.rank import RankLimits

log = logging.getLogger("control.agent")

START_S: Final = 120.0
END_S: Final = 5.0  # of an orderly end; then it is killed
ASK_S: Final = 5.0
_OK, _ERROR = Atom("ok"), Atom("error")
_TREE: Final = ("ports", "instance_sup")
Job = Callable[[Process], Awaitable[Term]]


class Agent(GenServer):
    """The leader's hands on this machine.

    Args:
        record_path: JSON file of the groups here; it outlives this process.
    """

    def __init__(self, limits: RankLimits, *, record_path: Path) -> None:
        super().__init__()
        self._limits = limits
        self._record = GroupRecord(record_path)
        self._histories: dict[str, History] = {}

    def format_state(self) -> Term:
        return {id_: history.epoch for id_, history in self._histories.items()}

    async def init(self, me: Process) -> None:
        me.trap_exit = True  # a job that crashes is no reason to end
        self._record.read()

    async def handle_call(self, request: Term, from_: Term) -> Term:
        match request:
            case ("start", leader, int(epoch), term):
                try:
                    spec = spec_of(term)
                except ValueError as exc:
                    return (_ERROR, Atom("bad_spec"), str(exc))
                job = partial(self._start, spec)
                return self._run(self._obey(leader, epoch, job), from_, f"start {spec.id}")
            case ("stop", leader, int(epoch), id_, int() | float() as drain_s):
                name = text_of(id_)
                job = partial(self._stop, name, float(drain_s))
                return self._run(self._obey(leader, epoch, job), from_, f"stop {name}")
            case "running":
                return self._run(self._running, from_, "what runs here")
            case ("why", id_):
                return self._run(partial(self._why, text_of(id_)), from_, f"why {text_of(id_)}")
            case _:
                return await super().handle_call(request, from_)

    async def handle_info(self, message: Term) -> None:
        match message:
            case ("EXIT", _, _):
                pass  # a job has ended; it has answered
            case _:
                await super().handle_info(message)

    def _run(self, job: Job, from_: Term, label: str) -> Term:
        async def run(me: Process) -> None:
            try:
                answer = await job(me)
            except gen_server.CallError as exc:
                answer = (_ERROR, Atom("internal_error"), f"{label}: {exc}")
            gen_server.reply(me, from_, answer)

        self.me.spawn(run, link=True, label=label)
        return NOREPLY

    def _obey(self, leader: Term, epoch: int, job: Job) -> Job:
        async def checked(me: Process) -> Term:
            asked: Term = (Atom("obey"), leader, epoch)
            answer = await gen_server.call(me, Atom("election"), asked, timeout_s=ASK_S)
            return await job(me) if answer == "ok" else answer

        return checked

    # -- orders ----------------------------------------------------------------------------

    async def _start(self, spec: InstanceSpec, me: Process) -> Term:
        """Start a group; one of the same id that is another is ended first."""
        await wait_for_names(me, _TREE)
        for one in await self._groups(me):
            if one["id"] != spec.id:
                continue
            if one["spec"] == spec:
                return (_OK, one["group"])
            await self._stop(spec.id, 0.0, me)
        history = self._histories[spec.id] = History(epoch=spec.first_epoch)
        self._record.add(spec)
        child = instance_child(spec, history, self._limits)
        start: Term = (Atom("start_child"), child)
        match await gen_server.call(me, Atom("instance_sup"), start, timeout_s=START_S):
            case ("ok", Pid() as group):
                return (_OK, group)
            case other:
                text = history.last_error or show(other, 500)
                return (_ERROR, Atom("start_failed"), f"its processes did not start: {text}")

    async def _stop(self, id_: str, drain_s: float, me: Process) -> Term:
        """Let active requests finish for ``drain_s``, then end the group."""
        self._record.remove(id_)
        coordinator = me.node.whereis(id_)
        if coordinator is not None and drain_s > 0:
            # An error: it is gone, or its clients take longer than they are given.
            with contextlib.suppress(gen_server.CallError):
                await gen_server.call(me, coordinator, Atom("drain"), timeout_s=drain_s)
        group = me.node.whereis(f"{id_}_sup")
        end: Term = (Atom("terminate_child"), Atom(id_))
        try:
            await gen_server.call(me, Atom("instance_sup"), end, timeout_s=END_S)
        except gen_server.CallTimeout:
            # It waits for a port of a machine that is gone, and hears nothing meanwhile.
            if group is not None:
                monitor = me.monitor(group)
                me.exit(group, Atom("kill"))
                with contextlib.suppress(ReceiveTimeout):
                    await me.receive(
                        lambda m: True if m[:2] == ("DOWN", monitor) else None, timeout_s=END_S
                    )
        except gen_server.CallError:
            pass  # instance_sup is ending, and its children with it
        return _OK

    # -- questions -------------------------------------------------------------------------

    async def _running(self, me: Process) -> Term:
        await wait_for_names(me, _TREE)
        found: list[Term] = []
        groups = await self._groups(me)
        for one in groups:
            spec, history = one["spec"], one["history"]
            if spec is None:  # in trouble: ended here, begun anew from the desired state
                await self._stop(one["id"], 0.0, me)
                continue
            self._histories[spec.id] = history
            self._record.add(spec)
            found.append(_row(spec, one["group"], history.epoch))
        running = {one["id"] for one in groups}
        for spec in await self._former(me):
            if spec.id not in running:
                found.append(_row(spec, Atom("undefined"), spec.first_epoch))
        return (_OK, found)

    async def _former(self, me: Process) -> list[InstanceSpec]:
        """Groups of a former life of this process whose ports are still here."""
        if not self._record.former:
            return []
        ports = await gen_server.call(me, Atom("ports"), Atom("ports"), timeout_s=ASK_S)
        held = {text_of(port["instance"]) for port in ports if port["adopted"]}
        return [spec for id_, spec in self._record.former.items() if id_ in held]

    async def _groups(self, me: Process) -> list[dict[str, Any]]:
        """Each group; without a spec where its coordinator cannot say what it is."""
        children = await gen_server.call(
            me, Atom("instance_sup"), Atom("which_children"), timeout_s=START_S
        )
        found = []
        for id_, group, _, _ in children:
            if not isinstance(group, Pid):
                continue
            name = text_of(id_)
            row: dict[str, Any] = {"id": name, "group": group, "spec": None, "history": None}
            await wait_for_names(me, (name,), timeout_s=ASK_S)
            with contextlib.suppress(gen_server.CallError):
                books = await gen_server.call(me, Atom(name), Atom("books"), timeout_s=ASK_S)
                row["spec"], row["history"] = books
            found.append(row)
        return found

    async def _why(self, id_: str, me: Process) -> Term:
        """An ending supervisor answers nothing until it is gone: so either way it is found out."""
        history = self._histories.get(id_, History())
        try:
            await gen_server.call(
                me, Atom("instance_sup"), Atom("which_children"), timeout_s=START_S
            )
            alone = True
        except gen_server.CallError:
            alone = False  # it went down with all that instance_sup has
        return (
            _OK,
            {
                Atom("alone"): alone,
                Atom("exhausted"): history.exhausted(),
                Atom("epoch"): history.epoch,
                Atom("last_error"): history.last_error,
            },
        )


def _row(spec: InstanceSpec, group: Term, epoch: int) -> Term:
    return {Atom("spec"): spec_term(spec), Atom("group"): group, Atom("epoch"): epoch}


class GroupRecord:
    """Which groups are here, on disk: what is lost of it costs a reload, not more.

    Attributes:
        former: those of a former life that were not started again yet, by id.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._now: dict[str, InstanceSpec] = {}
        self.former: dict[str, InstanceSpec] = {}

    def read(self) -> None:
        """Take what a former life left."""
        try:
            terms = etf.decode(self._path.read_bytes())
            specs = [spec_of(term) for term in terms] if isinstance(terms, list) else []
            self.former = {spec.id: spec for spec in specs}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, DecodeError) as exc:
            log.warning("cannot read %s: %s; what ran here is placed anew", self._path, exc)

    def add(self, spec: InstanceSpec) -> None:
        """A group starts, or runs."""
        self.former.pop(spec.id, None)
        if self._now.get(spec.id) != spec:
            self._now[spec.id] = spec
            self._write()

    def remove(self, id_: str) -> None:
        """It ends by order."""
        self.former.pop(id_, None)
        if self._now.pop(id_, None) is not None:
            self._write()

    def _write(self) -> None:
        temporary = self._path.with_suffix(".new")
        try:
            temporary.write_bytes(etf.encode([spec_term(spec) for spec in self._now.values()]))
            temporary.replace(self._path)
        except OSError as exc:
            log.error("cannot write %s: %s", self._path, exc)
