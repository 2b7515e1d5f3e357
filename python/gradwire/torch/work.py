"""Handles of operations under way, as torch.distributed wants them.

Three things are as they are because of how c10d treats a `Work` made in Python:

- c10d wraps it in a C++ object that forwards only `wait` and `get_future`. `look_through` makes the other questions of
  `torch.distributed.Work` find their answer by way of the future, whose value leads back to the work.
- A future's callbacks run inside `set_result`, and may start and wait for another collective (PowerSGD's hook does). They
  run on a growing pool of threads, never on the one that moves bytes.
- `Future.set_exception` stores the exception as a value, which DDP's reducer takes for tensors, and crashes. Only what is
  raised inside `then` is an error to C++.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from .. import _native
from ..errors import CollectiveTimeoutError


class Result(list[Any]):
    """The value of a work's future: its tensors. C++ pickles it to find them, so it pickles as a plain list."""

    work: Work | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)


class Work(dist._Work):
    """An operation under way.

    Args:
        operation: the engine's handle; None for what has already been done.
        results: the tensors that the future's value holds.
        finish: what is left to do once the bytes have come, such as copying into a tensor that is not contiguous.
        device: the CUDA device that the tensors are on; None: host memory.
    """

    def __init__(
        self,
        operation: _native.Operation | _native.Transfer | None,
        results: list[Any],
        finish: Callable[[], None] | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.operation = self._operation = operation
        self.copies_back = finish is not None
        self.device = device
        self._results = results
        self._finish = finish
        self._lock = threading.Lock()
        self._error: Exception | None = None
        self._base: torch.futures.Future[Any] | None = None
        self._future: torch.futures.Future[Any] | None = None
        if operation is not None and finish is not None:
            # Nobody may ever wait, and the tensors must be filled all the same.
            operation.on_done(self._settle)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Waits without the GIL; a `timeout` of 0 is none. Raises what the operation failed with.

        For CUDA tensors the current stream waits, on the device, and the host goes on; how it went is told by the next call of
        the group. With a `timeout`, or where the device cannot wait for the host, the host waits.
        """
        seconds = timeout.total_seconds()
        if self.device is not None and seconds <= 0 and self._orders():
            return True
        if self._operation is not None and not self._operation.wait(seconds if seconds > 0 else None):
            raise CollectiveTimeoutError(
                f"the operation has not ended after {seconds:.3f} s of waiting; it goes on until its own time-out",
                waited_s=seconds,
            )
        self._settle()
        if self._error is not None:
            raise self._error
        return True

    def _orders(self) -> bool:
        """Whether the current stream of the device was made to wait in the host's place."""
        if not isinstance(self._operation, _native.Operation) or self.device is None or self._operation.is_done():
            return False
        stream = torch.cuda.current_stream(self.device)
        return self._operation.order(stream.cuda_stream, stream.device_index)

    def get_future(self) -> torch.futures.Future[Any]:
        """A future of the tensors."""
        with self._lock:
            if self._future is not None:
                return self._future
            self._base = torch.futures.Future(devices=[] if self.device is None else [self.device])
            self._future = self._base.then(self._value)
        if self._operation is None or self._operation.is_done():
            self._complete()
        else:
            self._operation.on_done(self._complete)
        return self._future

    def is_completed(self) -> bool:
        return self._operation is None or self._operation.is_done()

    def is_success(self) -> bool:
        self._settle()
        return self.is_completed() and self._error is None

    def exception(self) -> Exception | None:
        self._settle()
        return self._error

    def result(self) -> list[Any]:
        return list(self._results)

    def source_rank(self) -> int:
        source = None if self._operation is None else self._operation.source
        return -1 if source is None else source

    _source_rank = source_rank

    def synchronize(self) -> None:
        self.wait()

    def _settle(self) -> None:
        """Once the operation has ended, on whatever thread is first: keeps its error, or does what is left to do."""
        if not self.is_completed():
            return
        with self._lock:
            finish, self._finish = self._finish, None
            try:
                if self._operation is not None and self._error is None:
                    self._operation.wait()
                if finish is not None:
                    with torch.no_grad():
                        finish()
            except Exception as error:
                self._error = error

    def _complete(self) -> None:
        self._settle()
        if self._base is not None:
            self._base.set_result(None)

    def _value(self, _base: torch.futures.Future[Any]) -> Result:
        if self._error is not None:
            raise self._error
        result = Result(self._results)
        result.work = self
        return result


def look_through() -> None:
    """Makes `torch.distributed.Work`'s questions reach a work made here. Other backends' works answer as before."""
    outer: Any = c10d.Work
    if getattr(outer, "_gradwire_looks_through", False):
        return
    is_completed, source_rank, result = outer.is_completed, outer.source_rank, outer.result

    def inner(work: Any) -> Work | None:
        try:
            future = work.get_future()
            value = future.value() if future.done() else None
        except Exception:  # another backend's work without a future, or one that failed
            return None
        return getattr(value, "work", None)

    def ask_completed(work: Any) -> bool:
        if is_completed(work):
            return True
        try:
            return bool(work.get_future().done())
        except RuntimeError:  # a backend without futures
            return False

    def ask_source(work: Any) -> int:
        found = inner(work)
        return source_rank(work) if found is None else found.source_rank()

    def ask_result(work: Any) -> list[Any]:
        found = inner(work)
        return result(work) if found is None else found.result()

    outer.is_completed = ask_completed
    outer.source_rank = outer._source_rank = ask_source
    outer.result = ask_result
    outer._gradwire_looks_through = True
