"""Every operation of c10d by dtype, reduction and layout, and what PyTorch builds on them; one launch for all of a kind."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import c10d_cases
import pytest
import torch
import torch.distributed as dist
import torch_features
from ranks import run

GROUPS = [(2, "shm"), (3, "tcp"), (4, "auto")]


def each(rank: int, size: int, url: str, wire: str, what: str) -> Any:
    """Carries out all cases, or all features, in one group."""
    os.environ["GRADWIRE_TRANSPORT"] = wire
    torch.set_num_threads(1)
    dist.init_process_group(
        "gradwire", init_method=f"{url}/torch", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    if what == "inductor":
        failures: Any = _tried(torch_features.compiled_by_inductor, rank, size)
    elif what == "cases":
        failures = c10d_cases.run_all(rank, size)
    else:
        failures = {name: _tried(feature, rank, size) for name, feature in torch_features.FEATURES.items()}
    dist.destroy_process_group()
    return failures


def _tried(feature: Callable[[int, int], None], rank: int, size: int) -> list[str]:
    try:
        feature(rank, size)
    except Exception:
        return [traceback.format_exc()]
    return []


@pytest.fixture(scope="module", params=GROUPS, ids=lambda group: f"{group[0]}-{group[1]}")
def cases(request: pytest.FixtureRequest) -> list[dict[str, list[str]]]:
    return run(request.param[0], each, request.param[1], "cases")


@pytest.mark.parametrize("operation", c10d_cases.OPERATIONS)
def test_every_dtype_reduction_and_layout_of(operation: str, cases: list[dict[str, list[str]]]) -> None:
    failures = [f"rank {rank}: {text}" for rank, found in enumerate(cases) for text in found[operation]]
    assert not failures, "\n".join([f"{len(failures)} failures", *failures[:20]])


@pytest.fixture(scope="module")
def features() -> list[dict[str, list[str]]]:
    return run(4, each, "auto", "features")


@pytest.mark.parametrize("feature", torch_features.FEATURES)
def test_pytorch_on_top_of_it(feature: str, features: list[dict[str, list[str]]]) -> None:
    failures = [f"rank {rank}: {text}" for rank, found in enumerate(features) for text in found[feature]]
    assert not failures, "\n".join(failures)


def test_collectives_are_compiled_by_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    # In the ranks themselves, without a pool of compilers beside each. PyTorch keeps what was compiled for the next run.
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    assert run(2, each, "auto", "inductor") == [[], []]
