"""The command that makes README's figures: what it writes where, and that a failure leaves README as it was."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("readme_figures", ROOT / "scripts" / "readme_figures.py")
figures = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(figures)


def test_a_block_is_replaced_and_all_else_stays():
    text = "before\n<!-- one: begin -->\nold\n<!-- one: end -->\nafter\n"
    assert figures.replaced(text, "one", "new\n") == "before\n<!-- one: begin -->\nnew\n<!-- one: end -->\nafter\n"


@pytest.mark.parametrize("text", ["", "<!-- one: end --><!-- one: begin -->", "<!-- one: begin -->" * 2 + "<!-- one: end -->"])
def test_marks_that_are_missing_twice_there_or_turned_around_are_refused(text):
    with pytest.raises(figures.Failed, match="one `<!-- one: begin -->`"):
        figures.replaced(text, "one", "new")


def test_readme_has_the_marks_of_every_step():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in figures.STEPS:
        figures.replaced(readme, name, "")


def test_kernels_are_measured_and_written(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- kernels: begin -->\n<!-- kernels: end -->\n", encoding="utf-8")
    figures.main(["--quick", "--only", "kernels", "--readme", str(readme)])
    lines = readme.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "<!-- kernels: begin -->" and lines[-1] == "<!-- kernels: end -->"
    assert [line.split(" | ")[0] for line in lines if "GB/s" in line] == ["| 32 KiB", "| 1 MiB", "| 16 MiB", "| 256 MiB"]


def test_a_step_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    old = "<!-- kernels: begin -->\nold\n<!-- kernels: end -->\n"
    readme.write_text(old, encoding="utf-8")
    wrong = tmp_path / "bench"
    wrong.write_text("#!/bin/sh\necho 'a wrong result: nothing was timed' >&2\nexit 1\n")
    wrong.chmod(0o755)
    monkeypatch.setattr(figures, "BENCH", wrong)
    with pytest.raises(SystemExit, match="as it was"):
        figures.main(["--only", "kernels", "--readme", str(readme)])
    assert readme.read_text(encoding="utf-8") == old
