"""The backend `gradwire` of torch.distributed: c10d's calls, handed to the engine.

The names and arguments of the methods are c10d's. Each returns a `Work`, or None for what is already done: a call that is
not asynchronous is carried out by the caller's own thread, which saves the hand-over to another.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch._C import _distributed_c10d as c10d
from torch.distributed.constants import default_pg_timeout

from .. import _native
from ..communicator import Description, Explanation
from ..config import Config
from . import monitor, sparse, timeouts
from .coalescing import Coalescing
from .reconfigure import look_up_place, new_handle, place_among, warn_of_new_size
from .tensors import Staging, rank_views
from .work import Work

NAME = "gradwire"
#: Inputs and outputs of collectives that make up one operation of c10d.
_Calls = list[tuple[list[Tensor], list[Tensor]]]
_CLOSE_TIMEOUT_S = 5.0

# c10d's wrapper of TORCH_DISTRIBUTED_DEBUG=DETAIL does not keep the Python half of a backend alive.
_live: set[GradwireBackend] = set()

_OPS = {
    c10d.ReduceOp.SUM: "sum",
    c10d.ReduceOp.AVG: "avg",
    c10d.ReduceOp.PRODUCT: "product",
    c10d.ReduceOp.MIN: "min",
    c10d.ReduceOp.MAX: "max",
    c10d.ReduceOp.BAND: "band",
    c10d.ReduceOp.BOR: "bor",
    c10d.ReduceOp.BXOR: "bxor",
    c10d.ReduceOp.PREMUL_SUM: "sum",
}


class Options(c10d.Backend.Options):
    """Options of one process group: `init_process_group("gradwire", pg_options=gradwire.torch.Options(deterministic=True))`.

    Args:
        deterministic: floats are combined in rank order, whatever the buckets, the algorithm and the wire; default
            GRADWIRE_DETERMINISTIC.
        check_nan: what this rank gives collectives is looked through for NaN, which ends the group with who gave it; default
            GRADWIRE_CHECK_NAN.
        timeout: how long an operation may take; default that of `init_process_group`, else GRADWIRE_TIMEOUT, else 300 s.
    """

    def __init__(
        self, *, deterministic: bool | None = None, check_nan: bool | None = None, timeout: timedelta | None = None
    ) -> None:
        seconds = Config.from_environment(timeout_s=timeout.total_seconds() if timeout else None).timeout_s
        super().__init__(NAME, timeout=timedelta(seconds=seconds))
        self.deterministic = deterministic
        self.check_nan = check_nan
        self.says_timeout = timeout is not None


class GradwireBackend(c10d.Backend):
    """One process group on the engine. Made by `create`, which torch.distributed calls."""

    def __init__(
        self, store: Any, rank: int, size: int, options: Any, name: str, timeout: timedelta = default_pg_timeout
    ) -> None:
        super().__init__(rank, size)
        self._options = options
        self._store = store
        self._name = name
        self._timeout = timeouts.of_group(options, timeout)
        self._sequence = 0
        self._barriers = 0
        self._coalescing: Coalescing | None = None
        self._handle = new_handle()
        self._numbers: set[int] = set()
        self._formed: _native.Group | None = None
        if not getattr(options, "enable_reconfigure", False):
            self._form(store, rank, size, name)

    # What c10d asks of every backend. Reading an inherited `supports_*` calls itself for ever: each is defined here.
    supports_splitting = property(lambda self: True)
    supports_coalescing = property(lambda self: True)
    supports_shrinking = property(lambda self: False)
    supports_reconfigure = property(lambda self: True)
    supports_window = property(lambda self: False)
    _supports_time_estimate = property(lambda self: False)

    @property
    def options(self) -> Any:
        return self._options

    def getBackendName(self) -> str:
        return NAME

    def rank(self) -> int:
        """This process's place; after `reconfigure`, the new one."""
        return super().rank() if self._formed is None else self._formed.rank

    def size(self) -> int:
        """The number of ranks; after `reconfigure`, the new one."""
        return super().size() if self._formed is None else self._formed.world_size

    def get_reconfigure_handle(self) -> str:
        """What names this process to the others in `reconfigure`."""
        return self._handle

    def reconfigure(self, opts: Any) -> Work:
        """Leaves the group as it is, in whatever state, and meets the ranks of `opts.handles` in a new one.

        Raises:
            ValueError: the handles or the uuid cannot be right. Nothing was changed.
            RendezvousTimeoutError: not all came within the time-out.
        """
        rank, size = place_among(opts.handles, self._handle)
        if opts.uuid in self._numbers:
            raise ValueError(f"reconfigure: uuid {opts.uuid} has been used before: give a new one each time")
        self._numbers.add(opts.uuid)
        if self._formed is not None:
            self._formed.close(_CLOSE_TIMEOUT_S)
        store = c10d.PrefixStore(f"reconfigure/{opts.uuid}", self._store)
        seconds = opts.timeout.total_seconds() if opts.timeout is not None else self._timeout
        self._form(store, rank, size, f"{self._name}/{opts.uuid}", seconds)
        warn_of_new_size(super().size(), size)
        if (rank, size) != (super().rank(), super().size()):
            look_up_place(GradwireBackend)
        return Work(None, [])

    def explain(self, collective: str, bytes: int, *, dtype: str = "float32", op: str = "sum") -> Explanation:
        """By which algorithm "all_reduce" and the like go over `bytes` bytes (of a rank's buffer, or part), and why."""
        return Explanation(*self._group.explain(collective, bytes, dtype=dtype, op=op))

    def describe(self) -> Description:
        """Which wire leads to which rank, and why; `str()` of it is for people."""
        return Description.of(self._group.describe())

    def trace(self) -> str:
        """The last operations of this rank with their times, as JSON: save it for `gradwire trace merge`."""
        return self._group.trace()

    def supports_tensor_alloc(self, device: torch.device) -> bool:
        return torch.device(device).type == "cpu"

    def allocate_tensor(self, size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor of `size` elements, not set, in memory that an RDMA device of the group knows already."""
        if not self.supports_tensor_alloc(device):
            raise ValueError(f"device: {device} is not host memory")
        if size == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self._group.allocate(size * dtype.itemsize), dtype=dtype, count=size)

    def allreduce(self, tensors: Sequence[Tensor], opts: Any = c10d.AllreduceOptions()) -> Work | None:
        if tensors and tensors[0].is_sparse:
            return sparse.all_reduce(self._group, list(tensors), opts)
        return self._each("all_reduce", [([], [tensor]) for tensor in tensors], list(tensors), opts, opts.reduceOp)

    allreduce_sparse = allreduce
    allreduce_coalesced = allreduce

    def broadcast(self, tensors: Sequence[Tensor], opts: Any = c10d.BroadcastOptions()) -> Work | None:
        calls: _Calls = [([], [tensor]) for tensor in tensors]
        return self._each("broadcast", calls, list(tensors), opts, root=opts.rootRank)

    def reduce(self, tensors: Sequence[Tensor], opts: Any = c10d.ReduceOptions()) -> Work | None:
        calls: _Calls = [([], [tensor]) for tensor in tensors]
        return self._each("reduce", calls, list(tensors), opts, opts.reduceOp, root=opts.rootRank)

    def allgather(
        self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any = c10d.AllgatherOptions()
    ) -> Work | None:
        calls = [([one], list(outs)) for one, outs in zip(inputs, outputs, strict=True)]
        return self._each("all_gather", calls, [list(outs) for outs in outputs], opts)

    def allgather_coalesced(
        self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any = c10d.AllgatherOptions()
    ) -> Work | None:
        # outputs[rank][i] belongs to inputs[i].
        calls = [([one], [outs[at] for outs in outputs]) for at, one in enumerate(inputs)]
        return self._each("all_gather", calls, [list(outs) for outs in outputs], opts)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = c10d.AllgatherOptions()) -> Work | None:
        return self._each("all_gather", [([input], [output])], [output], opts)

    def all_gather_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = c10d.AllgatherOptions()
    ) -> Work | None:
        calls = [([one], [out]) for one, out in zip(inputs, outputs, strict=True)]
        return self._each("all_gather", calls, list(outputs), opts)

    def gather(
        self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any = c10d.GatherOptions()
    ) -> Work | None:
        at_root = self.rank() == opts.rootRank
        calls = [([one], list(outputs[at]) if at_root else []) for at, one in enumerate(inputs)]
        return self._each("gather", calls, [list(outs) for outs in outputs], opts, root=opts.rootRank)

    def scatter(
        self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any = c10d.ScatterOptions()
    ) -> Work | None:
        at_root = self.rank() == opts.rootRank
        calls = [(list(inputs[at]) if at_root else [], [one]) for at, one in enumerate(outputs)]
        return self._each("scatter", calls, list(outputs), opts, root=opts.rootRank)

    def reduce_scatter(
        self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any = c10d.ReduceScatterOptions()
    ) -> Work | None:
        calls = [(list(ins), [out]) for ins, out in zip(inputs, outputs, strict=True)]
        return self._each("reduce_scatter", calls, list(outputs), opts, opts.reduceOp)

    def reduce_scatter_single(
        self, output: Tensor, input: Tensor, opts: Any = c10d.ReduceScatterOptions()
    ) -> Work | None:
        return self._each("reduce_scatter", [([input], [output])], [output], opts, opts.reduceOp)

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = c10d.ReduceScatterOptions()
    ) -> Work | None:
        calls = [([one], [out]) for one, out in zip(inputs, outputs, strict=True)]
        return self._each("reduce_scatter", calls, list(outputs), opts, opts.reduceOp)

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
        opts: Any = c10d.AllToAllOptions(),
    ) -> Work | None:
        # The parts of a contiguous tensor are contiguous; those of another are staged one by one.
        outputs = rank_views(output, output_splits, self.size(), "output")
        inputs = rank_views(input, input_splits, self.size(), "input")
        if not (output_splits or input_splits) and output.is_contiguous() and input.is_contiguous():
            # Parts of one length, as far as this rank knows: short ones can travel together, where all ranks say so.
            inputs, outputs = [input], [output]
        return self._each("all_to_all", [(inputs, outputs)], [output], opts)

    def alltoall(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = c10d.AllToAllOptions()
    ) -> Work | None:
        return self._each("all_to_all", [(list(inputs), list(outputs))], list(outputs), opts)

    def barrier(self, opts: Any = c10d.BarrierOptions()) -> Work | None:
        return self._each("barrier", [([], [])], [], opts)

    def monitored_barrier(self, opts: Any, wait_all_ranks: bool = False) -> None:
        timeout = opts.timeout.total_seconds()
        self._barriers += 1
        # What PyTorch gives where the caller gave none; the group's is meant.
        unsaid = timeout < 0 or opts.timeout == default_pg_timeout
        monitor.barrier(self._group, self._barriers, self._timeout if unsaid else timeout, wait_all_ranks)

    def send(self, tensors: Sequence[Tensor], dst: int, tag: int = 0) -> Work:
        (tensor,) = tensors
        staging = Staging()
        self._sequence += 1
        operation = self._group.send(staging.input(tensor), dst, tag)
        return self._begun(Work(operation, [tensor], device=staging.device))

    def recv(self, tensors: Sequence[Tensor], src: int, tag: int = 0) -> Work:
        return self._receive(tensors, src, tag)

    def recv_anysource(self, tensors: Sequence[Tensor], tag: int = 0) -> Work:
        return self._receive(tensors, None, tag)

    def start_coalescing(self) -> None:
        """What is called from here on becomes one work, which `end_coalescing` returns."""
        self._coalescing = Coalescing()

    def end_coalescing(self) -> Work:
        window, self._coalescing = self._coalescing, None
        return (window or Coalescing()).end()

    def split(self, store: Any, ranks: Sequence[int], opts: Any) -> GradwireBackend:
        """A group of `ranks`; to one that is not among them, a group of its own, since c10d cannot be given None."""
        members = list(ranks) if self.rank() in ranks else [self.rank()]
        options = opts if isinstance(opts, Options) else self._inherited(opts)
        name = getattr(options, "group_name", "") or "split"
        return GradwireBackend(store, members.index(self.rank()), len(members), options, name)

    def _inherited(self, opts: Any) -> Options:
        """What c10d makes anew for a split, `opts`, with what it does not know of this group's options."""
        timeout = timedelta(seconds=timeouts.of_group(opts))
        own = {name: getattr(self._options, name, None) for name in ("deterministic", "check_nan")}
        options = Options(**own, timeout=timeout)
        for name in ("group_name", "global_ranks_in_group", "enable_reconfigure"):
            setattr(options, name, getattr(opts, name))
        return options

    def perform_nocolor_split(self, device: Any) -> None:
        """Nothing: ranks outside of a new group have no part in its making."""

    def eager_connect_single_device(self, device: Any) -> None:
        """Nothing: all connections are there from the start."""

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout = timeout.total_seconds()
        if self._formed is not None:
            self._formed.set_timeout(self._timeout)

    def get_error(self) -> Any:
        try:
            if self._formed is not None:
                self._formed.check()
        except RuntimeError:
            return c10d.ErrorType.COMM_ERROR
        return c10d.ErrorType.SUCCESS

    def abort(self) -> None:
        if self._formed is not None:
            self._formed.abort("abort() was called")
        _live.discard(self)

    def shutdown(self) -> None:
        """Leaves the group; what was sent is delivered first."""
        if self._formed is not None:
            self._formed.close(_CLOSE_TIMEOUT_S)
        _live.discard(self)

    def _get_sequence_number_for_group(self) -> int:
        return self._sequence

    def _set_sequence_number_for_group(self) -> None:
        """Nothing: every rank counts from 0."""

    @property
    def _group(self) -> _native.Group:
        if self._formed is None:
            raise RuntimeError("the group was made with enable_reconfigure=True and has no ranks yet: call reconfigure() first")
        return self._formed

    def _form(self, store: Any, rank: int, size: int, name: str, seconds: float | None = None) -> None:
        own = {name: getattr(self._options, name, None) for name in ("deterministic", "check_nan")}
        config = Config.from_environment(timeout_s=self._timeout, **own)
        self._formed = _native.Group.form(
            name,
            store=store,
            rank=rank,
            world_size=size,
            timeout_s=seconds or config.timeout_s,
            options=config.options(),
            environment={},
        )
        self._formed.set_timeout(self._timeout)
        self._sequence = self._barriers = 0
        _live.add(self)

    def _receive(self, tensors: Sequence[Tensor], source: int | None, tag: int) -> Work:
        (tensor,) = tensors
        staging = Staging()
        self._sequence += 1
        operation = self._group.recv(staging.output(tensor), source, tag)
        return self._begun(Work(operation, [tensor], staging.finish(), staging.device))

    def _begun(self, work: Work) -> Work:
        return work if self._coalescing is None else self._coalescing.add(work)

    def _each(
        self,
        name: str,
        calls: _Calls,
        results: list[Any],
        opts: Any,
        reduce_op: Any = None,
        *,
        root: int = 0,
    ) -> Work | None:
        """Carries out `calls` of (inputs, outputs), one after the other, as one operation."""
        self._sequence += 1
        seconds = opts.timeout.total_seconds()
        factor = getattr(reduce_op, "factor", None) if _kind(reduce_op) == c10d.ReduceOp.PREMUL_SUM else None
        staging = Staging(factor, in_place=not (calls and calls[0][0]))
        changes = name != "reduce" or self.rank() == root
        # All of them before the first is sent, since one may be refused.
        staged = [
            ([staging.input(one) for one in inputs], [staging.output(one, changes=changes) for one in outputs])
            for inputs, outputs in calls
        ]
        # What the streams of a CUDA device wait for must go on without the caller.
        background = bool(opts.asyncOp) or self._coalescing is not None or staging.device is not None
        operations: list[Any] = []
        for inputs, outputs in staged:
            operations.append(
                self._group.run(
                    name,
                    inputs,
                    outputs,
                    op=None if reduce_op is None else _OPS[_kind(reduce_op)],
                    root=root,
                    timeout_s=seconds if seconds > 0 else None,
                    background=background,
                )
            )
        finish = staging.finish()
        if background:
            operation = operations[0] if len(operations) == 1 else _native.Operation.join(operations)
            return self._begun(Work(operation, results, finish, staging.device))
        if finish is not None:
            with torch.no_grad():
                finish()
        return None


def _kind(reduce_op: Any) -> Any:
    """The bare kind of a `ReduceOp`, which may come with a factor."""
    return getattr(reduce_op, "op", reduce_op)


def create(opts: Any, backend_options: Any) -> GradwireBackend:
    """Makes a backend; called by torch.distributed with a store that only this group uses."""
    # In a group of several backends each is given the options, whose ever they are.
    ours = getattr(backend_options, "backend", None) == NAME
    options = backend_options if ours else c10d.Backend.Options(NAME, timeout=opts.timeout)
    options.global_ranks_in_group = opts.global_ranks_in_group
    options.group_name = opts.group_id
    options.enable_reconfigure = opts.enable_reconfigure
    name = opts.group_id or "default"
    return GradwireBackend(opts.store, opts.group_rank, opts.group_size, options, name, opts.timeout)


@atexit.register
def _leave() -> None:
    for backend in list(_live):
        backend.shutdown()


os.register_at_fork(after_in_child=_live.clear)

