"""Time that planning takes on clusters of 10 to 1,000 machines; prints a table, or JSON.

``python -m ops.bench.placement [--nodes 10,100,1000] [--model ID] [--baseline-s 10] [--json]``.
Machines are made up from a seed: of four kinds, ten to a rack, all linked with all. Beside the
planner stands the strategy that lists rings, cut off after ``--baseline-s`` seconds.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from control.cost_model import Goal, Speed
from control.placement_request import Host, Request
from control.planner import Member, Plan, Strategy, plan
from control.seats import Speeds
from control.topology import Kind, Link, Topology
from models.card import load_cards
from models.card_spec import kind_of_card, spec_of_card

GB = 10**9
CONTEXT_TOKENS = 8192
# Memory, cores, CUDA devices and their memory, speed of a device.
KINDS: tuple[tuple[int, int, tuple[int, ...], Speed], ...] = (
    (8 * GB, 4, (), Speed(5e9, 8e10)),
    (16 * GB, 8, (), Speed(1e10, 2e11)),
    (32 * GB, 16, (), Speed(1.5e10, 5e11)),
    (64 * GB, 16, (8 * GB, 8 * GB), Speed(2e11, 4e13)),
)
RACK = 10
INSIDE = Link(Kind.ETHERNET, 5e-5, 1.18e9)
BETWEEN = tuple(Link(Kind.ETHERNET, 2e-4 * 2**i, 1.18e8) for i in range(3))


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One size of cluster.

    Attributes:
        plan_s, cpu_s: medians, by the clock and by this process alone.
        considered: arrangements looked at.
        baseline: what the other strategy came to, or that it was cut off.
    """

    nodes: int
    links: int
    goal: str
    plan_s: float
    cpu_s: float
    considered: int
    chosen: str
    cost_s: float
    baseline: str


def cluster(
    num_nodes: int, *, gpus: bool = True, seed: int = 1
) -> tuple[list[Member], Topology, Speeds]:
    """Machines, their links and speeds; the same for the same arguments."""
    dice = random.Random(seed)
    members, speeds, topology = [], {}, Topology()
    for number in range(num_nodes):
        name = f"n{number:04}@rack{number // RACK:03}"
        memory, cores, cuda, speed = dice.choice(KINDS if gpus else KINDS[:3])
        busy = dice.choice((0, 0, memory // 4, memory // 2))
        host = Host(name=name, limit_bytes=memory, used_bytes=busy, cores=cores, cuda_bytes=cuda)
        members.append(Member(host=host, has_files=dice.random() < 0.1))
        for i in range(max(1, len(cuda))):
            speeds[name, f"cuda:{i}" if cuda else "cpu:0"] = speed
    for i, a in enumerate(members):
        for j, b in enumerate(members):
            if i != j:
                apart = abs(i // RACK - j // RACK)
                link = BETWEEN[min(apart.bit_length() - 1, 2)] if apart else INSIDE
                topology.set_link(a.host.name, b.host.name, link)
    return members, topology, speeds


@dataclass(frozen=True, slots=True)
class Task:
    """What is planned."""

    model: str
    goal: Goal
    gpus: bool
    num_nodes: int

    def prepare(self) -> Callable[[Strategy], Plan]:
        """All but the planning itself."""
        members, topology, speeds = cluster(self.num_nodes, gpus=self.gpus)
        card = load_cards(())[self.model]
        spec, kind = spec_of_card(card), kind_of_card(card)
        context_tokens = min(CONTEXT_TOKENS, spec.context_length)
        request = Request(model=self.model, shape=None, context_tokens=context_tokens, num_slots=4)

        def run(strategy: Strategy) -> Plan:
            return plan(
                request,
                members,
                topology,
                spec,
                None,
                speeds,
                kind=kind,
                goal=self.goal,
                strategy=strategy,
                most_visits=sys.maxsize,
            )

        return run


def measure(task: Task, *, runs: int, baseline_s: float) -> Figure:
    """Plan ``runs`` times, and once by listing all rings, in a process that can be ended."""
    run = task.prepare()
    times, cpu = [], []
    for _ in range(runs):
        begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
        found = run("cost")
        times.append(time.perf_counter() - begin_s)
        cpu.append(time.process_time() - begin_cpu_s)
    return Figure(
        nodes=task.num_nodes,
        links=task.num_nodes * (task.num_nodes - 1),
        goal=task.goal.value,
        plan_s=statistics.median(times),
        cpu_s=statistics.median(cpu),
        considered=found.num_considered,
        chosen=_shape(found),
        cost_s=_cost(found),
        baseline=_baseline(task, baseline_s) if baseline_s else "",
    )


def _baseline(task: Task, limit_s: float) -> str:
    command = [sys.executable, "-m", "ops.bench.placement", "--list-rings", "--model", task.model]
    command += ["--nodes", str(task.num_nodes), "--goal", task.goal.value]
    command += ["--gpus"] if task.gpus else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()  # machines are made up
        try:
            told, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            return f"cut off after {limit_s:.0f} s"
    return told.strip()


def _list_rings(task: Task) -> None:
    """Look at every ring there is, however long that takes."""
    run = task.prepare()
    print("ready", flush=True)
    begin_s = time.perf_counter()
    found = run("greedy")
    took_s = time.perf_counter() - begin_s
    print(f"{_shape(found)}, cost {_cost(found):.0f} s, in {1e3 * took_s:.0f} ms", flush=True)


def _shape(found: Plan) -> str:
    if found.chosen is None:
        return "none"
    shape = found.chosen.candidate.shape
    return f"{shape.tensor}x{shape.pipeline}"


def _cost(found: Plan) -> float:
    return found.chosen.estimate.cost_s if found.chosen and found.chosen.estimate else float("inf")


def main(arguments: list[str] | None = None) -> None:
    """Parse options, measure, print."""
    parser = argparse.ArgumentParser(prog="ops.bench.placement", description=__doc__)
    parser.add_argument("--nodes", default="10,30,100,300,1000", help="with commas")
    parser.add_argument("--model", default="llama-3.1-8b-instruct", help="a card's id")
    parser.add_argument("--goal", default=Goal.LATENCY.value, choices=[g.value for g in Goal])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--gpus", action="store_true", help="a quarter of the machines has two")
    parser.add_argument("--baseline-s", type=float, default=10.0, help="0 leaves it out")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--list-rings", action="store_true", help="only that, without end")
    given = parser.parse_args(arguments)
    figures = []
    for num_nodes in map(int, given.nodes.split(",")):
        task = Task(given.model, Goal(given.goal), given.gpus, num_nodes)
        if given.list_rings:
            _list_rings(task)
            continue
        figures.append(measure(task, runs=given.runs, baseline_s=given.baseline_s))
        if not given.json:
            print(
                _line(figures[-1]) if figures[1:] else f"{_HEAD}\n{_line(figures[-1])}", flush=True
            )
    if given.json and not given.list_rings:
        print(json.dumps([asdict(figure) for figure in figures], indent=1))


_HEAD = (
    f"{'machines':>8} {'links':>8} {'plan':>8} {'of CPU':>8} {'looked at':>9} {'chosen':>7} "
    f"{'cost':>9}   by listing rings"
)


def _line(one: Figure) -> str:
    return (
        f"{one.nodes:8} {one.links:8} {1e3 * one.plan_s:5.0f} ms {1e3 * one.cpu_s:5.0f} ms "
        f"{one.considered:9} {one.chosen:>7} {one.cost_s:7.0f} s   {one.baseline}"
    )


if __name__ == "__main__":
    main()
