"""PyTorch's own distributed tests, as they come in its wheel, made ready to be run against a backend by its name."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import select
import signal
import sys
import tempfile
import types
import unittest
from typing import Any

_INTERNAL = "torch.testing._internal.distributed"
#: Features that the suite's tables grant a backend by its name.
FEATURES = ("ddp", "subgroup", "plugin")
#: The tests end themselves before, unless they hang.
_TEST_S = 100.0


class Alias(str):
    """A backend's name that also answers to those that the suite knows."""

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) or other in ("gloo", "mpi")

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash("gloo")


def load(suite: str, backend: str) -> list[type[unittest.TestCase]]:
    """The classes of `suite`, "distributed" or "ddp_rpc", whose module is executed with `backend` in place of a fixed name."""
    os.environ["BACKEND"] = backend
    os.environ.setdefault("TEMP_DIR", "")  # read at import; each test gets one of its own
    import torch.testing._internal.common_distributed as common

    for feature in FEATURES:
        common.DistTestCases.backend_feature.setdefault(feature, set()).add(backend)
    if suite == "distributed":
        module = _executed(
            f"{_INTERNAL}.distributed_test", 'BACKEND = os.environ["BACKEND"]', 'BACKEND = Alias(os.environ["BACKEND"])'
        )
        return [_forking(module.TestDistBackend, module.DistributedTest._DistTestBase)]
    module = _executed(f"{_INTERNAL}.ddp_under_dist_autograd_test", 'backend="gloo"', 'backend=os.environ["BACKEND"]')
    from torch.testing._internal.distributed.rpc.tensorpipe_rpc_agent_test_fixture import TensorPipeRpcAgentTestFixture

    many = common.MultiProcessTestCase
    return [
        _forking(case, TensorPipeRpcAgentTestFixture, many)
        for case in (module.DdpUnderDistAutogradTest, module.DdpComparisonTest)
    ]


def _executed(name: str, old: str, new: str) -> Any:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    with open(spec.origin, encoding="utf-8") as file:
        source = file.read()
    assert old in source, f"{name} reads its backend in another way"
    module = types.ModuleType(name)
    module.__dict__.update(__file__=spec.origin, __spec__=spec, __package__=_INTERNAL, Alias=Alias)
    sys.modules[name] = module
    exec(compile(source.replace(old, new), spec.origin, "exec", dont_inherit=True), module.__dict__)
    return module


def _forking(*bases: Any) -> Any:
    def set_up(self: Any) -> None:
        super(case, self).setUp()
        self._start_processes(__import__("torch").multiprocessing.get_context("fork").Process)

    case = type(bases[0].__name__, bases, {"setUp": set_up})
    return case


def names(suite: str) -> list[str]:
    """The tests of `suite`, each "class.method"."""
    loader = unittest.TestLoader()
    return [f"{case.__name__}.{name}" for case in load(suite, "gloo") for name in loader.getTestCaseNames(case)]


def work(suite: str, backend: str, wanted: list[str]) -> None:
    """Runs tests one by one, each in a fork, and prints a line of JSON for each."""
    cases = {case.__name__: case for case in load(suite, backend)}
    for name in wanted:
        kind, _, method = name.partition(".")
        if getattr(getattr(cases[kind], method), "__unittest_skip__", False):
            print(json.dumps([name, "skipped", ""]), flush=True)
            continue
        with tempfile.TemporaryDirectory(prefix="gradwire-suite-", ignore_cleanup_errors=True) as folder:
            print(_forked(name, cases[kind](method), folder), flush=True)


def _forked(name: str, test: unittest.TestCase, folder: str) -> str:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.environ["TEMP_DIR"] = tempfile.tempdir = folder
        result = unittest.TestResult()
        sys.stdout = sys.stderr = io.StringIO()
        unittest.TestSuite([test]).run(result)
        bad = result.errors + result.failures
        told = ("failed", bad[0][1][-3000:]) if bad else ("skipped", "") if result.skipped else ("passed", "")
        os.write(write, json.dumps([name, *told]).encode())
        os._exit(0)
    os.close(write)
    line = b""
    if select.select([read], [], [], _TEST_S)[0]:
        line = os.read(read, 1 << 16)
    os.close(read)
    try:
        os.killpg(child, signal.SIGKILL)  # what the test has left behind, or all of it if it hangs
    except ProcessLookupError:
        pass
    os.waitpid(child, 0)
    return (line or json.dumps([name, "failed", f"it died, or hung for {_TEST_S:.0f} s"]).encode()).decode()


if __name__ == "__main__":
    if sys.argv[1] == "names":
        print(*names(sys.argv[2]))
    else:
        work(sys.argv[1], sys.argv[2], sys.argv[3:])
