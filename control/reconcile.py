"""After a restart of the scheduler: what runs, compared with what should. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from bridge.term import Pid
from control.books import Record
from control.desired import Desired, Wanted
from control.instance import History
from control.instance_spec import InstanceSpec

Running = tuple[InstanceSpec, Pid, History]  # with the pid of its group's supervisor


def reconcile(
    running: Sequence[Running], desired: Desired
) -> tuple[list[tuple[Record, Pid]], list[Record]]:
    """Compare.

    What runs and is not wanted was brought up by a request, and goes on until it is unloaded.

    Returns:
        Records of what runs, each with its group; records of what is to be brought up.
    """
    wanted_of = {wanted.id: wanted for wanted in desired.wanted}
    kept = [
        (
            Record(
                spec.id,
                spec.model,
                wanted_of.get(spec.id) or Wanted(spec.id, spec.model),
                on_demand=spec.id not in wanted_of,
                state="recovering",
                ever_ready=True,
                spec=spec,
                history=history,
            ),
            group,
        )
        for spec, group, history in running
    ]
    found = {spec.id for spec, _, _ in running}
    missing = [
        Record(wanted.id, wanted.model, wanted, ever_ready=True)
        for wanted in desired.wanted
        if wanted.id not in found
    ]
    return kept, missing
