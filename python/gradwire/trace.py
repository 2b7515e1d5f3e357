"""Puts the records of all ranks of a group together: who was first to do something else, or nothing; which sends and receives met
nothing.

    gradwire trace merge FOLDER_OR_FILES... [--chrome timeline.json]

A rank writes its record where GRADWIRE_TRACE says when its group fails, or when `trace()` of a communicator or backend is called
and the text is saved. The timeline opens in Chrome (chrome://tracing) and Perfetto. Clocks of several hosts are taken as they
are: compare times across hosts only as far as their clocks agree.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from .unmatched import unmatched

#: The record of one rank, as the engine writes it.
Record = dict[str, Any]
#: Lines about sends and receives of a group, at most.
_MOST_LINES = 20
#: Ranks that came later than this are told of, though nothing else is wrong.
_LATE_US = 1_000_000


def read(paths: Iterable[str]) -> dict[str, dict[int, Record]]:
    """The records in files and folders, by group and rank; of several of one rank, the last one taken.

    Raises:
        ValueError: a file that is no record; the message names it.
    """
    groups: dict[str, dict[int, Record]] = {}
    for path in map(pathlib.Path, paths):
        for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
            try:
                record = json.loads(file.read_text(encoding="utf-8"))
                group, rank = groups.setdefault(record["group"], {}), record["rank"]
                if record["version"] != 1:
                    raise ValueError(f"version {record['version']}, and this reads version 1: upgrade gradwire")
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{file}: not a record of a rank ({error})") from error
            if rank not in group or group[rank]["taken_us"] <= record["taken_us"]:
                group[rank] = record
    return groups


def diverged(records: Mapping[int, Record]) -> str:
    """Which rank of a group was the first to do something else than the others, to come to nothing, or to be late, in words."""
    (first, *_) = records.values()
    members = first["members"]

    def named(rank: int) -> str:
        return f"rank {rank} (host {members[rank]['host']}, pid {members[rank]['pid']})"

    calls = {rank: _collectives(record) for rank, record in records.items()}
    silent = [rank for rank in range(len(members)) if rank not in records]
    silence = f" No record of {', '.join(map(named, silent))}." if silent else ""
    oldest = max((min(numbers, default=0) for numbers in calls.values()), default=0)
    newest = max((max(numbers, default=-1) for numbers in calls.values()), default=-1)
    for number in range(oldest, newest + 1):
        here = {rank: numbers[number] for rank, numbers in calls.items() if number in numbers}
        words = collections.Counter(call["call"] for call in here.values())
        # As the engine has it: most are right, and at a tie the lowest rank.
        expected = max(words, key=lambda call: words[call])
        other = [rank for rank, call in sorted(here.items()) if call["call"] != expected]
        if other:
            got = here[other[0]]["call"]
            return f"{named(other[0])} called {got} as number {number}, where the others called {expected}.{silence}"
        absent = [rank for rank in sorted(records) if rank not in here]
        if absent:
            last = max(calls[absent[0]], default=None)
            before = "no call at all" if last is None else f"number {last}, {calls[absent[0]][last]['call']}"
            return f"{named(absent[0])} did not come to number {number}, {expected}; its last was {before}.{silence}"
        if silent and not all(call["well"] for call in here.values()):
            return f"{named(silent[0])} has left no record; number {number}, {expected}, did not end well without it."
        open_ = [rank for rank, call in sorted(here.items()) if not call["well"]]
        if open_:
            state = "failed" if here[open_[0]]["ended_us"] else "has not ended"
            return f"number {number}, {expected}, {state} on {', '.join(map(named, open_))}, and all had come to it.{silence}"
        came = sorted(here, key=lambda rank: here[rank]["called_us"])
        late_us = here[came[-1]]["called_us"] - here[came[0]]["called_us"]
        if late_us > _LATE_US:
            return f"{named(came[-1])} came to number {number}, {expected}, {late_us / 1e6:.3f} s after {named(came[0])}.{silence}"
    return f"no rank diverged in numbers {oldest} to {newest}.{silence}"


def timeline(groups: Mapping[str, Mapping[int, Record]]) -> dict[str, Any]:
    """The operations of all ranks as events of Chrome's trace format: a process for each rank, a row for each group."""
    calls = [call for records in groups.values() for record in records.values() for call in record["records"]]
    start = min((call["called_us"] for call in calls), default=0)
    events: list[dict[str, Any]] = []
    for row, (group, records) in enumerate(sorted(groups.items())):
        for rank, record in sorted(records.items()):
            member = record["members"][rank]
            label = f"rank {rank} (host {member['host']}, pid {member['pid']})"
            events.append({"ph": "M", "name": "process_name", "pid": member["pid"], "args": {"name": label}})
            events.append({"ph": "M", "name": "thread_name", "pid": member["pid"], "tid": row, "args": {"name": group}})
            for call in record["records"]:
                ended = call["ended_us"] or record["taken_us"]
                events.append(
                    {
                        "ph": "X",
                        "name": call["call"],
                        "cat": call["kind"],
                        "ts": call["called_us"] - start,
                        "dur": max(ended - call["called_us"], 0),
                        "pid": member["pid"],
                        "tid": row,
                        "args": {"number": call["number"], "well": call["well"], "group": group},
                    }
                )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _collectives(record: Record) -> dict[int, dict[str, Any]]:
    return {call["number"]: call for call in record["records"] if call["kind"] == "collective"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="gradwire trace", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    merge = commands.add_parser("merge", help="name the first rank that diverged")
    merge.add_argument("paths", nargs="+", help="records, or folders of them")
    merge.add_argument("--chrome", metavar="FILE", help="write a timeline for Chrome and Perfetto")
    given = parser.parse_args(arguments)
    try:
        groups = read(given.paths)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not groups:
        print(f"error: no records in {', '.join(given.paths)}", file=sys.stderr)
        return 2
    for group, records in sorted(groups.items()):
        print(f"group {group}: {diverged(records)}")
        lines = unmatched(records)
        for line in lines[:_MOST_LINES]:
            print(f"  {line}")
        if len(lines) > _MOST_LINES:
            print(f"  Of {len(lines) - _MOST_LINES} other senders, receivers and tags, too, something met nothing.")
        for rank, record in sorted(records.items()):
            if record["verdict"]:
                print(f"  rank {rank} says: {record['verdict']}")
    if given.chrome:
        pathlib.Path(given.chrome).write_text(json.dumps(timeline(groups)), encoding="utf-8")
        print(f"timeline: {given.chrome}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
