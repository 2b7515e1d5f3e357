"""`gradwire-bench compare` with a peer that is really there: Gloo, through torch.distributed, in turns with ours."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "target" / "release" / "gradwire-bench"
# What Python runs as it starts, where it is on the path: the sums of one backend have a wrong last element.
WRONG = """
import sys

if "{backend}" in sys.orig_argv:
    import torch.distributed as dist

    right = dist.all_reduce

    def wrong(tensor):
        right(tensor)
        tensor[-1] += 1

    dist.all_reduce = wrong
"""
# Element 1 of two ranks is 1 + 2. Either of them may be heard first.
WRONG_SUM = re.compile(r"^wrong rank [01]: element 1 of all_reduce is 4.0, not 3.0")


def compare(folder, *flags, **environment):
    command = [BENCH, "compare", "--layers", "torch", "--wires", "tcp", "--bytes", "8,4k", "--rounds", "10", "--json"]
    command += ["--python", sys.executable, "--peers-folder", folder / "peers", "--report", folder / "report", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=os.environ | environment)


def rows_of(done):
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_gloo_and_ours_are_verified_and_timed_and_their_medians_make_the_ratio(tmp_path):
    rows = rows_of(compare(tmp_path, "--operations", "all-reduce,all-gather"))
    runs = [(operation, nbytes) for operation in ("all_reduce", "all_gather") for nbytes in (8, 4096)]
    assert [(row["operation"], row["bytes"]) for row in rows] == runs
    for row in rows:
        assert set(row["figures"]) == {"gradwiretorch", "gloo"}, row
        ours, gloo = row["figures"]["gradwiretorch"], row["figures"]["gloo"]
        for figure in (ours, gloo):
            assert 0 < figure["p50_us"] <= figure["p99_us"] and figure["busbw_gb_per_s"] > 0, row
            # Who takes long makes fewer than the ten that were asked for.
            assert 2 <= figure["calls"] <= 10, row
        assert (row["p50_us"], row["p99_us"]) == (ours["p50_us"], ours["p99_us"]), row
        assert (row["best"], row["ratio"]) == ("gloo", pytest.approx(gloo["p50_us"] / ours["p50_us"])), row
        told = (row["layer"], row["wire"], row["ranks"], row["dtype"], row["bar"])
        assert told == ("torch", "tcp", 2, "float32", 2.0 if row["operation"] == "all_reduce" else 1.0), row
        assert "torch" in row["libraries"]["gloo"] and "gradwire" in row["libraries"]["gradwiretorch"], row
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    for operation in ("all_reduce", "all_gather"):
        title = f"Beside peers: {operation} of float32, 2 ranks on one host, TCP, through torch.distributed"
        assert title in page, operation
        for picture in (1, 2, 3):
            name = f"compare-{operation}-float32-torch-tcp-2-{picture}.png"
            assert (tmp_path / "report" / name).read_bytes()[1:4] == b"PNG"
    assert page.count("<svg") == 6
    # Each picture has a curve of both, named beside it.
    pictures = page.split("<svg")[1:]
    assert all("Gloo" in picture.split("</svg>")[0] and "gradwire" in picture.split("</svg>")[0] for picture in pictures)


def test_a_peer_whose_result_is_wrong_is_not_timed_and_the_row_says_why(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WRONG.format(backend="gloo"), encoding="utf-8")
    done = compare(tmp_path, PYTHONPATH=str(tmp_path))
    rows = rows_of(done)
    assert len(rows) == 2
    for row in rows:
        # Of the first size, after which Gloo has no turn any more.
        assert list(row["figures"]["gloo"]) == ["absent"], row
        assert WRONG_SUM.search(row["figures"]["gloo"]["absent"]), row
        assert row["figures"]["gradwiretorch"]["p50_us"] > 0 and (row["best"], row["ratio"]) == (None, None), row
    assert WRONG_SUM.search(done.stderr.partition("Gloo failed: ")[2])
    picture = (tmp_path / "report" / "index.html").read_text(encoding="utf-8").split("<svg")[1].split("</svg>")[0]
    assert "Gloo" not in picture


def test_a_wrong_result_of_ours_ends_the_comparison(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WRONG.format(backend="gradwire"), encoding="utf-8")
    done = compare(tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and not done.stdout, done.stdout
    assert WRONG_SUM.search(done.stderr.partition("error: ")[2])
