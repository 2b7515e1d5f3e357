"""What ranks remember of their last operations, and what the records tell when they are put together."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import gradwire
import numpy
import pytest
from gradwire import trace
from gradwire.unmatched import unmatched
from ranks import Ranks, run


def goes_astray(rank: int, size: int, url: str, wire: str, folder: str, how: str) -> None:
    os.environ["GRADWIRE_TRACE"] = folder
    group = gradwire.Communicator(url, rank=rank, world_size=size, transport=wire, timeout_s=60)
    for _ in range(3):
        group.all_reduce(numpy.ones(10, "float32"))
    with pytest.raises(gradwire.GradwireError):
        if rank == 1 and how == "differs":
            group.all_reduce(numpy.ones(10, "float32"), "max")
        elif rank == 1 and how == "does not come":
            group.recv(numpy.zeros(1), 0, timeout_s=30)
        else:
            group.all_reduce(numpy.ones(10, "float32"), timeout_s=0.5 if how == "does not come" else None)


@pytest.mark.parametrize("wire", ["shm", "tcp"])
@pytest.mark.parametrize("how", ["differs", "does not come"])
def test_the_records_of_a_failed_group_name_the_rank_that_went_astray(how: str, wire: str, tmp_path: pathlib.Path) -> None:
    run(3, goes_astray, wire, str(tmp_path), how)
    timeline = tmp_path / "out" / "timeline.json"
    timeline.parent.mkdir()
    command = [sys.executable, "-m", "gradwire", "trace", "merge", str(tmp_path), "--chrome", str(timeline)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert text.startswith("group world: rank 1 (host ")
    if how == "differs":
        assert "called all_reduce max of 10 float32 as number 3, where the others called all_reduce sum" in text
    else:
        assert "did not come to number 3, all_reduce sum of 10 float32; its last was number 2" in text
    assert "rank 0 says: " in text
    events = json.loads(timeline.read_text())["traceEvents"]
    assert sum(event["ph"] == "X" and event["cat"] == "collective" for event in events) >= 11
    assert {event["args"]["name"].split(" (")[0] for event in events if event["name"] == "process_name"} == {
        f"rank {rank}" for rank in range(3)
    }


def works_until_killed(rank: int, size: int, url: str, folder: str) -> None:
    os.environ["GRADWIRE_TRACE"] = folder
    group = gradwire.Communicator(url, rank=rank, world_size=size, timeout_s=60)
    group.all_reduce(numpy.ones(10))
    pathlib.Path(folder, f"at-work.{rank}").touch()
    with pytest.raises(gradwire.RankFailedError):
        while True:
            group.all_reduce(numpy.ones(10))


def test_a_killed_rank_leaves_no_record_and_is_named_for_it(tmp_path: pathlib.Path) -> None:
    ranks = Ranks(3, works_until_killed, str(tmp_path))
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("at-work.*"))) < 3:
        assert time.monotonic() < deadline, "the ranks did not meet"
        time.sleep(0.01)
    ranks.kill(2)
    ranks.results(but=2)
    records = trace.read([str(tmp_path)])["world"]
    assert sorted(records) == [0, 1]
    text = trace.diverged(records)
    assert text.startswith("rank 2 (host ") and f"pid {ranks.processes[2].pid}" in text


def remembers(rank: int, size: int, url: str) -> Any:
    group = gradwire.Communicator(url, rank=rank, world_size=size, timeout_s=60)
    for _ in range(1500):
        group.barrier()
    if rank == 0:
        group.send(numpy.ones(3, "uint8"), 1, tag=5)
    else:
        group.recv(numpy.zeros(3, "uint8"), 0, tag=5)
    told = json.loads(group.trace())
    group.close()
    return told


def test_the_last_operations_are_remembered_and_no_more() -> None:
    for rank, told in enumerate(run(2, remembers)):
        assert (told["rank"], told["verdict"], len(told["records"])) == (rank, None, 1024)
        *barriers, message = told["records"]
        assert [one["number"] for one in barriers] == list(range(1500 - 1023, 1500))
        assert all(one["well"] and one["called_us"] <= one["ended_us"] <= told["taken_us"] for one in told["records"])
        assert message["call"] == ["send of 3 bytes to rank 1", "recv of 3 bytes from rank 0"][rank]
        assert abs(told["taken_us"] / 1e6 - time.time()) < 600


def hangs(rank: int, size: int, url: str, wire: str, folder: str) -> float:
    os.environ["GRADWIRE_TRACE"], os.environ["GRADWIRE_TRACE_SIGNAL"] = folder, "usr2"
    group = gradwire.Communicator(url, rank=rank, world_size=size, transport=wire, timeout_s=60)
    for _ in range(3):
        group.all_reduce(numpy.ones(10, "float32"))
    pathlib.Path(folder, f"at-work.{rank}").touch()
    while rank == 1 and not pathlib.Path(folder, "go").exists():
        time.sleep(0.01)
    last = numpy.ones(10, "float32")
    group.all_reduce(last)
    group.close()
    return float(last.sum())


@pytest.mark.parametrize("wire", ["auto", "tcp"])
def test_a_rank_that_hangs_writes_its_record_on_a_signal_and_goes_on(wire: str, tmp_path: pathlib.Path) -> None:
    ranks = Ranks(2, hangs, wire, str(tmp_path))
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("at-work.*"))) < 2:
        assert time.monotonic() < deadline, "the ranks did not meet"
        time.sleep(0.01)

    def last_of(rank: int, number: int) -> dict[str, Any]:
        """The record of `rank`, once its last call is `number`."""
        while True:
            os.kill(ranks.processes[rank].pid, signal.SIGUSR2)
            time.sleep(0.05)
            records = trace.read([str(tmp_path)]).get("world", {})
            if rank in records and records[rank]["records"][-1]["number"] == number:
                return dict(records[rank]["records"][-1])
            assert time.monotonic() < deadline, f"rank {rank} wrote no record of number {number}"

    assert last_of(0, 3)["ended_us"] is None, "it hangs"
    text = trace.diverged(trace.read([str(tmp_path)])["world"])
    assert text.startswith("rank 1 (host ") and "has left no record; number 3, all_reduce sum of 10 float32" in text
    assert last_of(1, 2)["well"]
    command = [sys.executable, "-m", "gradwire", "trace", "merge", str(tmp_path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert text.startswith("group world: rank 1 (host ")
    assert "did not come to number 3, all_reduce sum of 10 float32; its last was number 2" in text
    (tmp_path / "go").touch()
    assert ranks.results() == [20.0, 20.0]


def calls(way: str, peer: int | None, *messages: tuple[int, int | None, bool | None], tag: int = 7) -> list[dict[str, Any]]:
    """Records of sends or receives: bytes, when each ended, and whether well; the n-th is called at n."""
    return [
        {"kind": "message", "number": tag, "way": way, "peer": peer, "bytes": bytes, "called_us": at, "ended_us": ended, "well": well}
        for at, (bytes, ended, well) in enumerate(messages)
    ]


def test_sends_and_receives_that_met_nothing_are_named() -> None:
    def told(first: list[dict[str, Any]], second: list[dict[str, Any]], forgotten: int = 0) -> list[str]:
        return unmatched({0: {"records": first}, 1: {"records": second, "forgotten": forgotten}})

    sent, got, hangs, late = (8, 5, True), (8, 9, True), (8, None, None), (8, 1, False)
    assert told(calls("send", 1, sent, sent), calls("recv", 0, got, got)) == []
    never = "rank 1 waits for 8 bytes from rank 0 with tag 7, which that one never sent"
    assert told(calls("send", 1, sent), calls("recv", 0, got, hangs)) == [never + "."]
    assert told([], calls("recv", 0, hangs, hangs)) == [never + "; and 1 more."]
    assert told(calls("send", 1, sent, tag=6), calls("recv", 0, hangs)) == [
        "rank 0 sent 8 bytes to rank 1 with tag 6, for which that one has no receive.",
        never + ".",
    ]
    # One that gave up before it was sent takes nothing; the next one has it.
    assert told([{**calls("send", 1, sent)[0], "called_us": 4}], calls("recv", 0, late, got)) == []
    longer = "rank 1 awaits 8 bytes from rank 0 with tag 7, which sent 16."
    assert told(calls("send", 1, (16, 5, False), sent), calls("recv", 0, (8, 9, False), got)) == [longer]
    assert told(calls("send", 1, sent), calls("recv", 0, got, hangs), forgotten=3) == [
        "rank 1 waits for 8 bytes from rank 0 with tag 7; whether it has met its other end is not known."
    ]
    assert unmatched({1: {"records": calls("recv", 0, hangs)}}) == [
        "rank 1 waits for 8 bytes from rank 0 with tag 7; no record of rank 0."
    ]
    assert told([], calls("recv", None, hangs)) == ["rank 1 waits for 8 bytes of any rank with tag 7, and none came."]
    assert told(calls("send", 1, sent), calls("recv", None, got)) == []


def waits_in_vain(rank: int, size: int, url: str, folder: str) -> None:
    os.environ["GRADWIRE_TRACE"] = folder
    group = gradwire.Communicator(url, rank=rank, world_size=size, timeout_s=60)
    group.barrier()
    if rank == 0:
        group.send(numpy.ones(1, "uint8"), 1, tag=6)
    else:
        with pytest.raises(gradwire.GradwireError):
            group.recv(numpy.zeros(1), 0, tag=7, timeout_s=0.3)
    group.barrier()
    pathlib.Path(folder, f"{rank}.json").write_text(group.trace())
    group.close()


def test_who_waits_for_what_was_never_sent_is_named_with_peer_and_tag(tmp_path: pathlib.Path, capsys: Any) -> None:
    run(2, waits_in_vain, str(tmp_path))
    assert trace.main(["merge", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "group world: no rank diverged in numbers 0 to 1.",
        "  rank 0 sent 1 bytes to rank 1 with tag 6, for which that one has no receive.",
        "  rank 1 waits for 8 bytes from rank 0 with tag 7, which that one never sent.",
    ]


def caught_signals(rank: int, size: int, url: str) -> list[bool]:
    def is_caught(number: int) -> bool:
        caught = pathlib.Path("/proc/self/status").read_text().split("SigCgt:")[1].split()[0]
        return bool(int(caught, 16) >> (number - 1) & 1)

    found = []
    for name in ["", "10"]:
        os.environ["GRADWIRE_TRACE_SIGNAL"], os.environ["GRADWIRE_TRACE"] = name, "/nowhere"
        gradwire.Communicator(f"{url}/{name}", rank=rank, world_size=size, timeout_s=60).close()
        found.append(is_caught(signal.SIGUSR1))
    return found


def test_signals_are_caught_only_where_one_was_given(monkeypatch: Any, tmp_path: pathlib.Path) -> None:
    assert run(1, caught_signals) == [[False, True]]
    monkeypatch.setenv("GRADWIRE_TRACE_SIGNAL", "USR2")
    with pytest.raises(ValueError, match="set GRADWIRE_TRACE, too"):
        gradwire.Communicator(f"file://{tmp_path}", rank=0, world_size=1)
    monkeypatch.setenv("GRADWIRE_TRACE", str(tmp_path))
    for refused in ["KILL", "9", "SIGSTOP", "SEGV", "TERM", "nonsense", "0", "-12", "SIGSIGUSR"]:
        monkeypatch.setenv("GRADWIRE_TRACE_SIGNAL", refused)
        with pytest.raises(ValueError, match=f"GRADWIRE_TRACE_SIGNAL: `{refused}` is not a signal .* USR2 .12."):
            gradwire.Communicator(f"file://{tmp_path}", rank=0, world_size=1)


def test_what_is_no_record_is_refused(tmp_path: pathlib.Path, capsys: Any) -> None:
    (tmp_path / "odd.json").write_text("{}")
    assert trace.main(["merge", str(tmp_path)]) == 2
    assert "odd.json: not a record" in capsys.readouterr().err
