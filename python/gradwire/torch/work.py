"""Operations of the backend as `torch.distributed` wants to see them."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

#: Threads that complete futures. A callback may start and wait for another collective (PowerSGD's does), so each waiting
#: future has a thread of its own; idle ones are used again.
_POOL = None
_POOL_LOCK = threading.Lock()


def _pool():
    global _POOL
    with _POOL_LOCK:
        if _POOL is None:
            _POOL = ThreadPoolExecutor(max_workers=4096, thread_name_prefix="gradwire-future")
        return _POOL


class Result(list):
    """A future's value: the tensors, and the way back to the work. Pickles as a plain list, which C++ asks for."""

    work = None

    def __reduce__(self):
        return (list, (list(self),))


class GradwireWork(dist._Work):
    """One operation, or several that end together.

    c10d wraps this object in a C++ one that forwards only `wait` and `get_future`; `look_through` mends the rest.
    """

    def __init__(self, pending, result=(), finish=None):
        super().__init__()
        self._pending = pending
        self._result = list(result)
        self._finish = finish
        self._lock = threading.Lock()
        self._over = False
        self._error = None
        self._source = -1
        self._future = None

    def _settle(self, timeout_s):
        """Waits, then does what is left to do on this side; False when the time is up."""
        for pending in self._pending:
            try:
                done = pending.wait(timeout_s)
            except Exception as error:
                self._error = self._error or error
                continue
            if done is None:
                return False
            if done[0] is not None:
                self._source = done[0]
        with self._lock:
            if not self._over:
                self._over = True
                if self._error is None and self._finish is not None:
                    with torch.no_grad():
                        self._finish()
                self._finish = None
                # Dropped here, where the interpreter is held: memory of tensors goes back.
                self._pending = ()
        return True

    def wait(self, timeout=timedelta(0)):
        seconds = timeout.total_seconds() if timeout else 0
        if not self._settle(seconds if seconds > 0 else None):
            raise dist.DistBackendError(f"gradwire: the operation has not ended within {seconds:g} s")
        if self._error is not None:
            raise self._error
        return True

    def get_future(self):
        with self._lock:
            if self._future is not None:
                return self._future
            base = torch.futures.Future()
            # set_exception() would store the exception as a value, which DDP's reducer takes for tensors; an exception
            # raised in then() is one for C++ too.
            self._future = base.then(self._convert)
        if self.is_completed():
            self._complete(base)
        else:
            _pool().submit(self._complete, base)
        return self._future

    def _complete(self, base):
        self._settle(None)
        base.set_result(None)

    def _convert(self, _base):
        if self._error is not None:
            raise self._error
        result = Result(self._result)
        result.work = self
        return result

    def is_completed(self):
        return self._over or all(pending.is_done() for pending in self._pending)

    def is_success(self):
        return self.is_completed() and self._settle(None) and self._error is None

    def exception(self):
        return self._error

    def result(self):
        return self._result

    def synchronize(self):
        self.wait()

    def source_rank(self):
        self._settle(None)
        return self._source

    _source_rank = source_rank


def look_through():
    """Lets `is_completed`, `source_rank` and `result` of c10d's wrapper reach the work that it holds."""
    if getattr(c10d.Work, "_gradwire", False):
        return
    before = {name: getattr(c10d.Work, name) for name in ("is_completed", "source_rank", "result")}

    def work_of(wrapper):
        try:
            future = wrapper.get_future()
            return getattr(future.value(), "work", None) if future.done() else None
        except Exception:
            return None

    def is_completed(self):
        if before["is_completed"](self):
            return True
        try:
            return self.get_future().done()
        except Exception:
            return False

    def source_rank(self):
        work = work_of(self)
        return before["source_rank"](self) if work is None else work.source_rank()

    def result(self):
        work = work_of(self)
        return before["result"](self) if work is None else list(work.result())

    c10d.Work.is_completed = is_completed
    c10d.Work.source_rank = c10d.Work._source_rank = source_rank
    c10d.Work.result = result
    c10d.Work._gradwire = True
