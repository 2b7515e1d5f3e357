"""Parameter servers: tables that live on them, pushed to and pulled from by workers."""

import os
from dataclasses import dataclass

import numpy

from . import _native
from .config import Config
from .sparse import SparseTable, making


@dataclass(frozen=True)
class CheckpointEvery:
    """As a table's `recovery`: "checkpoint", and the next one is begun at most so many seconds (1 or more) after the last.

    The servers take it by themselves (`gradwire-ps serve --checkpoint-dir`), as often as the most eager table wants, and of all
    tables: a checkpoint is whole. So do servers under a coordinator. Several processes without one, each of which has but a part of
    the table, refuse it: there "checkpoint" and `gradwire-ps snapshot --every` do.
    """

    seconds: float

    def _native(self):
        return f"checkpoint every {float(self.seconds)!r}"


@dataclass(frozen=True)
class Replicate:
    """As a table's `recovery`: "replicate", and so many servers beside its own have all of it, so that as many may die at once.

    A push is acknowledged when all of them have it. `copies`: 1 to 7. Refused by servers that have fewer (`gradwire-ps coordinate
    --replicas`); of those that have more, all have it.
    """

    copies: int = 1

    def _native(self):
        return f"replicate {int(self.copies)}"


@dataclass(frozen=True)
class SGD:
    """`torch.optim.SGD` on the server."""

    lr: float = 1e-3
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def _native(self):
        return ("sgd", [self.lr, self.momentum, self.dampening, self.weight_decay], self.nesterov)


@dataclass(frozen=True)
class Adam:
    """`torch.optim.Adam` on the server; with `decoupled`, `torch.optim.AdamW`."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False

    def _native(self):
        return ("adam", [self.lr, *self.betas, self.eps, self.weight_decay], self.decoupled)


@dataclass(frozen=True)
class Adagrad:
    """`torch.optim.Adagrad` on the server; with `row_wise`, one sum for each row of a sparse table, of the means of squares."""

    lr: float = 1e-2
    lr_decay: float = 0.0
    weight_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    eps: float = 1e-10
    row_wise: bool = False

    def _native(self):
        numbers = [self.lr, self.lr_decay, self.initial_accumulator_value, self.eps, self.weight_decay]
        return ("adagrad", numbers, self.row_wise)


@dataclass(frozen=True)
class FTRL:
    """FTRL-Proximal (McMahan et al., KDD 2013): many weights come out as exactly 0. `lr` and `beta` are the paper's alpha, beta."""

    lr: float = 0.05
    beta: float = 1.0
    l1: float = 0.0
    l2: float = 0.0

    def _native(self):
        return ("ftrl", [self.lr, self.beta, self.l1, self.l2], False)


@dataclass(frozen=True)
class TopK:
    """Compression of gradients: the largest `ratio` of the elements of each part travel, 8 bytes each; what is left out is
    added to the worker's next gradient."""

    ratio: float = 0.1

    def _native(self):
        return ("topk", float(self.ratio))


@dataclass(frozen=True)
class Compression:
    """How the gradients and the values of a table travel, each None, "bf16", "fp16", "int8", or for gradients `TopK(ratio)`.

    fp16 makes magnitudes over 65504 that. int8 has a scale for 128 elements; what gradients of a dense table lose is added to the
    worker's next one. A pull is made from the full value, so its errors do not add up.
    """

    push: str | TopK | None = None
    pull: str | None = None

    def _native(self):
        return (_codec(self.push), _codec(self.pull))


def _codec(codec):
    if isinstance(codec, TopK):
        return codec._native()
    if codec in (None, "bf16", "fp16", "int8"):
        return (codec or "none", 0.0)
    raise ValueError(f'compression {codec!r}: pass None, "bf16", "fp16", "int8", TopK(ratio) or Compression(push, pull)')


def _compression(compression):
    if isinstance(compression, TopK):
        compression = Compression(push=compression)
    elif not isinstance(compression, Compression):
        compression = Compression(compression, compression)
    return compression._native()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was written: its name, which `--restore` takes, its bytes, the seconds that it took, and the clock of
    each synchronous table in it, by name."""

    name: str
    bytes: int
    seconds: float
    clocks: dict[str, int]


class PsWork:
    """A push or pull under way. Leave its arrays alone until `wait()` returns."""

    def __init__(self, pending, result=None):
        self._pending, self._result = pending, result

    def wait(self, timeout_s=None):
        """Waits until it has ended; returns what was pulled, if anything.

        Raises:
            TimeoutError: `timeout_s` has passed; it goes on.
            ServerLostError, ServerRefusedError, ServerTimeoutError: it failed.
        """
        if not self._pending.wait(timeout_s):
            raise TimeoutError(f"it has not ended within {timeout_s} s; it goes on")
        return self._result

    def is_done(self):
        """Whether it has ended, well or not."""
        return self._pending.is_done()


class DenseTable:
    """A table of one dtype and shape, cut over all servers by key range."""

    def __init__(self, native, name, shape, dtype):
        self._native, self.name, self.shape, self.dtype = native, name, shape, dtype

    @property
    def clock(self):
        """Pushes made by this client."""
        return self._native.clock

    @property
    def pulled(self):
        """The clock of the value that this client's last pull which ended well has brought, or None; with `recovery="workers"`."""
        return self._native.pulled

    def init(self, values):
        """Writes the first values, unless another client has; True when they are ours. Blocks until they are there."""
        self._check(values, "values")
        return self._native.init(values)

    def push(self, gradient):
        """Adds `gradient`, of the table's shape; a shorter float than the table's travels as it is."""
        self.push_async(gradient).wait()

    def push_async(self, gradient):
        """Starts `push`."""
        self._check(gradient, "gradient")
        return PsWork(self._native.push(gradient))

    def pull(self, out=None, *, whole=False):
        """Reads the table into `out` (a new array where there is none), and returns it; `whole`: uncompressed in any case.

        On a synchronous table a worker gets the value after its own last push, and waits for the other workers' pushes.
        """
        return self.pull_async(out, whole=whole).wait()

    def pull_async(self, out=None, *, whole=False):
        """Starts `pull`."""
        out = self._out(out)
        return PsWork(self._native.pull(out, whole), out)

    def push_pull(self, gradient, out=None):
        """`push`, then `pull`, in one request: the answer leaves when the clock is complete."""
        return self.push_pull_async(gradient, out).wait()

    def push_pull_async(self, gradient, out=None):
        """Starts `push_pull`."""
        self._check(gradient, "gradient")
        out = self._out(out)
        return PsWork(self._native.push_pull(gradient, out), out)

    def set_learning_rate(self, lr):
        """Sets the learning rate, from this worker's next push on; all workers must set the same."""
        self._native.set_learning_rate(lr)

    def set_schedule(self, schedule):
        """Sets the learning rates of all clocks to come, from this worker's next push on: one of `gradwire.schedules`.

        The servers work them out by themselves, so no message a step is needed; all workers must set the same.
        """
        self._native.set_schedule(schedule._native())

    def _out(self, out):
        if out is None:
            return numpy.empty(self.shape, self.dtype)
        self._check(out, "out")
        return out

    def _check(self, value, argument):
        shape = tuple(getattr(value, "shape", ()))
        if shape != self.shape:
            raise ValueError(f"table {self.name!r} has shape {self.shape}, but {argument} has {shape}: they must be equal")


class Client:
    """A connection to all servers of a parameter server; see `connect`."""

    def __init__(self, native, rank):
        self._native, self.rank = native, rank

    def dense(
        self,
        name,
        shape,
        dtype="float32",
        *,
        rule="sum",
        workers=None,
        average=False,
        staleness=None,
        clipped=False,
        recovery="none",
        compression=None,
    ):
        """Makes the table `name`, or finds it; all clients must describe it alike. Blocks.

        Args:
            name: the same for everybody.
            shape: a tuple, or a number of elements.
            dtype: float32, float64, float16 or bfloat16.
            rule: what a push does: "sum" (value += gradient), "replace", `SGD(...)`, `Adam(...)`, `Adagrad(...)`, `FTRL(...)`.
            workers: how many workers push to it, numbered from 0: at each clock all contributions are summed in rank order,
                so results do not depend on who comes first. None: every push is applied as it comes.
            average: whether a synchronous sum is divided by the number of workers.
            staleness: with `workers`: pushes are applied as they come, and no worker gets so many clocks and one more ahead
                of another: its pushes and pulls wait until the others are near enough.
            compression: None, "bf16", "fp16" or "int8" for both directions, `TopK(ratio)` for gradients, or `Compression(push, pull)`.
            clipped: with `workers`: each clock's gradient is applied only after `clip_grad_norm`, which every worker calls.
            recovery: what becomes of it when a server dies: "none", what no checkpoint holds is gone. "checkpoint", the same, but
                refused by servers that keep none (`gradwire-ps serve --checkpoint-dir --checkpoint-every`), so that nobody
                trains for days without; `CheckpointEvery(seconds)`, and the servers take one so often; see `snapshot`. "replicate", another server
                has all of it and takes its place; needs servers that have backups (`gradwire-ps serve --coordinator`);
                `Replicate(2)`, two others have, and two may die at once. "workers", they give it again once a server is there again, see `recover`; needs `workers`, and neither `staleness`,
                `clipped` nor `compression`.

        Raises:
            ServerRefusedError: another client has described it otherwise, or a server has no room.
        """
        shape = (shape,) if isinstance(shape, int) else tuple(int(size) for size in shape)
        dtype, how, short = _dtype(dtype), _rule(rule), _compression(compression)
        safe = _recovery(recovery)
        native = self._native.dense(name, list(shape), dtype, how, workers, average, staleness, clipped, safe, short)
        return DenseTable(native, name, shape, dtype)

    def sparse(
        self,
        name,
        dim,
        dtype="float32",
        *,
        optimizer="sum",
        initializer="zeros",
        seed=0,
        capacity=None,
        eviction=None,
        admission=1,
        workers=None,
        staleness=None,
        average=False,
        recovery="none",
        compression=None,
        max_grad_norm=None,
    ):
        """Makes the sparse table `name`, or finds it; all clients must describe it alike. Blocks.

        Args:
            name: the same for everybody.
            dim: elements of a row.
            dtype: in which rows are pulled: float32, float64, float16 or bfloat16; the servers keep at least 32 bits.
            optimizer: what a push does to the rows of its ids: "sum", "replace", `SGD(...)` (without momentum), `Adam(...)`
                (as `torch.optim.SparseAdam`), `Adagrad(...)` or `FTRL(...)`.
            initializer: what a row holds at first: "zeros", a number, `Uniform(low, high)` or `Normal(mean, std)`.
            seed: tells the first values of one training from those of another.
            capacity: most rows over all servers; None: as many as there is memory for.
            eviction: which rows make room: None (a push that needs more room is refused), `LRU()`, `LFU()` or `TTL(seconds)`.
            admission: how many pushes an id must come in before it gets a row; until then its gradients are dropped.
            workers, staleness, average, recovery: as for `dense`, but never "workers", none of whom has all rows. With `workers`, every worker pushes at every clock, if only no ids.
            compression: None, "bf16", "fp16" or "int8" for both directions, or `Compression(push, pull)`. Each row travels by itself,
                int8 with a scale for 128 of its elements; ids travel whole. What a gradient loses is not added to a later one, for
                which each worker would need a second table; and `TopK` is refused, since ids have picked the rows already.
            max_grad_norm: what a push's norm is brought down to, as by `torch.nn.utils.clip_grad_norm_`: the L2 norm over all rows of
                that push on all servers, once gradients of an id that comes twice are summed. The worker does it, before the rows
                are compressed. It is each worker's own push that is clipped, not the sum of a clock.

        Raises:
            ServerRefusedError: another client has described it otherwise, or a server has no room.
        """
        dtype = _dtype(dtype)
        safe, short = _recovery(recovery), _compression(compression)
        how = making(
            initializer, seed, capacity, eviction, admission, workers, staleness, average, safe, short, max_grad_norm
        )
        native = self._native.sparse(name, dim, dtype, _rule(optimizer), how)
        return SparseTable(native, PsWork, name, dim, dtype)

    def clip_grad_norm(self, tables, max_norm):
        """`torch.nn.utils.clip_grad_norm_` of the merged gradients that were pushed last to `tables`, opened with `clipped`.

        Every worker calls it once after each push, with the same tables; the gradients are applied then. Returns the norm
        over all of them before clipping: the same bits whatever the number of servers. Blocks until all have pushed.
        """
        return self._native.clip([table._native for table in tables], float(max_norm))

    def recover(self, values):
        """Gives servers that were lost, and are there again, tables that were opened with `recovery="workers"`.

        All workers call it, with the same tables in the same order, once a call has raised `ServerLostError`. It waits until
        all workers and servers are there, for `timeout_s` of the connection at most. Each table goes on from the latest clock
        that any worker has pulled; a worker that had an earlier value gets that one. `table.clock` says from where to go on:
        push again, the same, what you had pushed beyond it. Servers that have counted it count it once, so tables with the
        rules "sum", "replace" and SGD without momentum come out as if nothing had happened. The optimizer's state of what was
        lost begins anew.

        Args:
            values: a list of (table, array): what the last pull that ended well has brought, whole, of the table's shape and
                dtype; newer values are written into it. A pull that failed may have left pieces in its `out`.

        Raises:
            ServerLostError: a server stays away, or was restored from a checkpoint: connect anew and go on at `table.clock`.
            ServerTimeoutError: not all workers came; it says which.
            ValueError: a table that was opened otherwise, or that nobody has pulled.
        """
        values = list(values)
        for table, value in values:
            table._check(value, "values")
        had = [table.pulled for table, _ in values]
        clocks = self._native.recover([(table._native, value) for table, value in values])
        behind = [pair for pair, before, clock in zip(values, had, clocks, strict=True) if before != clock]
        for work in [table.pull_async(value) for table, value in behind]:
            work.wait()

    def barrier(self, name, clients, timeout_s=None):
        """Waits until `clients` clients have come to the barrier `name`."""
        self._native.barrier(name, clients, timeout_s)

    def snapshot(self, timeout_s=600.0):
        """Writes a `Checkpoint` of all tables where the servers keep theirs, and returns it. Blocks; training goes on meanwhile.

        Synchronous tables are taken at one clock on all servers, others as they are. When a server is lost, its clients raise
        `ServerLostError`: start all of them with `gradwire-ps serve --checkpoint-dir FOLDER --restore latest`, connect anew,
        open the tables as before, and go on behind `table.clock`, the last push of this worker that the checkpoint holds.
        `gradwire-ps export` makes a file of safetensors of it.

        Raises:
            ServerRefusedError: a server keeps no checkpoints (`--checkpoint-dir`), or could not write.
            ServerTimeoutError: a worker does not push, so the clock did not come within `timeout_s`.
        """
        return Checkpoint(*self._native.snapshot(float(timeout_s)))

    def status(self):
        """What each server holds: a dict per shard, with its tables, clients and memory."""
        return self._native.status()

    @property
    def shards(self):
        """The number of servers."""
        return self._native.shards

    def close(self):
        """Says goodbye to the servers. Idempotent; also at the end of a `with` block."""
        self._native.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _dtype(dtype):
    return numpy.dtype(dtype).name if isinstance(dtype, type) else str(dtype).removeprefix("torch.")


def _recovery(recovery):
    return recovery._native() if isinstance(recovery, (CheckpointEvery, Replicate)) else recovery


def _rule(rule):
    return (rule, [], False) if isinstance(rule, str) else rule._native()


def connect(addresses=None, *, coordinator=None, token=None, rank=None, timeout_s=None, reconnect_s=5.0, **tls):
    """Connects to a parameter server.

    Args:
        addresses: "host:port" of each server, a list or comma-separated, in the same order for all clients.
        coordinator: instead of addresses, "host:port" of the coordinator of servers that have backups, or a list of several:
            shards are found by it, also after they have moved.
        token: the servers' secret; default GRADWIRE_TOKEN.
        rank: this process's number among the workers of synchronous tables. Without one it may read, and push to
            asynchronous tables.
        timeout_s: seconds that a request may wait, for a server or for other workers; default GRADWIRE_TIMEOUT, else 300.
        reconnect_s: seconds that a server is dialled before it counts as lost.

        tls_ca, tls_cert, tls_key, tls_server_name: who must have signed the servers' certificates; this client's own
            certificate and private key, where servers want one; the name that servers must be certified for instead of
            their host. Default GRADWIRE_TLS_CA, _CERT, _KEY and _SERVER_NAME. With tls_ca all connections use TLS.

    The wire is the best that both ends have, as GRADWIRE_TRANSPORT and GRADWIRE_IB_* say: RDMA between hosts, else TCP.

    Raises:
        AuthenticationError: another token.
        TlsError: no TLS at one end, or a certificate that does not hold; it says whose, and what to do.
        ServerLostError: nobody answers; the error names the shard and its address.
    """
    if (addresses is None) == (coordinator is None):
        raise ValueError("pass either the servers' addresses, or coordinator=")
    clustered = coordinator is not None
    addresses = coordinator if clustered else addresses
    if isinstance(addresses, str):
        addresses = addresses.split(",")
    addresses = [address.strip() for address in addresses]
    token = token if token is not None else os.environ.get("GRADWIRE_TOKEN")
    if unknown := set(tls) - {"tls_ca", "tls_cert", "tls_key", "tls_server_name"}:
        raise TypeError(f"connect() got an unexpected keyword argument {unknown.pop()!r}")
    config = Config.from_environment(timeout_s=timeout_s, **tls)
    native = _native.PsClient.connect(
        addresses, token, rank, float(config.timeout_s), float(reconnect_s), config.options(), clustered
    )
    return Client(native, rank)


class LocalCluster:
    """Servers within this process, for notebooks and tests: `with LocalCluster(servers=2) as cluster: cluster.connect()`."""

    def __init__(self, servers=1, *, token=None):
        self._native, self._token = _native.PsServers.start(servers, token, Config.from_environment().options()), token

    @property
    def addresses(self):
        """Where the servers listen, in the order of the shards."""
        return self._native.addresses

    def connect(self, *, rank=None, **settings):
        """A client of these servers."""
        return connect(self.addresses, token=self._token, rank=rank, **settings)

    def stop_server(self, shard):
        """Stops one server, as if its process had ended."""
        self._native.stop_shard(shard)

    def close(self):
        """Stops all servers."""
        self._native.stop()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
