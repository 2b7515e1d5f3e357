"""One rank of a torch.distributed backend under measurement; `gradwire-bench compare` starts it.

    torch_rank.py SOCKET BACKEND RANK WORLD_SIZE STORE

It speaks as `mpi_rank.c` does: `hello RANK WORLD_SIZE LIBRARY`, then to each `run COLLECTIVE DTYPE ELEMENTS MODULUS CALLS` the
answer `times NS ...`, `without WHY` or `wrong WHAT`. Element i of what rank r gives is (i + r) % MODULUS.
"""

import gc
import signal
import socket
import sys
import time

import torch
import torch.distributed as dist

#: Seconds after which a turn that hangs ends this process.
PATIENCE_S = 100
WARM_UP = 3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Work:
    """A collective with its buffers."""

    def __init__(self, kind, dtype, elements, modulus):
        self.rank, self.size, self.kind = dist.get_rank(), dist.get_world_size(), kind
        self.elements, self.part, self.modulus, self.dtype = elements, elements // self.size, modulus, dtype
        of_part = {"all_gather", "gather"}
        self.give = self.values(self.rank, 0, self.part if kind in of_part else elements)
        self.get = self.give
        if kind in {"all_gather", "reduce_scatter", "all_to_all", "gather", "scatter"}:
            self.get = torch.zeros(self.part if kind in {"reduce_scatter", "scatter"} else elements, dtype=dtype)
        root = self.rank == 0
        self.outputs = list(self.get.view(self.size, -1)) if kind == "gather" and root else None
        self.inputs = list(self.give.view(self.size, -1)) if kind == "scatter" and root else None

    def values(self, rank, start, count):
        return ((torch.arange(start, start + count) + rank) % self.modulus).to(self.dtype)

    def call(self):
        match self.kind:
            case "all_reduce":
                dist.all_reduce(self.get)
            case "reduce":
                dist.reduce(self.get, 0)
            case "broadcast":
                dist.broadcast(self.get, 0)
            case "all_gather":
                dist.all_gather_into_tensor(self.get, self.give)
            case "reduce_scatter":
                dist.reduce_scatter_tensor(self.get, self.give)
            case "all_to_all":
                dist.all_to_all_single(self.get, self.give)
            case "gather":
                dist.gather(self.give, self.outputs, 0)
            case "scatter":
                dist.scatter(self.get, self.inputs, 0)
            case _:
                dist.barrier()

    def expected(self):
        """What must come out here; nothing where this rank gets nothing."""
        ranks, part = range(self.size), self.part
        match self.kind:
            case "barrier":
                return None
            case "broadcast":
                return self.values(0, 0, self.elements)
            case "scatter":
                return self.values(0, self.rank * part, part)
            case "all_to_all":
                return torch.cat([self.values(rank, self.rank * part, part) for rank in ranks])
            case "all_gather" | "gather":
                return torch.cat([self.values(rank, 0, part) for rank in ranks]) if self.outputs or self.kind != "gather" else None
            case "reduce" if self.rank != 0:
                return None
        start, count = (self.rank * part, part) if self.kind == "reduce_scatter" else (0, self.elements)
        return sum(self.values(rank, start, count) for rank in ranks)


def answer(kind, dtype, elements, modulus, calls):
    if kind not in KINDS:
        return f"without {kind}"
    work = Work(kind, DTYPES[dtype], elements, modulus)
    try:
        work.call()
    except (RuntimeError, ValueError) as error:
        return f"without {kind} of {dtype}: {str(error).splitlines()[0]}"
    expected = work.expected()
    if expected is not None and not torch.equal(work.get, expected):
        at = int((work.get != expected).nonzero()[0])
        return f"wrong rank {work.rank}: element {at} of {kind} is {work.get[at]}, not {expected[at]}"
    del expected
    # Zeros stay zeros, however often they are summed.
    work.get.zero_()
    work.give.zero_()
    times = []
    for turn in range(-WARM_UP, calls):
        dist.barrier()
        began = time.perf_counter_ns()
        work.call()
        if turn >= 0:
            times.append(time.perf_counter_ns() - began)
    return "times " + " ".join(map(str, times))


KINDS = {"all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all", "gather", "scatter", "barrier"}


def main():
    path, backend, rank, size, store = sys.argv[1:]
    rank, size = int(rank), int(size)
    torch.set_num_threads(1)
    gc.disable()
    dist.init_process_group(backend, store=dist.FileStore(store, size), rank=rank, world_size=size)
    library = f"torch {torch.__version__}"
    if backend == "gradwire":
        import gradwire

        library = f"gradwire {gradwire.__version__} in {library}"
    with socket.socket(socket.AF_UNIX) as end:
        end.connect(path)
        with end.makefile("rw") as told:
            print("hello", rank, size, library, file=told, flush=True)
            for line in told:
                _, kind, dtype, elements, modulus, calls = line.split()
                signal.alarm(PATIENCE_S)
                print(answer(kind, dtype, int(elements), int(modulus), int(calls)), file=told, flush=True)
                signal.alarm(0)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
