"""c10d's operations in terms of the engine's: lists of tensors in, `Work` out."""

import time

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from .._memory import memory
from .work import GradwireWork

_R = dist.ReduceOp
_OPS = {
    _R.SUM: "sum",
    _R.AVG: "avg",
    _R.MIN: "min",
    _R.MAX: "max",
    _R.PRODUCT: "product",
    _R.BAND: "bit-and",
    _R.BOR: "bit-or",
    _R.BXOR: "bit-xor",
    _R.PREMUL_SUM: "sum",
}
#: Types that are only moved: as bytes.
_MOVED = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
_KNOWN = {
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.uint16,
    torch.int32, torch.uint32, torch.int64, torch.uint64, torch.bool,
}  # fmt: skip
#: Tags below this are the user's.
_MONITOR = 1 << 31


class _Launch:
    """Collects what one c10d call needs: pending operations, tensors to copy back, and what keeps memory alive."""

    def __init__(self, backend, opts):
        self.backend = backend
        timeout = getattr(opts, "timeout", None)
        seconds = timeout.total_seconds() if timeout is not None else -1
        self.timeout_s = seconds if seconds > 0 else None
        # Every c10d call is waited for by its own Work: without asyncOp, at once, so no hand-over to the thread.
        self.start = backend._native.start if getattr(opts, "asyncOp", True) else backend._native.begin
        self.pending, self.after = [], []

    def give(self, tensor):
        """A tensor to read from: dense, contiguous, as it is."""
        tensor = tensor.detach()
        if tensor.is_conj() or tensor.is_neg():
            tensor = tensor.resolve_conj().resolve_neg()
        return tensor.contiguous()

    def take(self, tensor, *, inout=False):
        """A tensor to write to: itself, or a contiguous stand-in that is copied back at the end."""
        tensor = tensor.detach()
        if tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():
            return tensor
        stand_in = tensor.contiguous() if inout else torch.empty(tensor.shape, dtype=tensor.dtype)
        self.after.append(lambda: tensor.copy_(stand_in))
        return stand_in

    def call(self, collective, inputs, outputs, *, op=None, root=None, dtype=None):
        given = [memory(_plain(t, op), f"input {i}", write=False) for i, t in enumerate(inputs)]
        taken = [memory(_plain(t, op), f"output {i}", write=True) for i, t in enumerate(outputs)]
        names = {name for _, name in given + taken} or {dtype or "uint8"}
        if len(names) > 1:
            raise ValueError(f"{collective}: tensors must have the same dtype, got {', '.join(sorted(names))}")
        held = [m for m, _ in given], [m for m, _ in taken]
        self.pending.append(self.start(collective, names.pop(), *held, op, root, self.timeout_s))

    def work(self, result=()):
        after = self.after

        def finish():
            for step in after:
                step()

        return GradwireWork(self.pending, result, finish if after else None)


def _plain(tensor, op):
    """The tensor in a type that the engine knows: complex numbers as pairs of reals, others that only move as bytes."""
    if tensor.dtype in _KNOWN:
        return tensor
    if tensor.dtype.is_complex:
        return torch.view_as_real(tensor)
    if op is not None:
        raise ValueError(f"{op} of {tensor.dtype} is not defined")
    return tensor.view(_MOVED[tensor.element_size()])


def _kind(op):
    kind = getattr(op, "op", op)
    try:
        return _OPS[kind]
    except KeyError:
        raise ValueError(f"reduction {kind} is not supported") from None


def _premultiply(op, tensor):
    """PREMUL_SUM scales each contribution before the sum."""
    return tensor * op.factor if getattr(op, "op", op) == _R.PREMUL_SUM else tensor


class Collectives:
    """The operations; `GradwireBackend` adds the life of the group."""

    def _all_reduce(self, launch, tensor, op):
        target = launch.take(tensor, inout=True)
        if getattr(op, "op", op) == _R.PREMUL_SUM:
            target.mul_(op.factor)
        launch.call("all_reduce", (), (target,), op=_kind(op))

    def allreduce(self, tensors, opts=None):
        opts = opts or c10d.AllreduceOptions()
        launch, tensors = _Launch(self, opts), list(tensors)
        for tensor in tensors:
            if tensor.is_sparse:
                self._all_reduce_sparse(launch, tensor, opts.reduceOp)
            else:
                self._all_reduce(launch, tensor, opts.reduceOp)
        return launch.work(tensors)

    def _all_reduce_sparse(self, launch, tensor, op):
        """The sum of sparse tensors: all ranks' indices and values, gathered, then coalesced."""
        if _kind(op) != "sum":
            raise ValueError("a sparse all_reduce can only sum")
        own = tensor.detach().coalesce()
        counts = torch.zeros(self._size, dtype=torch.int64)
        self._native.run("all_gather", "int64", *self._held((torch.tensor([own._nnz()]),), (counts,)))
        indices = [torch.empty((own.sparse_dim(), n), dtype=torch.int64) for n in counts.tolist()]
        values = [torch.empty((n, *own.values().shape[1:]), dtype=own.dtype) for n in counts.tolist()]
        launch.call("all_gather", (own.indices().contiguous(),), indices)
        launch.call("all_gather", (own.values().contiguous(),), values)

        def finish():
            total = torch.sparse_coo_tensor(torch.cat(indices, 1), torch.cat(values), tensor.shape)
            tensor.copy_(total.coalesce())

        launch.after.append(finish)

    def _held(self, inputs, outputs):
        return [memory(t, "input", write=False)[0] for t in inputs], [memory(t, "output", write=True)[0] for t in outputs]

    def allreduce_coalesced(self, tensors, opts=None):
        return self.allreduce(tensors, opts or c10d.AllreduceCoalescedOptions())

    def broadcast(self, tensors, opts=None):
        opts = opts or c10d.BroadcastOptions()
        launch, tensors = _Launch(self, opts), list(tensors)
        for tensor in tensors:
            launch.call("broadcast", (), (launch.take(tensor, inout=True),), root=opts.rootRank)
        return launch.work(tensors)

    def reduce(self, tensors, opts=None):
        opts = opts or c10d.ReduceOptions()
        launch, tensors, op = _Launch(self, opts), list(tensors), opts.reduceOp
        for tensor in tensors:
            target = launch.take(tensor, inout=True)
            if getattr(op, "op", op) == _R.PREMUL_SUM:
                target = _premultiply(op, target)
                if self._rank == opts.rootRank:
                    launch.after.append(lambda tensor=tensor, target=target: tensor.detach().copy_(target))
            launch.call("reduce", (), (target,), op=_kind(op), root=opts.rootRank)
        return launch.work(tensors)

    def allgather(self, outputs, inputs, opts=None):
        launch = _Launch(self, opts or c10d.AllgatherOptions())
        outputs = [list(group) for group in outputs]
        for group, tensor in zip(outputs, inputs, strict=True):
            if len(group) != self._size:
                raise ValueError(f"all_gather: {self._size} output tensors are needed, one a rank, got {len(group)}")
            launch.call("all_gather", (launch.give(tensor),), [launch.take(t) for t in group])
        return launch.work(outputs)

    def allgather_coalesced(self, outputs, inputs, opts=None):
        outputs = [list(group) for group in outputs]
        by_tensor = [[group[i] for group in outputs] for i in range(len(list(inputs)))]
        return self.allgather(by_tensor, inputs, opts)

    def all_gather_single(self, output, input, opts=None):
        return self.all_gather_single_coalesced([output], [input], opts)

    def all_gather_single_coalesced(self, outputs, inputs, opts=None):
        launch, outputs = _Launch(self, opts or c10d.AllgatherOptions()), list(outputs)
        for output, tensor in zip(outputs, inputs, strict=True):
            launch.call("all_gather", (launch.give(tensor),), (launch.take(output),))
        return launch.work(outputs)

    def gather(self, outputs, inputs, opts=None):
        opts = opts or c10d.GatherOptions()
        launch, outputs = _Launch(self, opts), [list(group) for group in outputs]
        for i, tensor in enumerate(inputs):
            group = [launch.take(t) for t in outputs[i]] if self._rank == opts.rootRank else []
            launch.call("gather", (launch.give(tensor),), group, root=opts.rootRank)
        return launch.work(outputs)

    def scatter(self, outputs, inputs, opts=None):
        opts = opts or c10d.ScatterOptions()
        launch, outputs, inputs = _Launch(self, opts), list(outputs), [list(group) for group in inputs]
        for i, tensor in enumerate(outputs):
            group = [launch.give(t) for t in inputs[i]] if self._rank == opts.rootRank else []
            launch.call("scatter", group, (launch.take(tensor),), root=opts.rootRank)
        return launch.work(outputs)

    def reduce_scatter(self, outputs, inputs, opts=None):
        opts = opts or c10d.ReduceScatterOptions()
        launch, outputs, op = _Launch(self, opts), list(outputs), opts.reduceOp
        for output, group in zip(outputs, inputs, strict=True):
            given = [launch.give(_premultiply(op, t)) for t in group]
            launch.call("reduce_scatter", given, (launch.take(output),), op=_kind(op))
        return launch.work(outputs)

    def reduce_scatter_single(self, output, input, opts=None):
        return self.reduce_scatter_single_coalesced([output], [input], opts)

    def reduce_scatter_single_coalesced(self, outputs, inputs, opts=None):
        opts = opts or c10d.ReduceScatterOptions()
        launch, outputs, op = _Launch(self, opts), list(outputs), opts.reduceOp
        for output, tensor in zip(outputs, inputs, strict=True):
            given = launch.give(_premultiply(op, tensor))
            launch.call("reduce_scatter", (given,), (launch.take(output),), op=_kind(op))
        return launch.work(outputs)

    def all_to_all_single(self, output, input, output_splits, input_splits, opts=None):
        launch = _Launch(self, opts or c10d.AllToAllOptions())
        given, taken = launch.give(input), launch.take(output)
        launch.call("all_to_all", self._split(given, input_splits, "input"), self._split(taken, output_splits, "output"))
        return launch.work([output])

    def _split(self, tensor, splits, what):
        rows = tensor.size(0) if tensor.dim() else 0
        if not splits:
            if rows % self._size:
                raise RuntimeError("Tensor's dim 0 does not divide equally across group size")
            splits = [rows // self._size] * self._size
        elif len(splits) != self._size or sum(splits) != rows:
            raise RuntimeError(f"Split sizes doesn't match total dim 0 size: {what} has {rows} rows, splits {list(splits)}")
        return list(tensor.split(list(splits)))

    def alltoall(self, outputs, inputs, opts=None):
        launch, outputs = _Launch(self, opts or c10d.AllToAllOptions()), list(outputs)
        launch.call("all_to_all", [launch.give(t) for t in inputs], [launch.take(t) for t in outputs])
        return launch.work(outputs)

    def barrier(self, opts=None):
        launch = _Launch(self, opts or c10d.BarrierOptions())
        launch.call("barrier", (), ())
        return launch.work()

    def send(self, tensors, dst, tag=0):
        (tensor,) = tensors
        if not tensor.is_contiguous():
            raise ValueError("send: Tensors must be contiguous")
        held, _ = memory(_plain(tensor.detach(), None), "tensor", write=False)
        return GradwireWork([self._native.send(dst, tag, held)], [tensor])

    def recv(self, tensors, src, tag=0):
        (tensor,) = tensors
        if not tensor.is_contiguous():
            raise ValueError("recv: Tensors must be contiguous")
        held, _ = memory(_plain(tensor.detach(), None), "tensor", write=True)
        return GradwireWork([self._native.recv(src, tag, held)], [tensor])

    def recv_anysource(self, tensors, tag=0):
        return self.recv(tensors, None, tag)

    def monitored_barrier(self, opts, wait_all_ranks=False):
        """Rank 0 hears from everybody, then releases everybody; who is missing is named."""
        ms = round(opts.timeout.total_seconds() * 1000)
        if ms < 0:
            ms = round(self._options._timeout.total_seconds() * 1000)
        self._barriers += 1
        tag, deadline = _MONITOR | (self._barriers & 0xFFFFFF), time.monotonic() + ms / 1000
        word = torch.zeros(1, dtype=torch.uint8)
        held, _ = memory(word, "word", write=True)
        left = lambda: max(0.001, deadline - time.monotonic())  # noqa: E731
        if self._rank != 0:
            try:
                self._native.send(0, tag, held).wait(left())
                if self._native.recv(0, tag, held, left()).wait() is not None:
                    return
            except RuntimeError:
                pass
            raise RuntimeError(
                f"Rank {self._rank} successfully reached monitoredBarrier, but received errors while waiting for "
                "send/recv from rank 0. Please check rank 0 logs for faulty rank."
            )
        missing = []
        for rank in range(1, self._size):
            try:
                self._native.recv(rank, tag, held, left()).wait()
            except RuntimeError:
                if not wait_all_ranks and ms == 0:
                    raise RuntimeError(f"Rank 0 timed out in monitoredBarrier after {ms} ms.") from None
                if not wait_all_ranks:
                    raise RuntimeError(f"Rank {rank} failed to pass monitoredBarrier in {ms} ms") from None
                missing.append(rank)
        if missing:
            raise RuntimeError(f"Ranks {', '.join(map(str, missing))} failed to pass monitoredBarrier in {ms} ms")
        for rank in range(1, self._size):
            self._native.send(rank, tag, held)
