"""Sentences that say which memory is short, with its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from control.cost_model import Stages
from control.stage_times import Group

if TYPE_CHECKING:
    from control.appraise import Appraiser

MOST_NAMED: Final = 4  # ranks in a refusal


def shortage(on: Appraiser, groups: Sequence[Group], layers: tuple[range, ...]) -> str:
    """What does not fit, with its numbers."""
    rows, count = [], on.cuts.spec.num_layers
    for number, group in enumerate(groups):
        run, what, verb = range(1), "one layer", "takes"
        if layers or len(groups) == 1:
            run = layers[number] if layers else range(count)
            what, verb = f"layers {run.start} to {run.stop}", "take"
        if len(group.seats) > 1:
            what, verb = f"its part of {what}", "takes"
        for seat, table in zip(group.seats, group.tables, strict=True):
            need = float(table.total_bytes[run.start, run.stop])
            if need > seat.free_bytes:
                rows.append(f"{seat} has {gb(seat.free_bytes)}, {what} {verb} {gb(need)}")
    if rows:
        more = f"; {len(rows) - MOST_NAMED} more" if rows[MOST_NAMED:] else ""
        return "; ".join(rows[:MOST_NAMED]) + more
    return room_text(on, tuple(group.seats for group in groups))


def room_text(on: Appraiser, stages: Stages) -> str:
    """What the model takes and what these ranks have for it."""
    seats = [seat for stage in stages for seat in stage]
    size = len(stages[0]), len(stages)
    room = sum(seat.free_bytes - on.fixed_bytes(seat, *size) for seat in seats)
    need = max(on.whole_bytes(seat) for seat in seats)
    names = ", ".join(str(seat) for seat in seats[:MOST_NAMED])
    names += f" and {len(seats) - MOST_NAMED} more" if seats[MOST_NAMED:] else ""
    text = f"weights and KV cache take {gb(need)}; {names} have {gb(max(0, room))} for them beside "
    text += "process and workspace"
    return text + (", but not in pieces that layers and heads fill" if room >= need else "")


def gb(size: float) -> str:
    """Bytes for people, as everywhere in placement."""
    return f"{size / 1e9:.2f} GB"
