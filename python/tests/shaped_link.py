"""Runs `gradwire-bench many-to-one --shape` and `scripts/netns-cluster` for real, and holds what they tell to the link that they made.

Needs root (network namespaces) and `target/release/gradwire-bench`, which `scripts/setup` builds. Ends with "N passed, N failed".
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
BENCH = ROOT / "target" / "release" / "gradwire-bench"
CLUSTER = ROOT / "scripts" / "netns-cluster"
SENDERS = 3
#: Bytes of the switch's buffer, `32kb` in tc's words.
BUFFER = 32 << 10


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120, check=False)


def many_to_one() -> None:
    """The share of the link, what the switch dropped and queued, and each sender's part, with and without credit."""
    flags = ["--senders", SENDERS, "--bytes", 20000, "--seconds", 2, "--warm-up", 0.3, "--cc", "none,credit", "--json"]
    ran = run(BENCH, "many-to-one", "--shape", "100mbit:32kb", *flags)
    assert ran.returncode == 0, ran.stderr
    rows: list[dict[str, Any]] = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [row["cc"] for row in rows] == ["none", "credit"]
    for row in rows:
        # More than the link carries would be a link that is not shaped, less than half of it one that something else holds up.
        assert 0.5 < row["share_of_link"] <= row["most_share_of_link"] * 1.02, row
        assert abs(row["goodput_gb_per_s"] - row["share_of_link"] * 0.0125) < 1e-9, row
        assert 0 < row["switch"]["queue_p50_bytes"] <= row["switch"]["queue_p99_bytes"] <= BUFFER, row
        assert [sender["rank"] for sender in row["per_sender"]] == [1, 2, 3], row
        assert sum(sender["retransmits"] for sender in row["per_sender"]) == row["retransmits"], row
        # A dropped packet is one that TCP sends again, at the latest after the last count.
        assert row["switch"]["dropped"] > 0 or row["retransmits"] == 0, row
        assert row["segments"] * 1448 > row["goodput_gb_per_s"] * 1e9 * row["seconds"] * 0.9, row


def hosts_have_addresses_of_their_own() -> None:
    """Each rank of a cluster has its own address, and reaches the others by it."""
    told = run(CLUSTER, "-n", SENDERS, "--plain", "--", "sh", "-c", "echo $CLUSTER_RANK $CLUSTER_IP $CLUSTER_SIZE $CLUSTER_HOSTS")
    assert told.returncode == 0, told.stderr
    hosts = [f"10.78.0.{rank + 1}" for rank in range(SENDERS)]
    expected = {f"{rank} {host} {SENDERS} {','.join(hosts)}" for rank, host in enumerate(hosts)}
    assert set(told.stdout.splitlines()) == expected, told.stdout


def endings_are_told_by_the_status() -> None:
    """The first rank's status that is not 0, 124 for one that takes too long, 2 for an option that there is not."""
    assert run(CLUSTER, "-n", 2, "--", "sh", "-c", "exit $((CLUSTER_RANK * 7))").returncode == 7
    assert run(CLUSTER, "-n", 2, "-t", 1, "--", "sleep", 30).returncode == 124
    assert run(CLUSTER, "--nonsense").returncode == 2
    assert "10.78.0" not in run("ip", "-o", "address").stdout


def main() -> int:
    failed = 0
    checks = [many_to_one, hosts_have_addresses_of_their_own, endings_are_told_by_the_status]
    for check in checks:
        try:
            check()
        except (AssertionError, subprocess.TimeoutExpired) as error:
            failed += 1
            print(f"{check.__name__}: {error}")
    print(f"{len(checks) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
