"""That a run of PyTorch's own tests which proves nothing does not pass for one that proves something."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch_suite

KNOWN = next(iter(torch_suite.KNOWN))


def outcomes(passed: int, failed: int = 0, skipped: int = 0, known: bool = True) -> torch_suite.Outcomes:
    found = {f"passed {at}": ("passed", "") for at in range(passed)}
    found |= {f"failed {at}": ("failed", "AssertionError: no") for at in range(failed)}
    found |= {f"skipped {at}": ("skipped", "") for at in range(skipped)}
    return found | ({KNOWN: ("failed", "AssertionError: custom")} if known else {})


@pytest.mark.parametrize(
    ("found", "wrong", "words"),
    [
        (outcomes(98), 0, "98 of 99"),
        (outcomes(99), 0, "99 of 100"),
        (outcomes(97, skipped=1), 1, "gradwire passes 97, at least 98"),
        (outcomes(98, failed=1), 1, "AssertionError: no"),
        (outcomes(0, skipped=99, known=False), 2, "no test ran for gradwire"),
        (outcomes(0, known=False), 2, "0 of 0"),
    ],
)
def test_a_run_is_good_only_where_enough_pass(found: torch_suite.Outcomes, wrong: int, words: str, capsys: Any) -> None:
    assert torch_suite.tell(["gradwire"], {"gradwire": found}, False, torch_suite.BARS["distributed", 2]) == wrong
    assert words in capsys.readouterr().out


def suite(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, torch_suite.__file__, "--only", "gradwire", "--suite", "distributed", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def test_a_run_of_no_test_at_all_is_an_error() -> None:
    none = suite("--filter", "no such test")
    assert none.returncode == 2 and "no test of distributed has 'no such test'" in none.stderr
    # It wants GPUs.
    skipped = suite("--filter", "test_nccl_backend_bool_allreduce")
    assert skipped.returncode == 1 and "0 of 0" in skipped.stdout and "no test ran for gradwire" in skipped.stdout
