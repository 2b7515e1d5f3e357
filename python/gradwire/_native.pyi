"""The engine behind the package: pointers in, handles out. Use the package's own classes instead."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

__all__ = [
    "__version__",
    "after_fork",
    "Allocation",
    "Operation",
    "OneSided",
    "OneSidedMemory",
    "Transfer",
    "Group",
    "PsClient",
    "PsTable",
    "PsSparseTable",
    "PsPending",
    "PsServers",
]

__version__: str

def after_fork() -> None:
    """Called in the child after each fork: objects of the parent are refused there."""

@final
class Operation:
    """A handle of one or several operations under way. Dropping it does not stop them."""

    @staticmethod
    def join(operations: Sequence[Operation]) -> Operation:
        """One handle for all of `operations`."""

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until all have ended; False when `timeout_s` passed first, and they go on."""

    def order(self, stream: int, device: int) -> bool:
        """Has a stream of CUDA device `device` wait for the results, on the device; False where the host must wait."""

    def is_done(self) -> bool:
        """Whether all have ended."""

    def on_done(self, callback: Callable[[], object]) -> None:
        """Has `callback()` called once all have ended, on a thread of its own."""

    @property
    def source(self) -> int | None:
        """The rank that sent a received message; None for all else, and before it has ended."""

@final
class Allocation:
    """Memory of a group, given out by the buffer protocol; it goes back to the group when this goes."""

    def __len__(self) -> int: ...

@final
class OneSided:
    """One end: offers memory to its peer, and reaches the peer's."""

    @staticmethod
    def open(*, timeout_s: float, options: Mapping[str, Any]) -> OneSided:
        """An end that neither listens nor is connected."""

    def bind(self) -> bytes:
        """Listens; what the peer connects by. May be repeated."""

    def connect(self, url: bytes, timeout_s: float) -> None:
        """Connects to the endpoint that is bound at `url`."""

    def connected(self) -> bool:
        """Whether there is a peer, and it is there."""

    def register(self, buffer: Any) -> OneSidedMemory:
        """Takes `buffer` as memory for accesses; nothing is told to anybody."""

    def expose(self, memory: OneSidedMemory, timeout_s: float) -> bytes:
        """What the peer reaches `memory` by, to be sent to it."""

    def unregister(self, memory: OneSidedMemory, timeout_s: float) -> bool:
        """Ends the exposure of `memory`; False where accesses of it still go on after `timeout_s`."""

    def write(self, memory: OneSidedMemory, offset: int, bytes: int, remote: bytes) -> Transfer:
        """Begins to write `bytes` bytes of `memory` from `offset` on into the first ones of `remote`."""

    def read(self, memory: OneSidedMemory, offset: int, bytes: int, remote: bytes) -> Transfer:
        """Begins to read the first `bytes` bytes of `remote` into `memory` from `offset` on."""

    def describe(self) -> dict[str, Any]:
        """By which wire the peer's memory is reached, and why."""

    def close(self, timeout_s: float) -> None:
        """Waits for what is under way and takes leave, within `timeout_s`. May be repeated."""

@final
class OneSidedMemory:
    """Memory of this process that may be reached, or be the local side of an access."""

    def __len__(self) -> int: ...

@final
class Transfer:
    """A read or write under way. Dropping it does not stop it."""

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until it has ended; False when `timeout_s` passed first, and it goes on."""

    def is_done(self) -> bool:
        """Whether it has ended."""

    def on_done(self, callback: Callable[[], object]) -> None:
        """Has `callback()` called once it has ended, on a thread of its own."""

    @property
    def source(self) -> int | None:
        """No rank: as of an operation that is no receive."""

@final
class Group:
    """A group of ranks, and this process's place in it."""

    @staticmethod
    def form(
        name: str,
        *,
        init_method: str | None = None,
        store: Any = None,
        rank: int | None = None,
        world_size: int | None = None,
        timeout_s: float,
        options: Mapping[str, Any],
        environment: Mapping[str, str],
    ) -> Group:
        """Meets the other ranks and connects to them."""

    @property
    def rank(self) -> int:
        """This process's place in the group."""

    @property
    def world_size(self) -> int:
        """The number of ranks."""

    @property
    def sequence(self) -> int:
        """Collectives begun so far."""

    def run(
        self,
        collective: str,
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        *,
        op: str | None = None,
        root: int = 0,
        timeout_s: float | None = None,
        background: bool = False,
    ) -> Operation | None:
        """Begins `collective` and returns its handle; without `background`, carries it out and returns None."""

    def send(self, tensor: Any, to: int, tag: int, timeout_s: float | None = None) -> Operation:
        """Begins to send `tensor` to rank `to`, where it meets a receive with the same tag."""

    def recv(self, tensor: Any, source: int | None, tag: int, timeout_s: float | None = None) -> Operation:
        """Begins to receive into `tensor` from rank `source`, or from whoever is first."""

    def allocate(self, bytes: int) -> Allocation:
        """Memory for calls to come, known to the device where the group has RDMA."""

    def set_timeout(self, timeout_s: float) -> None:
        """How long an operation may take that is given no time-out of its own."""

    def describe(self) -> dict[str, Any]:
        """What `describe()` tells, as plain values."""

    def explain(
        self, collective: str, bytes: int, *, dtype: str = "float32", op: str | None = None
    ) -> tuple[str, str, list[tuple[str, float]]]:
        """The algorithm of a collective, why it is this one, and what there was to choose from with microseconds."""

    def trace(self) -> str:
        """The last operations with their times, as JSON."""

    def check(self) -> None:
        """Raises the error that ended the group, if it is over."""

    def abort(self, reason: str) -> None:
        """Ends the group on every rank, with `reason`."""

    def close(self, timeout_s: float) -> None:
        """Leaves the group in good order, within `timeout_s`."""

@final
class PsClient:
    """A connection to all servers of a parameter server."""

    @staticmethod
    def connect(
        addresses: Sequence[str],
        token: str | None,
        worker: int | None,
        timeout_s: float,
        reconnect_s: float,
        options: Mapping[str, Any],
        clustered: bool = False,
    ) -> PsClient:
        """Connects to the servers, one a shard; `clustered`: to those that the coordinator at one of the addresses names."""

    def dense(
        self,
        name: str,
        shape: Sequence[int],
        dtype_name: str,
        rule: tuple[str, Sequence[float], bool],
        workers: int | None,
        average: bool,
        staleness: int | None,
        clipped: bool,
        recovery_name: str,
        compression: tuple[tuple[str, float], tuple[str, float]],
    ) -> PsTable:
        """Makes a dense table, or finds it. `workers`: synchronous with so many, or within `staleness`; none: asynchronous."""

    def sparse(
        self, name: str, dim: int, dtype_name: str, rule: tuple[str, Sequence[float], bool], making: Any
    ) -> PsSparseTable:
        """Makes a sparse table, or finds it. `making`: a `gradwire.sparse.Making`."""

    def clip(self, tables: Sequence[PsTable], most: float) -> float:
        """Clips the gradients that were pushed last by their common norm; the norm."""

    def recover(self, tables: Sequence[tuple[PsTable, Any]]) -> list[int]:
        """Gives lost tables again, each with the value that was pulled last; the clocks to go on from."""

    def barrier(self, name: str, clients: int, timeout_s: float | None = None) -> None:
        """Waits until `clients` clients have come."""

    def snapshot(self, timeout_s: float) -> tuple[str, int, float, dict[str, int]]: ...
    def status(self) -> list[dict[str, Any]]:
        """What each server holds."""

    @property
    def shards(self) -> int:
        """Number of shards."""

    def close(self) -> None:
        """Says goodbye to the servers."""

@final
class PsTable:
    """A table that is cut over all servers."""

    def init(self, values: Any) -> bool:
        """Writes the first values, unless another client has."""

    def push(self, gradient: Any) -> PsPending:
        """Starts a push."""

    def pull(self, out: Any, whole: bool) -> PsPending:
        """Starts a pull; `whole`: uncompressed, whatever the table says."""

    def push_pull(self, gradient: Any, out: Any) -> PsPending:
        """Starts a push whose answer is what came of it."""

    def set_learning_rate(self, rate: float) -> None:
        """Sets the learning rate from this worker's next push on."""

    def set_schedule(self, schedule: tuple[str, Sequence[float], int, int, float]) -> None:
        """Sets the learning rates from this worker's next push on."""

    @property
    def clock(self) -> int:
        """Pushes made by this client."""

    @property
    def pulled(self) -> int | None:
        """The clock of the value that was pulled last."""

@final
class PsSparseTable:
    """A sparse table over all servers."""

    def push(self, ids_of: Any, gradients: Any) -> PsPending:
        """Starts a push of a gradient for each id."""

    def pull(self, ids_of: Any, out: Any) -> PsPending:
        """Starts a pull of the row of each id."""

    def set_learning_rate(self, rate: float) -> None:
        """Sets the learning rate from this worker's next push on."""

    def set_schedule(self, schedule: tuple[str, Sequence[float], int, int, float]) -> None:
        """Sets the learning rates from this worker's next push on."""

    def evicted(self) -> tuple[list[int], int]:
        """The ids that were evicted since last asked, and how many more are forgotten."""

    @property
    def clock(self) -> int:
        """Pushes made by this client."""

@final
class PsPending:
    """A push or pull under way."""

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until it has ended; False when the time is up."""

    def is_done(self) -> bool:
        """Whether it has ended, well or not."""

@final
class PsServers:
    """Servers of this process."""

    @staticmethod
    def start(servers: int, token: str | None, options: Mapping[str, Any]) -> PsServers:
        """Starts servers on free ports of 127.0.0.1."""

    @property
    def addresses(self) -> list[str]:
        """Where they listen, in the order of the shards."""

    def stop_shard(self, shard: int) -> None:
        """Stops one of them, as if its process had ended."""

    def stop(self) -> None:
        """Stops them all."""
