"""Many to one over RDMA: four guests push to a fifth, which grants credit. Run on the host by scripts/softroce-test.

That no push comes to a queue pair without a receive, and that none of them starves. How alike they fare is told by the same
command, on a quiet machine: here the processors go to five emulated guests as the host pleases.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

#: The measuring program, built by scripts/softroce-test.
BENCH = os.environ["GRADWIRE_BENCH"]
ROOT = Path(__file__).parents[3]
#: A sender with less of the mean starves.
STARVES = 0.4


def test_four_guests_push_to_a_fifth_that_is_always_ready_and_none_starves() -> None:
    run = [BENCH, "many-to-one", "--senders", "4", "--wire", "verbs", "--cc", "credit", "--json"]
    run += ["--bytes", "64k", "--seconds", "6"]
    ended = subprocess.run(
        [*run, "--guests", str(ROOT / "scripts/softroce-vm")], capture_output=True, text=True, timeout=240, check=False
    )
    assert ended.returncode == 0, ended.stderr
    row = json.loads(ended.stdout)
    assert row["refused"]["not_ready"] == 0, row["refused"]
    of_mean = [4 * sender["goodput_gb_per_s"] / row["goodput_gb_per_s"] for sender in row["per_sender"]]
    assert len(of_mean) == 4 and min(of_mean) > STARVES, of_mean
