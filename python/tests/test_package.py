"""The package as it is installed: light to import, typed, registered, and warned of misspelt settings."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import os
import pathlib
import re
import subprocess
import sys
import warnings

import gradwire
import pytest
from gradwire import _native
from gradwire.config import NAMES, Config

PACKAGE = pathlib.Path(gradwire.__file__).parent
ROOT = pathlib.Path(__file__).resolve().parents[2]
#: How clap is told of a variable.
READ = re.compile(r'env = "(GRADWIRE_\w+)"')

WITHOUT_TORCH = """
import importlib.abc, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "sklearn", "mpi4py", "cupy"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Block())
import numpy, gradwire
with gradwire.Communicator("file://" + sys.argv[1], rank=0, world_size=1) as group:
    assert (group.all_reduce(numpy.ones(3)) == 1).all()
loaded = sorted(name for name in sys.modules if name.split(".")[0] in ("torch", "ctypes.util"))
assert not loaded, loaded
libraries = {line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}
heavy = [path for path in libraries if any(word in path for word in ("libcuda", "libibverbs", "libmpi", "libtorch"))]
assert not heavy, heavy
"""


def test_it_works_with_numpy_alone(tmp_path: pathlib.Path) -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, str(tmp_path)], check=True, timeout=60)


def test_the_backend_is_found_by_its_entry_point() -> None:
    (entry,) = importlib.metadata.entry_points(group="torch.distributed.backends", name="gradwire")
    assert entry.value == "gradwire.torch:register"


def test_the_package_is_typed_and_says_its_version() -> None:
    assert (PACKAGE / "py.typed").exists()
    assert gradwire.__version__ == importlib.metadata.version("gradwire")
    assert all(hasattr(gradwire, name) for name in gradwire.__all__)


def signature_of_stub(function: ast.FunctionDef) -> list[tuple[str, bool]]:
    """Names of the arguments but self, and whether they have a default."""
    plain, keyword = function.args.args, function.args.kwonlyargs
    without = len(plain) - len(function.args.defaults)
    found = [(one.arg, place >= without) for place, one in enumerate(plain)]
    found += [(one.arg, default is not None) for one, default in zip(keyword, function.args.kw_defaults, strict=True)]
    return [(name, optional) for name, optional in found if name != "self"]


def signature_of_native(member: object) -> list[tuple[str, bool]]:
    parameters = inspect.signature(member).parameters.values()  # type: ignore[arg-type]
    return [(one.name, one.default is not inspect.Parameter.empty) for one in parameters if one.name != "self"]


def check(name: str, node: ast.stmt, member: object) -> None:
    assert isinstance(node, ast.FunctionDef)
    if any(getattr(decorator, "id", "") == "property" for decorator in node.decorator_list):
        assert inspect.isgetsetdescriptor(member), f"{name} is no property"
        return
    assert signature_of_stub(node) == signature_of_native(member), name


def test_the_stub_tells_what_the_module_holds() -> None:
    stub = ast.parse((PACKAGE / "_native.pyi").read_text())
    told = {node.name: node for node in stub.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    held = {name: getattr(_native, name) for name in dir(_native) if not name.startswith("_")}
    assert set(told) == set(held)
    for name, node in told.items():
        if isinstance(node, ast.FunctionDef):
            check(name, node, held[name])
            continue
        members = {one.name: one for one in node.body if isinstance(one, ast.FunctionDef) and one.name[0] != "_"}
        actual = {one: inspect.getattr_static(held[name], one) for one in vars(held[name]) if not one.startswith("_")}
        assert set(members) == set(actual), name
        for member, one in members.items():
            static = actual[member]
            check(f"{name}.{member}", one, static.__func__ if isinstance(static, staticmethod) else static)


def test_mypy_finds_no_difference_between_stub_and_module() -> None:
    command = [sys.executable, "-m", "mypy.stubtest", "gradwire._native"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_misspelt_setting_is_named_with_the_nearest_that_there_is() -> None:
    with pytest.warns(RuntimeWarning, match="GRADWIRE_TRANSPROT.*did you mean GRADWIRE_TRANSPORT"):
        Config.from_environment({"GRADWIRE_TRANSPROT": "tcp"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Config.from_environment({"GRADWIRE_TRANSPORT": "tcp", "OTHER": "1"})
        # Of `gradwire-ps coordinate`, which a process may well be the parent of.
        Config.from_environment({"GRADWIRE_ETCD": "http://127.0.0.1:2379"})


def test_every_setting_is_known_to_python_and_is_in_the_table_of_the_readme() -> None:
    of_binaries = {name for file in (ROOT / "ps" / "src").rglob("*.rs") for name in READ.findall(file.read_text())}
    assert "GRADWIRE_TOKEN" in of_binaries and of_binaries <= set(NAMES)
    told = set()
    for row in re.findall(r"^\| (`GRADWIRE_.*?) \|", (ROOT / "README.md").read_text(), re.MULTILINE):
        # "`GRADWIRE_IB_TIMEOUT`, `_RETRIES`" tells of GRADWIRE_IB_TIMEOUT and GRADWIRE_IB_RETRIES.
        first, *others = re.findall(r"`(\w+)`", row)
        kind = "_".join(first.split("_")[:2])
        told |= {first} | {name for name in NAMES for other in others if name.startswith(kind) and name.endswith(other)}
    assert told == set(NAMES)


def test_settings_are_read_from_arguments_then_from_the_environment() -> None:
    environment = {
        "GRADWIRE_TRANSPORT": "tcp",
        "GRADWIRE_LANES": "2",
        "GRADWIRE_TIMEOUT": "1.5",
        "GRADWIRE_PORT_RANGE": "2000-2010",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    config = Config.from_environment(environment, lanes=3, token=None)
    assert (config.transport, config.lanes, config.timeout_s) == ("tcp", 3, 1.5)
    assert (config.port_range, config.socket_ifname, config.token) == ((2000, 2010), "lo", None)


@pytest.mark.parametrize("name", ["GRADWIRE_LANES", "GRADWIRE_TIMEOUT", "GRADWIRE_PORT_RANGE"])
def test_a_setting_that_cannot_be_read_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: `many`"):
        Config.from_environment({name: "many"})


@pytest.mark.parametrize("name", [name for name in NAMES if name == "GRADWIRE_LANES" or re.search("IB_(?!HCA)", name)])
def test_a_number_that_is_out_of_range_is_named_from_wherever_it_comes(name: str) -> None:
    argument = name.removeprefix("GRADWIRE_").lower()
    for number in (-1, 256):
        words = rf"{argument} \({name}\): {number} is not from \d+ to \d+"
        with pytest.raises(ValueError, match=words):
            Config.from_environment({name: str(number)})
        with pytest.raises(ValueError, match=words):
            Config(**{argument: number})
    assert getattr(Config.from_environment({name: "1"}), argument) == 1


def test_a_forked_child_refuses_its_parents_group(tmp_path: pathlib.Path) -> None:
    group = gradwire.Communicator(f"file://{tmp_path}", rank=0, world_size=1)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            group.barrier()
        except RuntimeError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        assert "belongs to the parent" in answer.read()
    os.waitpid(pid, 0)
    group.barrier()
    group.close()
