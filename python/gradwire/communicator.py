"""Collectives over NumPy arrays, tensors, and anything with the buffer protocol."""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

import numpy

from . import _native
from .config import Config

#: An object whose memory can be sent: a NumPy array, a PyTorch tensor in host memory, a bytearray, a memoryview.
Buffer = Any

_CLOSE_TIMEOUT_S = 5.0
_open: weakref.WeakSet[Communicator] = weakref.WeakSet()


@dataclass(frozen=True)
class Link:
    """The way to one other rank: who, by which wire, why by this one, and what has passed over it."""

    rank: int
    host: str
    pid: int
    wire: str
    reason: str
    sent_bytes: int
    received_bytes: int


@dataclass(frozen=True)
class Description:
    """A group as it stands; `str()` of it is for people.

    Attributes:
        group: name of the group.
        rank: this process's rank.
        world_size: number of ranks.
        collectives: how collectives travel: by one shared segment, or by messages over the links.
        segment_bytes: bytes of users' buffers that went through the shared segment.
        devices: how memory of each CUDA device that was used travels.
        links: the way to every other rank.
        text: all of it, for people.
    """

    group: str
    rank: int
    world_size: int
    collectives: str
    segment_bytes: int
    devices: list[str]
    links: tuple[Link, ...]
    text: str

    @classmethod
    def of(cls, told: dict[str, Any]) -> Description:
        """From what the engine tells."""
        return cls(**{**told, "links": tuple(Link(**link) for link in told["links"])})

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Explanation:
    """The choice of an algorithm; `str()` of it is for people.

    Attributes:
        algorithm: its name, as GRADWIRE_ALGO has it; "segment" where all ranks share memory.
        reason: why this one.
        expected_us: what there was to choose from, with the microseconds that each is expected to take, the least first.
    """

    algorithm: str
    reason: str
    expected_us: list[tuple[str, float]]

    def __str__(self) -> str:
        rows = "".join(f"\n  {name:<12} {us:12.1f} us" for name, us in self.expected_us)
        return f"{self.algorithm}: {self.reason}{rows}"


class Work:
    """An operation under way. Leave its buffers alone until `wait()` has returned."""

    def __init__(self, operation: _native.Operation, result: Any = None) -> None:
        self._operation = operation
        self._result = result

    def wait(self, timeout_s: float | None = None) -> Any:
        """Waits until the operation has ended and returns what the blocking call would have returned.

        Raises:
            TimeoutError: `timeout_s` passed first; the operation goes on.
            RankFailedError, CollectiveTimeoutError, CollectiveMismatchError, GroupAbortedError: how it failed.
        """
        if not self._operation.wait(timeout_s):
            raise TimeoutError(f"the operation has not ended within {timeout_s} s; it goes on")
        return self._operation.source if self._result is _SOURCE else self._result

    def is_completed(self) -> bool:
        """Whether it has ended, well or not."""
        return self._operation.is_done()


_SOURCE = object()


class Communicator:
    """A group of ranks, and this process's place in it.

    Every rank makes the same calls in the same order. A call blocks until this rank's part is done, or returns a `Work`
    with `async_op=True`. Buffers are C-contiguous, in host memory or on a CUDA device (`Work.wait` then blocks the host, too); dtypes are float16, bfloat16, float32, float64,
    bool and the integers (others can be moved, not reduced).

    Args:
        init_method: where ranks meet: "env://" (the environment as torchrun, mpirun or srun set it), "tcp://host:port"
            (rank 0 serves it) or "file:///folder".
        rank: this process's place, where `init_method` does not say it.
        world_size: number of ranks, where `init_method` does not say it.
        store: a PyTorch store, or any object with `set(key, value)` and a waiting `get(key)`, in place of `init_method`.
        name: tells several groups at one meeting place apart; the same on every rank.
        timeout_s: seconds that an operation, and the meeting, may take; default GRADWIRE_TIMEOUT, else 300.
        transport, lanes, socket_ifname, port_range, token, algorithms, deterministic, check_nan: see `Config`; default the environment's.

    Raises:
        ValueError: a setting that is missing or makes no sense.
        RendezvousTimeoutError: ranks did not come; the message names them.
        AuthenticationError: a rank has another token.
    """

    def __init__(
        self,
        init_method: str = "env://",
        *,
        rank: int | None = None,
        world_size: int | None = None,
        store: Any = None,
        name: str = "world",
        timeout_s: float | None = None,
        transport: str | None = None,
        lanes: int | None = None,
        socket_ifname: str | None = None,
        port_range: tuple[int, int] | None = None,
        token: str | None = None,
        algorithms: str | None = None,
        deterministic: bool | None = None,
        check_nan: bool | None = None,
    ) -> None:
        config = Config.from_environment(
            transport=transport,
            lanes=lanes,
            socket_ifname=socket_ifname,
            port_range=port_range,
            token=token,
            algorithms=algorithms,
            deterministic=deterministic,
            check_nan=check_nan,
            timeout_s=timeout_s,
        )
        self._group = _native.Group.form(
            name,
            init_method=init_method,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout_s=config.timeout_s,
            options=config.options(),
            environment=dict(os.environ),
        )
        _open.add(self)

    @property
    def rank(self) -> int:
        """This process's place in the group, from 0."""
        return self._group.rank

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self._group.world_size

    def all_reduce(
        self, tensor: Buffer, op: str = "sum", *, timeout_s: float | None = None, async_op: bool = False
    ) -> Any:
        """Combines `tensor` over all ranks, in place; every rank holds the same bits afterwards.

        Args:
            tensor: any shape; the same shape and dtype on every rank.
            op: "sum", "avg", "min", "max", "product", and of integers and bools "band", "bor", "bxor".
            timeout_s: seconds that this call may take; default the group's.
            async_op: return a `Work` at once.

        Returns:
            `tensor`, or a `Work` that leads to it.

        Raises:
            RankFailedError: a rank died; `error.ranks` names it.
            CollectiveTimeoutError: ranks did not come in time; `error.missing` names them.
            CollectiveMismatchError: `error.rank` called something else.
            ValueError, TypeError: `tensor` cannot be reduced. Nothing was sent.
        """
        return self._run("all_reduce", [], [tensor], tensor, async_op, op=op, timeout_s=timeout_s)

    def reduce(
        self,
        tensor: Buffer,
        root: int = 0,
        op: str = "sum",
        *,
        timeout_s: float | None = None,
        async_op: bool = False,
    ) -> Any:
        """Combines `tensor` over all ranks into that of `root`; the others' stay as they are. Else as `all_reduce`."""
        return self._run("reduce", [], [tensor], tensor, async_op, op=op, root=root, timeout_s=timeout_s)

    def broadcast(
        self, tensor: Buffer, root: int = 0, *, timeout_s: float | None = None, async_op: bool = False
    ) -> Any:
        """Copies the `tensor` of `root` into that of every rank, of the same shape and dtype. Raises as `all_reduce`."""
        return self._run("broadcast", [], [tensor], tensor, async_op, root=root, timeout_s=timeout_s)

    def all_gather(
        self,
        tensor: Buffer,
        out: Buffer | Sequence[Buffer] | None = None,
        *,
        timeout_s: float | None = None,
        async_op: bool = False,
    ) -> Any:
        """Gives every rank all ranks' tensors.

        Args:
            tensor: this rank's part.
            out: where they go: one buffer of `world_size` times the elements, in rank order, or one buffer per rank (then
                parts may have different sizes); default a new array of shape `(world_size, *tensor.shape)`.
            timeout_s: seconds that this call may take; default the group's.
            async_op: return a `Work` at once.

        Returns:
            `out`, or a `Work` that leads to it. Raises as `all_reduce`.
        """
        if out is None:
            out = _new(tensor, (self.world_size, *_shape(tensor)))
        return self._run("all_gather", [tensor], _parts(out), out, async_op, timeout_s=timeout_s)

    def reduce_scatter(
        self,
        tensor: Buffer | Sequence[Buffer],
        out: Buffer | None = None,
        op: str = "sum",
        *,
        timeout_s: float | None = None,
        async_op: bool = False,
    ) -> Any:
        """Combines all ranks' tensors and gives each rank its part.

        Args:
            tensor: one buffer whose first dimension `world_size` divides, or one buffer per rank.
            out: this rank's part; default a new array.
            op: as of `all_reduce`.
            timeout_s: seconds that this call may take; default the group's.
            async_op: return a `Work` at once.

        Returns:
            `out`, or a `Work` that leads to it. Raises as `all_reduce`.
        """
        inputs = _parts(tensor)
        if out is None:
            out = self._part_of(inputs, "reduce_scatter")
        return self._run("reduce_scatter", inputs, [out], out, async_op, op=op, timeout_s=timeout_s)

    def all_to_all(
        self,
        tensor: Buffer | Sequence[Buffer],
        out: Buffer | Sequence[Buffer] | None = None,
        *,
        timeout_s: float | None = None,
        async_op: bool = False,
    ) -> Any:
        """Sends the i-th part of `tensor` to rank i and receives one part from each rank.

        Args:
            tensor: one buffer whose first dimension `world_size` divides, the same on all ranks, or one buffer per rank, of any
                sizes.
            out: as `tensor`; what it has for rank i is as long as what rank i sends. Default: as `tensor`.
            timeout_s: seconds that this call may take; default the group's.
            async_op: return a `Work` at once.

        Returns:
            `out`, or a `Work` that leads to it. Raises as `all_reduce`.
        """
        if out is None:
            out = [_new(part, _shape(part)) for part in tensor] if _is_list(tensor) else _new(tensor, _shape(tensor))
        inputs, outputs = self._cut(tensor, "tensor"), self._cut(out, "out")
        if not _is_list(tensor) and not _is_list(out):
            # One buffer each: all ranks' parts are of one length, and short ones can travel together.
            inputs, outputs = [tensor], [out]
        return self._run("all_to_all", inputs, outputs, out, async_op, timeout_s=timeout_s)

    def gather(
        self,
        tensor: Buffer,
        root: int = 0,
        out: Buffer | Sequence[Buffer] | None = None,
        *,
        timeout_s: float | None = None,
        async_op: bool = False,
    ) -> Any:
        """Gives `root` all ranks' tensors, as `all_gather` does; `out` is used at the root only, others get None."""
        if self.rank != root:
            out = None
        elif out is None:
            out = _new(tensor, (self.world_size, *_shape(tensor)))
        outputs = [] if out is None else _parts(out)
        return self._run("gather", [tensor], outputs, out, async_op, root=root, timeout_s=timeout_s)

    def scatter(
        self,
        tensor: Buffer | Sequence[Buffer] | None,
        out: Buffer,
        root: int = 0,
        *,
        timeout_s: float | None = None,
        async_op: bool = False,
    ) -> Any:
        """Gives each rank its part of the root's `tensor` (one buffer, or one per rank; used at the root only) in `out`."""
        inputs = _parts(tensor) if self.rank == root and tensor is not None else []
        return self._run("scatter", inputs, [out], out, async_op, root=root, timeout_s=timeout_s)

    def barrier(self, *, timeout_s: float | None = None, async_op: bool = False) -> Any:
        """Waits until every rank has come here. Raises as `all_reduce`."""
        return self._run("barrier", [], [], None, async_op, timeout_s=timeout_s)

    def send(
        self, tensor: Buffer, to: int, tag: int = 0, *, timeout_s: float | None = None, async_op: bool = False
    ) -> Any:
        """Sends `tensor` to rank `to`, where it meets a `recv` with the same `tag` (0 to 2**31 - 1)."""
        work = Work(self._group.send(tensor, to, tag, timeout_s))
        return work if async_op else work.wait()

    def recv(
        self,
        tensor: Buffer,
        source: int | None = None,
        tag: int = 0,
        *,
        timeout_s: float | None = None,
        async_op: bool = False,
    ) -> Any:
        """Receives into `tensor`, which is as long as the message, from rank `source`, or from whoever is first.

        Returns:
            The rank that sent it, or a `Work` that leads to it.

        Raises:
            MessageLengthError: the message has another length. The group goes on.
        """
        work = Work(self._group.recv(tensor, source, tag, timeout_s), _SOURCE)
        return work if async_op else work.wait()

    def describe(self) -> Description:
        """Which wire leads to which rank, why, and what has passed; `print` it."""
        return Description.of(self._group.describe())

    def explain(self, collective: str, bytes: int, *, dtype: str = "float32", op: str = "sum") -> Explanation:
        """By which algorithm "all_reduce" and the like go over `bytes` bytes (of a rank's buffer, or part), and why."""
        return Explanation(*self._group.explain(collective, bytes, dtype=dtype, op=op))

    def trace(self) -> str:
        """The last operations of this rank with their times, as JSON: save it for `gradwire trace merge`."""
        return self._group.trace()

    def abort(self, reason: str) -> None:
        """Ends the group at once on every rank: everything under way fails with `reason`."""
        self._group.abort(reason)

    def close(self, timeout_s: float = _CLOSE_TIMEOUT_S) -> None:
        """Leaves the group in good order; what was sent is delivered first, for at most `timeout_s`. May be repeated."""
        _open.discard(self)
        self._group.close(timeout_s)

    def __enter__(self) -> Communicator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.abort(f"{type(error).__name__}: {error}")
        self.close()

    def __repr__(self) -> str:
        return f"<gradwire.Communicator rank {self.rank} of {self.world_size}>"

    def _run(
        self, name: str, inputs: list[Buffer], outputs: list[Buffer], result: Any, async_op: bool, **options: Any
    ) -> Any:
        operation = self._group.run(name, inputs, outputs, background=async_op, **options)
        return result if operation is None else Work(operation, result)

    def _cut(self, buffer: Buffer | Sequence[Buffer], argument: str) -> list[Buffer]:
        if _is_list(buffer):
            return list(buffer)
        rows = _rows(buffer, self.world_size, argument)
        view: Any = buffer if hasattr(buffer, "dtype") else memoryview(cast(Any, buffer))
        return [view[rank * rows : (rank + 1) * rows] for rank in range(self.world_size)]

    def _part_of(self, inputs: list[Buffer], argument: str) -> Buffer:
        if len(inputs) > 1 or self.world_size == 1:
            mine = inputs[min(self.rank, len(inputs) - 1)]
            return _new(mine, _shape(mine))
        rows = _rows(inputs[0], self.world_size, argument)
        return _new(inputs[0], (rows, *_shape(inputs[0])[1:]))


def _is_list(buffer: Any) -> bool:
    return isinstance(buffer, (list, tuple))


def _parts(buffer: Buffer | Sequence[Buffer]) -> list[Buffer]:
    return list(buffer) if _is_list(buffer) else [buffer]


def _shape(buffer: Buffer) -> tuple[int, ...]:
    return tuple(buffer.shape) if hasattr(buffer, "shape") else (len(memoryview(buffer)),)


def _rows(buffer: Buffer, world_size: int, argument: str) -> int:
    shape = _shape(buffer)
    if not shape or shape[0] % world_size:
        raise ValueError(
            f"{argument}: the first dimension of shape {shape} cannot be cut into {world_size} equal parts: pad it, or give "
            "one buffer for each rank. Nothing was sent"
        )
    return shape[0] // world_size


def _new(like: Buffer, shape: tuple[int, ...]) -> Buffer:
    if hasattr(like, "new_empty"):
        return like.new_empty(shape)
    return numpy.empty(shape, numpy.asarray(like).dtype)


@atexit.register
def _close_all() -> None:
    for communicator in list(_open):
        communicator.close(1.0)
