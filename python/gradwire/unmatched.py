"""Which sends and receives of a group met nothing, or something of another length, by the records of its ranks."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

#: A send or a receive, as a record has it.
_Call = dict[str, Any]
#: Who sends, who receives, and with which tag.
_Way = tuple[int, int, int]


def unmatched(records: Mapping[int, dict[str, Any]]) -> list[str]:
    """A line for each sender, receiver and tag of which something met nothing, or another length; by the records of these ranks.

    Messages of a sender, a receiver and a tag meet in the order of their calls. Where a rank has forgotten some of its calls, or
    receives from any rank, what met what is not known, and only what has not ended is told of.
    """
    sends: dict[_Way, list[_Call]] = collections.defaultdict(list)
    receives: dict[_Way, list[_Call]] = collections.defaultdict(list)
    from_any: set[tuple[int, int]] = set()
    lines = []
    for rank, record in sorted(records.items()):
        for call in record["records"]:
            tag, peer = call["number"], call.get("peer")
            if call.get("way") == "send":
                sends[rank, peer, tag].append(call)
            elif call.get("way") == "recv" and peer is not None:
                receives[peer, rank, tag].append(call)
            elif call.get("way") == "recv":
                from_any.add((rank, tag))
                if not call["well"]:
                    lines.append(f"rank {rank} waits for {call['bytes']} bytes of any rank with tag {tag}, and none came.")
    for way in sorted(sends.keys() | receives.keys()):
        sender, receiver, tag = way
        gone = [rank for rank in (sender, receiver) if rank not in records]
        known = not gone and not any(records[rank].get("forgotten") for rank in (sender, receiver))
        if known and (receiver, tag) not in from_any:
            lines += _compared(way, sends[way], receives[way])
        else:
            lines += _open(way, sends[way], receives[way], gone)
    return lines


def _compared(way: _Way, sent: Sequence[_Call], received: Sequence[_Call]) -> Iterator[str]:
    """What is wrong where all calls of both ends are known: the first of each kind, and how many there are."""
    sender, receiver, tag = way
    at = 0
    never, other = [], []
    for call in received:
        message = sent[at] if at < len(sent) else None
        gave_up = call["ended_us"] is not None and message is not None and call["ended_us"] < message["called_us"]
        if message is None or (not call["well"] and gave_up):
            # One that gave up takes nothing with it; it is told of only where nothing came for it.
            if message is None and not call["well"]:
                never.append(call)
            continue
        at += 1
        if message["bytes"] != call["bytes"]:
            other.append((message, call))
    if other:
        message, call = other[0]
        text = f"rank {receiver} awaits {call['bytes']} bytes from rank {sender} with tag {tag}, which sent {message['bytes']}"
        yield text + _more(len(other) - 1)
    if never:
        text = f"rank {receiver} waits for {never[0]['bytes']} bytes from rank {sender} with tag {tag}, which that one never sent"
        yield text + _more(len(never) - 1)
    if left := sent[at:]:
        text = f"rank {sender} sent {left[0]['bytes']} bytes to rank {receiver} with tag {tag}, for which that one has no receive"
        yield text + _more(len(left) - 1)


def _open(way: _Way, sent: Sequence[_Call], received: Sequence[_Call], gone: Sequence[int]) -> Iterator[str]:
    """What has not ended well, where it is not known what met what."""
    sender, receiver, tag = way
    why = f"; no record of rank {gone[0]}" if gone else "; whether it has met its other end is not known"
    for calls, words in [
        (received, f"rank {receiver} waits for {{}} bytes from rank {sender} with tag {tag}"),
        (sent, f"rank {sender} sends {{}} bytes to rank {receiver} with tag {tag}"),
    ]:
        if left := [call for call in calls if not call["well"]]:
            yield words.format(left[0]["bytes"]) + why + _more(len(left) - 1)


def _more(count: int) -> str:
    return f"; and {count} more." if count else "."
