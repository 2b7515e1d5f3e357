"""What `gradwire-bench verbs` tells and draws of devices that are there: soft-RoCE, in one guest and between two. Run on the host by
scripts/softroce-test."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

#: The measuring program, built by scripts/softroce-test.
BENCH = os.environ["GRADWIRE_BENCH"]
VM = str(Path(__file__).parents[3] / "scripts/softroce-vm")
#: In the first of two guests the end that waits, in the second the one that measures, with what follows.
TWO_ENDS = """
address=${SOFTROCE_HOSTS%%,*}:7200
if [ "$SOFTROCE_RANK" = 0 ]; then exec "$0" verbs --listen "$address"; fi
exec "$0" verbs --connect "$address" "$@"
"""


def test_verbs_tells_of_each_path_and_size_and_draws_them_as_soft_roce(tmp_path: Path) -> None:
    report = tmp_path / "report"
    run = [BENCH, "verbs", "--max-bytes", "512", "--step", "64", "--rounds", "50", "--json", "--report", str(report)]
    guest = [VM, "-t", "200", "--share", str(tmp_path), "--"]
    ended = subprocess.run([*guest, *run, "--progress", "0.01"], capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr
    # A guest has one output.
    told = ended.stdout + ended.stderr
    rows = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    paths = ("write", "write-with-imm", "message")
    assert [(row["path"], row["bytes"]) for row in rows] == [(path, size) for path in paths for size in (8, 512)]
    for row in rows:
        assert (row["wire"], row["ranks"], row["dtype"]) == ("verbs", 2, "bytes") and row["host"], row
        assert 0 < row["p50_us"] <= row["p99_us"] and row["mb_per_s"] > 0 and row["device"].startswith("rxe0"), row
    assert "step 6 of 6, message of 512 bytes" in told
    page = (report / "index.html").read_text(encoding="utf-8")
    assert "soft-RoCE under emulation: function and ratios, never RDMA speed" in page and page.count("<svg") == 3
    assert sorted(file.name for file in report.glob("*.png")) == [f"verbs-one-process-{n}.png" for n in (1, 2, 3)]


def test_verbs_measures_between_two_hosts_and_tells_it_at_the_one_that_called(tmp_path: Path) -> None:
    report = tmp_path / "report"
    plan = ["--path", "write,message,group", "--max-bytes", "512", "--step", "64", "--rounds", "50"]
    guests = [VM, "-n", "2", "-t", "300", "--share", str(tmp_path), "--", "bash", "-c", TWO_ENDS, BENCH]
    run = [*guests, *plan, "--json", "--report", str(report)]
    ended = subprocess.run(run, capture_output=True, text=True, timeout=340, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = [line.partition("] ") for line in ended.stdout.splitlines() if line.partition("] ")[2].startswith("{")]
    assert {who for who, _, _ in lines} == {"[1"}, "the end that waits has no rows"
    rows = [json.loads(row) for _, _, row in lines]
    paths = ("write", "message", "group")
    assert [(row["path"], row["bytes"]) for row in rows] == [(path, size) for path in paths for size in (8, 512)]
    for row in rows:
        assert (row["wire"], row["ranks"], row["dtype"]) == ("verbs", 2, "bytes"), row
        assert 0 < row["p50_us"] <= row["p99_us"] and row["mb_per_s"] > 0, row
        # Each guest has a device of its own, at its own address.
        assert row["device"].startswith("rxe0") and "10.77.0.2" in row["device"], row
        assert row["title"] == "soft-RoCE under emulation: function and ratios, never RDMA speed", row
    page = (report / "index.html").read_text(encoding="utf-8")
    assert "both ends in two processes" in page and page.count("<svg") == 3
