"""A group of ranks over NumPy arrays, torch tensors and anything with the buffer protocol."""

import os

from . import _environment, _native
from ._memory import memory

_OPS = ("sum", "avg", "min", "max", "product", "bit-and", "bit-or", "bit-xor")


class Work:
    """An operation under way. Leave its arrays alone until `wait()` returns."""

    def __init__(self, pending):
        self._pending = pending

    def wait(self, timeout_s=None):
        """Waits until the operation has ended.

        Args:
            timeout_s: seconds to wait at most; the operation goes on after that.

        Returns:
            The source rank of a receive, else None.

        Raises:
            TimeoutError: `timeout_s` has passed.
            GradwireError: the operation failed; see `Communicator`.
        """
        done = self._pending.wait(timeout_s)
        if done is None:
            raise TimeoutError(f"the operation has not ended within {timeout_s} s; it goes on")
        return done[0]

    def is_done(self):
        """Whether the operation has ended, well or not."""
        return self._pending.is_done()


class Communicator:
    """This process's place in a group of ranks.

    Collectives are called by every rank, in the same order, with the same dtype and number of elements. Arrays are
    contiguous, of any shape: float32, float64, float16, bfloat16 (torch), integers of 8 to 64 bits, bool. Every method that
    moves data has an `_async` twin, which returns a `Work`.

    Args:
        init_method: where ranks meet: "env://" (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, as torchrun sets them; also
            Open MPI's, PMI's and Slurm's), "tcp://host:port" (rank 0 serves it), "file:///folder" (new for each run).
        rank, world_size: place and size; by default from the URL's query or the environment.
        store: instead of `init_method`, an object with `set(key, value)` and `get(key, timeout_s)`.
        name: tells groups apart that meet at the same place.
        timeout_s: seconds that forming the group, and each operation, may take. Default 300.
        transport: "auto", "tcp" or "shm".
        token: secret that all ranks share.

    Raises:
        RendezvousTimeoutError: ranks did not come; the message names them.
        AuthenticationError: another token.
        ValueError: a setting that makes no sense.

    After `RankFailedError`, `CollectiveTimeoutError`, `CollectiveMismatchError` or `GroupAbortedError` the group is over on
    every rank, with the same verdict: close it and form a new one.
    """

    def __init__(
        self,
        init_method="env://",
        *,
        rank=None,
        world_size=None,
        store=None,
        name="default",
        timeout_s=None,
        transport=None,
        lanes=None,
        token=None,
        algorithms=None,
    ):
        options = _environment.read(timeout=timeout_s, transport=transport, lanes=lanes, token=token, algo=algorithms)
        meeting = store if store is not None else init_method
        self._native = _native.Communicator.connect(meeting, name, rank, world_size, dict(os.environ), options)

    @property
    def rank(self):
        """This process's place, from 0."""
        return self._native.rank

    @property
    def world_size(self):
        """The number of ranks."""
        return self._native.world_size

    def all_reduce(self, array, op="sum", *, timeout_s=None):
        """Combines `array` over all ranks, in place: sum, avg, min, max, product, bit-and, bit-or, bit-xor."""
        self._run("all_reduce", (), (array,), op=op, timeout_s=timeout_s)

    def all_reduce_async(self, array, op="sum", *, timeout_s=None):
        """Starts `all_reduce`."""
        return self._start("all_reduce", (), (array,), op=op, timeout_s=timeout_s)

    def reduce(self, array, root=0, op="sum", *, timeout_s=None):
        """Combines `array` over all ranks into `root`'s; the others' stay as they are."""
        self._run("reduce", (), (array,), op=op, root=root, timeout_s=timeout_s)

    def reduce_async(self, array, root=0, op="sum", *, timeout_s=None):
        """Starts `reduce`."""
        return self._start("reduce", (), (array,), op=op, root=root, timeout_s=timeout_s)

    def broadcast(self, array, root=0, *, timeout_s=None):
        """Fills every rank's `array` with `root`'s."""
        self._run("broadcast", (), (array,), root=root, timeout_s=timeout_s)

    def broadcast_async(self, array, root=0, *, timeout_s=None):
        """Starts `broadcast`."""
        return self._start("broadcast", (), (array,), root=root, timeout_s=timeout_s)

    def all_gather(self, array, out, *, timeout_s=None):
        """Gathers every rank's `array` into `out`: one array of `world_size` parts, or a list of one array per rank, of any
        lengths."""
        self._run("all_gather", (array,), _list(out), timeout_s=timeout_s)

    def all_gather_async(self, array, out, *, timeout_s=None):
        """Starts `all_gather`."""
        return self._start("all_gather", (array,), _list(out), timeout_s=timeout_s)

    def reduce_scatter(self, array, out, op="sum", *, timeout_s=None):
        """Combines all ranks' `array` (of `world_size` parts, or a list) and leaves part i in rank i's `out`."""
        self._run("reduce_scatter", _list(array), (out,), op=op, timeout_s=timeout_s)

    def reduce_scatter_async(self, array, out, op="sum", *, timeout_s=None):
        """Starts `reduce_scatter`."""
        return self._start("reduce_scatter", _list(array), (out,), op=op, timeout_s=timeout_s)

    def all_to_all(self, arrays, outs, *, timeout_s=None):
        """Sends `arrays[i]` to rank i, and fills `outs[i]` from rank i; lengths may differ."""
        self._run("all_to_all", tuple(arrays), tuple(outs), timeout_s=timeout_s)

    def all_to_all_async(self, arrays, outs, *, timeout_s=None):
        """Starts `all_to_all`."""
        return self._start("all_to_all", tuple(arrays), tuple(outs), timeout_s=timeout_s)

    def gather(self, array, out=None, root=0, *, timeout_s=None):
        """Gathers every rank's `array` into `root`'s `out`, as in `all_gather`; `out` is None elsewhere."""
        self._run("gather", (array,), () if out is None else _list(out), root=root, timeout_s=timeout_s)

    def scatter(self, array, out, root=0, *, timeout_s=None):
        """Fills rank i's `out` with part i of `root`'s `array` (or list); `array` is None elsewhere."""
        self._run("scatter", () if array is None else _list(array), (out,), root=root, timeout_s=timeout_s)

    def barrier(self, *, timeout_s=None):
        """Returns once every rank has called it."""
        self._native.run("barrier", "uint8", [], [], timeout_s=timeout_s)

    def send(self, array, to, tag=0, *, timeout_s=None):
        """Sends `array` to rank `to`; returns once it may be written again."""
        self.send_async(array, to, tag, timeout_s=timeout_s).wait()

    def send_async(self, array, to, tag=0, *, timeout_s=None):
        """Starts `send`."""
        held, _ = memory(array, "array", write=False)
        return Work(self._native.send(to, tag, held, timeout_s))

    def recv(self, array, source=None, tag=0, *, timeout_s=None):
        """Receives into `array` from rank `source`, or from whoever is first; returns the source."""
        return self.recv_async(array, source, tag, timeout_s=timeout_s).wait()

    def recv_async(self, array, source=None, tag=0, *, timeout_s=None):
        """Starts `recv`."""
        held, _ = memory(array, "array", write=True)
        return Work(self._native.recv(source, tag, held, timeout_s))

    def describe(self):
        """The group as it stands: a dict with each rank's host, wire, reason and traffic; `["text"]` is for people."""
        return self._native.describe()

    def abort(self, reason="aborted by the user"):
        """Ends the group at once, on every rank: everything under way fails with `reason`."""
        self._native.abort(reason)

    def close(self, timeout_s=5.0):
        """Leaves the group in good order. Idempotent; also at the end of a `with` block."""
        self._native.close(timeout_s)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.close()
        else:
            self.abort(f"{kind.__name__} in a `with` block")

    def _run(self, collective, inputs, outputs, *, op=None, root=None, timeout_s=None):
        dtype, inputs, outputs = _check(collective, inputs, outputs, op)
        self._native.run(collective, dtype, inputs, outputs, op, root, timeout_s)

    def _start(self, collective, inputs, outputs, *, op=None, root=None, timeout_s=None):
        dtype, inputs, outputs = _check(collective, inputs, outputs, op)
        return Work(self._native.start(collective, dtype, inputs, outputs, op, root, timeout_s))


def _list(value):
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _check(collective, inputs, outputs, op):
    if op is not None and op not in _OPS:
        raise ValueError(f"{collective}: op must be one of {', '.join(_OPS)}, got {op!r}")
    given = [memory(value, f"input {i}", write=False) for i, value in enumerate(inputs)]
    taken = [memory(value, f"output {i}", write=True) for i, value in enumerate(outputs)]
    dtypes = {dtype for _, dtype in given + taken}
    if len(dtypes) != 1:
        raise ValueError(f"{collective}: all arrays must have one dtype, got {', '.join(sorted(dtypes)) or 'no array'}")
    return dtypes.pop(), [held for held, _ in given], [held for held, _ in taken]
