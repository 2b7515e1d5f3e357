"""Sparse tables: rows by 64-bit id on parameter servers, for embeddings."""

from dataclasses import dataclass

import numpy


@dataclass(frozen=True)
class Uniform:
    """First values anywhere in `low..high`; a function of seed, table and id alone."""

    low: float = -0.05
    high: float = 0.05

    def _native(self):
        return ("uniform", [self.low, self.high])


@dataclass(frozen=True)
class Normal:
    """First values normally distributed; a function of seed, table and id alone."""

    mean: float = 0.0
    std: float = 0.01

    def _native(self):
        return ("normal", [self.mean, self.std])


@dataclass(frozen=True)
class LRU:
    """The row that was pushed to least lately makes room for a new one. Needs a capacity."""

    def _native(self):
        return ("lru", 0.0)


@dataclass(frozen=True)
class LFU:
    """The row that was pushed to least often makes room for a new one; of those the least lately. Needs a capacity."""

    def _native(self):
        return ("lfu", 0.0)


@dataclass(frozen=True)
class TTL:
    """Rows that nobody pushed to for `seconds` are dropped, to within 0.35 s."""

    seconds: float

    def _native(self):
        return ("ttl", float(self.seconds))


@dataclass(frozen=True)
class Making:
    """How a sparse table is made, in the names that the engine looks for."""

    initializer: tuple[str, list[float]]
    seed: int
    capacity: int | None
    eviction: tuple[str, float] | None
    admission: int
    workers: int | None
    staleness: int | None
    average: bool
    recovery: str
    compression: tuple[tuple[str, float], tuple[str, float]]
    max_grad_norm: float | None


def making(initializer, seed, capacity, eviction, admission, workers, staleness, average, recovery, compression, max_grad_norm):
    """What `Client.sparse` was told, for the engine."""
    if initializer == "zeros":
        first = ("zeros", [])
    elif isinstance(initializer, (int, float)):
        first = ("constant", [float(initializer)])
    elif hasattr(initializer, "_native"):
        first = initializer._native()
    else:
        raise ValueError(f'initializer {initializer!r}: pass "zeros", a number, Uniform(...) or Normal(...)')
    if eviction is not None and not hasattr(eviction, "_native"):
        raise ValueError(f"eviction {eviction!r}: pass None, LRU(), LFU() or TTL(seconds)")
    evicts = None if eviction is None else eviction._native()
    most = None if max_grad_norm is None else float(max_grad_norm)
    return Making(first, seed, capacity, evicts, admission, workers, staleness, average, recovery, compression, most)


class SparseTable:
    """Rows of `dim` elements by 64-bit id, spread over all servers by a hash.

    A row is made when it is first pushed to; until then a pull gives what it would begin with.
    """

    def __init__(self, native, work, name, dim, dtype):
        self._native, self._work, self.name, self.dim, self.dtype = native, work, name, dim, dtype

    @property
    def clock(self):
        """Pushes made by this client."""
        return self._native.clock

    def push(self, ids, gradients):
        """Adds a gradient, of `dim` elements, to the row of each id. Those of an id that comes twice are summed first.

        Args:
            ids: int64 or uint64, of any shape.
            gradients: of the shape of `ids` and one dimension more; a shorter float than the table's travels as it is.

        Raises:
            ServerRefusedError: the table, or a server, is full; nothing of a server's part was counted.
        """
        self.push_async(ids, gradients).wait()

    def push_async(self, ids, gradients):
        """Starts `push`. Both arrays are free again when this returns."""
        ids = _ids(ids)
        self._check(ids, gradients, "gradients")
        return self._work(self._native.push(ids, gradients))

    def pull(self, ids, out=None):
        """Reads the row of each id into `out` (a new array where there is none), and returns it.

        On a table with workers a worker gets what its own last push led to, and waits for other workers as far as it must.
        """
        return self.pull_async(ids, out).wait()

    def pull_async(self, ids, out=None):
        """Starts `pull`. The ids are free again when this returns."""
        ids = _ids(ids)
        if out is None:
            out = numpy.empty((*ids.shape, self.dim), self.dtype)
        self._check(ids, out, "out")
        return self._work(self._native.pull(ids, out), out)

    def evicted(self):
        """The ids that were evicted since this client last asked (uint64), and how many more the servers have forgotten."""
        ids, lost = self._native.evicted()
        return numpy.array(ids, numpy.uint64), lost

    def set_learning_rate(self, lr):
        """Sets the learning rate, from this worker's next push on; all workers must set the same."""
        self._native.set_learning_rate(lr)

    def set_schedule(self, schedule):
        """Sets the learning rates of all clocks to come, from this worker's next push on: one of `gradwire.schedules`.

        The servers work them out by themselves, so no message a step is needed; all workers must set the same.
        """
        self._native.set_schedule(schedule._native())

    def _check(self, ids, value, argument):
        wanted, shape = (*ids.shape, self.dim), tuple(getattr(value, "shape", ()))
        if shape != wanted:
            raise ValueError(f"table {self.name!r}: {argument} has shape {shape}, and for these ids must have {wanted}")


def _ids(ids):
    return ids if hasattr(ids, "shape") else numpy.asarray(ids, numpy.int64)
