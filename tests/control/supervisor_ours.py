"""Runs a supervisor script on ours: ``supervisor_oracle.py``'s driver again, in Python."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable
from typing import Any

from bridge import gen_server
from bridge.node import Node
from bridge.process import Process
from bridge.process_errors import CallError, Exit, ReceiveTimeout, StartError
from bridge.term import Atom, Pid, Ref, Term
from control import supervisor
from control.spec import IGNORE, AutoShutdown, ChildSpec, ChildType, Restart, Strategy, SupSpec

A = Atom
TIMEOUT_S = 20.0  # far beyond what a script takes: only a hang runs into it


async def run_on_ours(script: Term) -> Term:
    """As ``run_on_otp``."""
    run = _Run()
    log, crashes = logging.getLogger("control.supervisor"), logging.getLogger("bridge.process")
    log.addHandler(run)
    log.propagate = False
    crashes.disabled = True  # the scripts are made of crashes
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await run.script(script)
    finally:
        log.propagate = True
        crashes.disabled = False
        log.removeHandler(run)


class _Run(logging.Handler):
    """One script: the collector, the start functions, and the driver."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.node = Node("ours@127.0.0.1", "cookie")
        self.collector = self.node.open_process(label="collector")
        self.attempts: Counter[int] = Counter()
        self.known: list[Pid] = []
        self.labels: dict[Pid, Term] = {}
        self.calls: list[asyncio.Task[Term]] = []

    # --- the log: one mailbox, so that ends and everything else keep their order

    def log(self, event: Term) -> None:
        self.collector.send(self.collector.pid, event)

    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, Any] = vars(record)
        offender = dict(fields["offender"])
        place = (A("pid"), offender[A("pid")]) if A("pid") in offender else False
        event = (A("report"), A(fields["errorContext"]), fields["reason"], offender[A("id")], place)
        self.log(event)

    async def events(self) -> list[Term]:
        events: list[Term] = []
        while True:
            try:
                event = await self.collector.receive(timeout_s=0)
            except ReceiveTimeout:
                return events
            match event:
                case (Atom("DOWN"), Ref(), _, pid, reason):
                    events.append((A("stop"), pid, reason))
                case _:
                    events.append(event)

    # --- children

    def spec(self, plan: dict[Term, Any], *, template: bool = False) -> ChildSpec:
        given = {str(key): value for key, value in plan[A("spec")].items()}
        shutdown = given.get("shutdown")
        if isinstance(shutdown, int):
            shutdown = shutdown / 1000

        async def start(me: Process, *args: Any) -> Any:
            return await self.start(me, args[0] if template else plan)

        return ChildSpec(
            id=given["id"],
            start=start,
            restart=Restart(given["restart"]),
            significant=given.get("significant", False),
            shutdown_s=shutdown,
            type=ChildType(given.get("type", "worker")),
            modules=given.get("modules"),
            mfa=("erlang", "apply", []),
        )

    async def start(self, me: Process, plan: dict[Term, Any]) -> Any:
        key, starts = plan[A("key")], plan[A("starts")]
        nth = self.attempts[key]
        self.attempts[key] += 1
        self.log((A("start"), key, nth))
        outcome = starts[nth] if nth < len(starts) else A("ok")
        while outcome[0] in ("call", "crash"):
            match outcome:
                case (Atom("call"), request, then):
                    resolved = self.resolve(request)
                    self.calls.append(asyncio.create_task(self.call(me.pid, resolved)))
                    await asyncio.sleep(0)  # its first step puts the request into our mailbox
                    outcome = then
                case (Atom("crash"), number, reason, then):
                    with self.node.open_process(label="crasher") as crasher:
                        await self.end(crasher, number, (A("crash"), reason))
                    outcome = then
        match outcome:
            case Atom("ignore"):
                return IGNORE
            case (Atom("error"), reason):
                raise StartError(reason)
            case (Atom("exit"), reason):
                raise Exit(reason)
        pid = await self.child(me, plan[A("behaviour")])
        self.collector.monitor(pid)
        self.labels[pid] = (A("pid"), key, len(self.known))
        self.known.append(pid)
        return pid if outcome == "ok" else (pid, A("info"))

    async def child(self, parent: Process, behaviour: Term) -> Pid:
        ready = asyncio.Event()

        async def body(me: Process) -> None:
            me.trap_exit = behaviour != "plain"
            ready.set()
            while True:
                match await me.receive():
                    case (Atom("crash"), reason):
                        raise Exit(reason)
                    case (Atom("EXIT"), _, reason) if behaviour != "stubborn":
                        raise Exit(reason if behaviour[1] == "same" else behaviour[1])

        pid = parent.spawn(body, link=True)
        await ready.wait()
        return pid

    # --- the driver

    def pick(self, number: int, among: list[Pid]) -> Term:
        return among[number % len(among)] if among else A("none")

    def alive(self) -> list[Pid]:
        return [pid for pid in self.known if self.node.process(pid) is not None]

    def resolve(self, request: Term) -> Term:
        match request:
            case (Atom("start_child"), plan):
                return A("start_child"), self.spec(plan)
            case (Atom("start_simple"), plan):
                return A("start_child"), [plan]
            case (Atom("terminate_known"), number):
                return A("terminate_child"), self.pick(number, self.known)
            case (Atom("get_known"), number):
                return A("get_childspec"), self.pick(number, self.known)
            case (Atom("which_known"), number):
                return A("which_child"), self.pick(number, self.known)
        return request

    async def call(self, dest: Pid, request: Term) -> Term:
        with self.node.open_process(label="caller") as me:
            return await _outcome(gen_server.call(me, dest, request, timeout_s=TIMEOUT_S))

    async def script(self, script: Term) -> Term:
        flags, plans, ops = script
        simple = flags[A("strategy")] == Strategy.SIMPLE_ONE_FOR_ONE
        spec = SupSpec(
            strategy=Strategy(flags[A("strategy")]),
            intensity=flags[A("intensity")],
            period_s=flags[A("period")],
            auto_shutdown=AutoShutdown(flags[A("auto_shutdown")]),
            children=tuple(self.spec(plan, template=simple) for plan in plans),
        )
        with self.node.open_process(label="driver") as me:
            me.trap_exit = True
            try:
                sup = await supervisor.start_link(me, spec)
            except StartError as exc:
                self.log((A("not_started"), exc.reason))
            else:
                await self.drive(me, sup, [*ops, (A("stop"), A("shutdown"))])
            replies = [*enumerate([await call for call in self.calls])]
            return self.norm(await self.events()), self.norm(replies)

    async def drive(self, me: Process, sup: Pid, ops: list[Term]) -> None:
        alive = await self.settle(me, sup)
        for op in ops:
            if not alive:
                return
            self.log(A("op"))
            answer = await self.perform(me, sup, op)
            alive = await self.settle(me, sup)
            if answer is not None:  # not before: the supervisor goes on meanwhile
                self.log(answer)

    async def perform(self, me: Process, sup: Pid, op: Term) -> Term | None:
        match op:
            case (Atom("stop"), reason):
                me.exit(sup, reason)
            case (Atom("call"), request):
                asked = gen_server.call(me, sup, self.resolve(request), timeout_s=TIMEOUT_S)
                return await _outcome(asked)
            case (_, number, *_):
                await self.end(me, number, op)
        return None

    async def end(self, me: Process, number: int, how: Term) -> None:
        """``{kill, _}`` or ``{crash, ..., R}`` a living child; returns once all know of it."""
        pid = self.pick(number, self.alive())
        if not isinstance(pid, Pid):
            return
        watch = me.monitor(pid)
        if how[0] == "kill":
            me.exit(pid, A("kill"))
        else:
            me.send(pid, (A("crash"), how[-1]))
        await me.receive(lambda m: True if m[0] == "DOWN" and m[1] == watch else None)

    async def settle(self, me: Process, sup: Pid) -> bool:
        """Until no restart and no call is under way; whether the supervisor lives."""
        while True:
            before = self.activity()
            try:
                children = await supervisor.which_children(me, sup, timeout_s=TIMEOUT_S)
            except CallError:
                why = await me.receive(
                    lambda m: (m[2],) if m[0] == "EXIT" and m[1] == sup else None,
                    timeout_s=TIMEOUT_S,
                )
                self.log((A("ended"), *why))
                return False
            made, answered, _ = after = self.activity()
            quiet = before == after and made == answered
            if quiet and all(child[1] != "restarting" for child in children):
                self.log((A("settled"), children))
                return True
            await asyncio.sleep(0)

    def activity(self) -> tuple[int, int, int]:
        """Calls made during starts, those answered, and how long the log is."""
        answered = sum(call.done() for call in self.calls)
        return len(self.calls), answered, self.collector.mailbox_length

    def norm(self, term: Term) -> Term:
        match term:
            case Pid():
                return self.labels.get(term, A("stranger"))
            case (Atom("erlang"), Atom("apply"), args):
                return A("mfa"), isinstance(args, list)
            case tuple():
                return tuple(self.norm(item) for item in term)
            case list():
                return [self.norm(item) for item in term]
            case dict():
                return {key: self.norm(value) for key, value in term.items()}
        return term


async def _outcome(call: Awaitable[Term]) -> tuple[Atom, Term]:
    try:
        return A("reply"), await call
    except CallError as exc:
        return A("exit"), exc.why
