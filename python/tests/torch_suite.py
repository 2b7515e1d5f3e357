"""Runs PyTorch's own distributed suite against gradwire on CPU, and prints what passed beside Gloo.

    python python/tests/torch_suite.py                       both backends, 2 ranks: some 2 minutes
    python python/tests/torch_suite.py --world-size 3 --only gradwire --filter all_reduce

The suite is the one in the wheel: torch.testing._internal.distributed.distributed_test. It asks for a backend's name in many
places, `if BACKEND != "gloo": skip`; here our name compares equal to "gloo" and "mpi" inside of it, so that nothing is
skipped for its name alone. What is skipped then wants GPUs, 8 ranks, or NCCL. Each test runs in processes of its own.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import io
import json
import os
import subprocess
import sys
import tempfile
import types
import unittest
from concurrent.futures import ThreadPoolExecutor
from typing import Any

SUITE = "torch.testing._internal.distributed.distributed_test"
#: Fails for every backend from outside of PyTorch: it compares c10d's own name for them, "custom", with ours.
KNOWN = {"gradwire": {"test_ddp_logging_data_cpu"}, "gloo": set()}
#: Features that the suite's tables grant a backend by its name.
FEATURES = ("ddp", "subgroup", "plugin")


class Alias(str):
    """A backend's name that also answers to those that the suite knows."""

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) or other in ("gloo", "mpi")

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash("gloo")


def load(backend: str) -> type[unittest.TestCase]:
    """The suite's class, its module executed with the alias in place of the name."""
    os.environ["BACKEND"] = backend
    os.environ.setdefault("TEMP_DIR", tempfile.mkdtemp(prefix="gradwire-suite-"))
    import torch.testing._internal.common_distributed as common

    for feature in FEATURES:
        common.DistTestCases.backend_feature.setdefault(feature, set()).add(backend)
    spec = importlib.util.find_spec(SUITE)
    assert spec is not None and spec.origin is not None
    with open(spec.origin, encoding="utf-8") as file:
        source = file.read()
    name = 'BACKEND = os.environ["BACKEND"]'
    assert name in source, "the suite reads its backend in another way"
    module = types.ModuleType(SUITE)
    module.__dict__.update(__file__=spec.origin, __spec__=spec, __package__=SUITE.rpartition(".")[0], Alias=Alias)
    sys.modules[SUITE] = module
    source = source.replace(name, 'BACKEND = Alias(os.environ["BACKEND"])', 1)
    exec(compile(source, spec.origin, "exec", dont_inherit=True), module.__dict__)

    class Case(module.TestDistBackend, module.DistributedTest._DistTestBase):  # type: ignore[name-defined, misc]
        def setUp(self) -> None:
            super().setUp()
            self._start_processes(__import__("torch").multiprocessing.get_context("fork").Process)

    return Case


def work(backend: str, names: list[str]) -> None:
    """Runs tests one by one, each in a fork, and prints a line of JSON for each."""
    case = load(backend)
    for name in names:
        read, write = os.pipe()
        if os.fork() == 0:
            os.setsid()
            os.environ["TEMP_DIR"] = tempfile.mkdtemp(prefix="gradwire-suite-")
            result = unittest.TestResult()
            sys.stdout = sys.stderr = io.StringIO()
            unittest.TestSuite([case(name)]).run(result)
            bad = result.errors + result.failures
            told = ("failed", bad[0][1][-3000:]) if bad else ("skipped", "") if result.skipped else ("passed", "")
            os.write(write, json.dumps([name, *told]).encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            line = pipe.read()
        os.wait()
        print((line or json.dumps([name, "failed", "the process died"]).encode()).decode(), flush=True)


def names_of(pattern: str) -> list[str]:
    """The suite's tests."""
    listing = "import torch_suite as t, unittest as u; print(*u.TestLoader().getTestCaseNames(t.load('gloo')))"
    done = subprocess.run([sys.executable, "-c", listing], env=environment(2), capture_output=True, text=True, check=True)
    return [name for name in done.stdout.split() if pattern in name]


def environment(world_size: int) -> dict[str, str]:
    """What the suite reads; one thread a rank, since a pool of threads does not live through fork."""
    here = os.path.dirname(os.path.abspath(__file__))
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    limit = {"DISTRIBUTED_TESTS_DEFAULT_TIMEOUT": "60", "WORLD_SIZE": str(world_size), "PYTHONPATH": path}
    return {**os.environ, **threads, **limit}


def run(backend: str, names: list[str], world_size: int, jobs: int) -> dict[str, tuple[str, str]]:
    """Every test's outcome and, where it failed, its traceback."""

    def share(part: list[str]) -> list[Any]:
        command = [sys.executable, os.path.abspath(__file__), "--work", backend, *part]
        done = subprocess.run(
            command, env=environment(world_size), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=1800
        )
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]

    with ThreadPoolExecutor(jobs) as pool:
        lines = [line for part in pool.map(share, [names[at::jobs] for at in range(jobs)]) for line in part]
    found = {name: (status, detail) for name, status, detail in lines}
    return {name: found.get(name, ("failed", "not reached: the process before it died")) for name in names}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-size", type=int, default=2, help="ranks (default 2)")
    parser.add_argument("--only", choices=["gradwire", "gloo"], help="one backend")
    parser.add_argument("--filter", default="", help="tests whose name holds this")
    parser.add_argument("--jobs", type=int, default=2, help="tests at once (default 2)")
    parser.add_argument("--verbose", action="store_true", help="print the traceback of each failure")
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work[0], arguments.work[1:])
        return 0
    names = names_of(arguments.filter)
    unexpected = 0
    for backend in [arguments.only] if arguments.only else ["gradwire", "gloo"]:
        outcomes = run(backend, names, arguments.world_size, arguments.jobs)
        count = collections.Counter(status for status, _ in outcomes.values())
        print(
            f"{backend}, {arguments.world_size} ranks: {count['passed']} passed, {count['failed']} failed, "
            f"{count['skipped']} skipped of {len(names)}",
            flush=True,
        )
        for name, (status, detail) in outcomes.items():
            if status == "failed":
                known = name in KNOWN[backend]
                unexpected += backend == "gradwire" and not known
                print(f"  {name}{' (known: see KNOWN)' if known else ''}")
                if arguments.verbose:
                    print("    " + "\n    ".join(detail.strip().splitlines()))
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main())
