"""Embeddings whose rows live on parameter servers: pulled in forward, their gradients pushed in backward."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ps import Client, PsWork
from ..sparse import SparseTable


#: Pushes of one table that may be under way.
_MOST_PUSHES = 64


@dataclass
class _Batch:
    """The different ids of a batch and where in the batch each lies, on its device; the same ids in the host, and their rows there,
    which are under way."""

    ids: Tensor
    places: Tensor
    keys: Tensor
    rows: Tensor
    work: PsWork


class _Rows:
    """The rows of one table, batch by batch: prefetched, pulled, and their gradients pushed."""

    def __init__(self, table: SparseTable, permits: int, timeout_s: float) -> None:
        self.table = table
        self._prefetched: deque[_Batch] = deque()
        self._pushes: deque[PsWork] = deque()
        self._timeout_s = timeout_s
        self._permits = threading.Semaphore(permits)
        self._most = permits
        self._dtype = getattr(torch, table.dtype)

    def start(self, ids: Tensor) -> _Batch:
        """Starts to pull the rows of a batch, whose ids are counted on its own device: only the different ones travel."""
        different, places = torch.unique(ids.reshape(-1).to(torch.int64), return_inverse=True)
        keys = different.to("cpu")
        # A copy from pinned memory does not hold the host up.
        rows = torch.empty((keys.numel(), self.table.dim), dtype=self._dtype, pin_memory=ids.is_cuda)
        return _Batch(different, places, keys, rows, self.table.pull_async(keys, rows))

    def prefetch(self, ids: Tensor) -> None:
        if not self._permits.acquire(timeout=self._timeout_s):
            raise TimeoutError(
                f"{self._most} batches of table {self.table.name!r} are prefetched and not yet used: use one, or raise staleness"
            )
        try:
            self._prefetched.append(self.start(ids))
        except BaseException:
            self._permits.release()
            raise

    def take(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of a batch, and which of them each place has. The gradient of the rows is pushed when it is there."""
        batch, permit = self._take_prefetched(ids)
        if batch is None:
            batch = self.start(ids)
        try:
            batch.work.wait()
        except BaseException:
            self._release(permit)
            raise
        rows = batch.rows.to(ids.device, non_blocking=True)
        if not torch.is_grad_enabled():
            self._release(permit)
            return rows, batch.places
        rows.requires_grad_()

        def push(leaf: Tensor) -> None:
            gradient, leaf.grad = leaf.grad, None
            self._release(permit)
            self._pushes.append(self.table.push_async(batch.keys, gradient.to("cpu").contiguous()))
            # Those that have ended are looked at, and beyond a bound the oldest is waited for, so that none is forgotten.
            while self._pushes[0].is_done() or len(self._pushes) > _MOST_PUSHES:
                self._pushes.popleft().wait()
                if not self._pushes:
                    break

        rows.register_post_accumulate_grad_hook(push)
        return rows, batch.places

    def _take_prefetched(self, ids: Tensor) -> tuple[_Batch | None, bool]:
        if not self._prefetched:
            return None, False
        flat = ids.reshape(-1).to(torch.int64)
        batch = self._prefetched[0]
        if batch.places.numel() != flat.numel() or not torch.equal(batch.ids[batch.places], flat):
            raise RuntimeError(
                f"table {self.table.name!r}: forward was given other ids than were prefetched first: use batches in their order"
            )
        return self._prefetched.popleft(), True

    def _release(self, permit: bool) -> None:
        if permit:
            self._permits.release()

    def wait(self) -> None:
        while self._pushes:
            self._pushes.popleft().wait()


def _table(client: Client, name: str, dim: int, options: dict[str, Any]) -> SparseTable:
    dtype = options.pop("dtype", None) or torch.get_default_dtype()
    return client.sparse(name, dim, dtype, **options)


class EmbeddingBag(nn.Module):
    """`torch.nn.EmbeddingBag` with its rows in a sparse table.

    The module has no parameters: the servers hold the rows, and their optimizer. Forward pulls the rows of its ids, backward
    pushes their gradients as soon as they are there; `synchronize()` waits until the servers have counted them. On a table
    with `workers` each forward under grad must be followed by its backward, on every worker.

    What it gives is on the device of the ids. The servers are reached from host memory: of ids on another device the host waits for
    the different ones, and in backward for the gradient of their rows.

    Args:
        num_embeddings: most rows over all servers; None: as many as come.
        embedding_dim: elements of a row.
        client: from `gradwire.connect(addresses, rank=...)`.
        name: the table's name, the same for all workers.
        mode: "sum", "mean" or "max", as in PyTorch.
        include_last_offset: as in PyTorch.
        staleness_permits: batches that may be prefetched and whose gradients have not been pushed yet.
        timeout_s: seconds that `prefetch` waits for a permit.
        options: as for `Client.sparse`: optimizer, initializer, eviction, workers, staleness, average, seed, admission, dtype,
            compression, max_grad_norm.

    Raises:
        ServerRefusedError: another worker has described the table otherwise.
    """

    def __init__(
        self,
        num_embeddings: int | None,
        embedding_dim: int,
        client: Client,
        *,
        name: str,
        mode: str = "mean",
        include_last_offset: bool = False,
        staleness_permits: int = 1,
        timeout_s: float = 60.0,
        **options: Any,
    ) -> None:
        super().__init__()
        if mode not in ("sum", "mean", "max"):
            raise ValueError(f'mode is {mode!r}: pass "sum", "mean" or "max"')
        self.num_embeddings, self.embedding_dim, self.mode = num_embeddings, embedding_dim, mode
        self.include_last_offset = include_last_offset
        self.table = _table(client, name, embedding_dim, {"capacity": num_embeddings, **options})
        self._rows = _Rows(self.table, staleness_permits, timeout_s)

    def prefetch(self, input: Tensor) -> None:
        """Starts to pull the rows of a later `forward`; batches are used in the order in which they are prefetched.

        Its rows are as they are now: on a table with `workers` they lack the pushes made until it is used.

        Raises:
            TimeoutError: `staleness_permits` batches are under way.
        """
        self._rows.prefetch(input)

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """The sum, mean or largest elements of the rows of each bag, as `torch.nn.EmbeddingBag`.

        Raises:
            ServerLostError, ServerTimeoutError: the servers, or another worker, have gone.
        """
        rows, places = self._rows.take(input)
        if rows.shape[0] == 0:
            # A lookup in no rows is refused by PyTorch, though it is of no ids.
            rows = torch.cat([rows, rows.new_zeros((1, self.embedding_dim))])
        return nn.functional.embedding_bag(
            places.reshape(input.shape),
            rows,
            offsets,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
        )

    def synchronize(self) -> None:
        """Waits until the servers have counted every gradient that was pushed.

        Raises:
            ServerRefusedError: the table is full.
            ServerLostError, ServerTimeoutError: the servers, or another worker, have gone.
        """
        self._rows.wait()

    def set_learning_rate(self, lr: float) -> None:
        """Sets the learning rate from the next push on; all workers must set the same."""
        self.table.set_learning_rate(lr)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, mode={self.mode!r}, table={self.table.name!r}"


@dataclass(frozen=True)
class EmbeddingConfig:
    """A table of an `EmbeddingCollection`, by TorchRec's names.

    Args:
        name: the table's name, the same for all workers.
        embedding_dim: elements of a row.
        feature_names: the features that are looked up in it.
        num_embeddings: most rows over all servers; None: as many as come.
    """

    name: str
    embedding_dim: int
    feature_names: Sequence[str]
    num_embeddings: int | None = None


class EmbeddingCollection(nn.Module):
    """Rows for the ids of many features, without pooling: shaped as TorchRec's module of this name.

    Features of one table are looked up, and pushed, with one call.

    Args:
        tables: what there is to look up.
        client: from `gradwire.connect(addresses, rank=...)`.
        staleness_permits, timeout_s: as for `EmbeddingBag`.
        options: as for `Client.sparse`, for all tables.
    """

    def __init__(
        self,
        tables: Sequence[EmbeddingConfig],
        client: Client,
        *,
        staleness_permits: int = 1,
        timeout_s: float = 60.0,
        **options: Any,
    ) -> None:
        super().__init__()
        features = [feature for config in tables for feature in config.feature_names]
        twice = sorted({feature for feature in features if features.count(feature) > 1})
        if twice:
            raise ValueError(f"features {twice} are looked up in more than one table")
        self.configs = tuple(tables)
        self._tables = [
            _Rows(
                _table(client, config.name, config.embedding_dim, {"capacity": config.num_embeddings, **options}),
                staleness_permits,
                timeout_s,
            )
            for config in tables
        ]

    def prefetch(self, features: Mapping[str, Any]) -> None:
        """Starts to pull the rows of a later `forward`; batches are used in the order in which they are prefetched."""
        for config, rows in zip(self.configs, self._tables):
            rows.prefetch(self._ids(config, features)[0])

    def forward(self, features: Mapping[str, Any]) -> dict[str, Any]:
        """The rows of each feature.

        Args:
            features: for each feature a tensor of ids of any shape, or what has `values()` and `lengths()`, as TorchRec's
                JaggedTensor; a KeyedJaggedTensor's features are found by `features[name]`.

        Returns:
            For each feature a tensor of its ids' shape and one dimension more; where a jagged one was given, one of its kind.
        """
        out: dict[str, Any] = {}
        for config, rows in zip(self.configs, self._tables):
            ids, parts = self._ids(config, features)
            values, places = rows.take(ids)
            looked_up = values[places] if ids.numel() else values.sum() * 0 + values.new_empty((0, config.embedding_dim))
            pieces = looked_up.split([part.numel() for part in parts])
            for feature, part, piece in zip(config.feature_names, parts, pieces):
                given = features[feature]
                piece = piece.reshape(*part.shape, config.embedding_dim)
                out[feature] = piece if isinstance(given, Tensor) else type(given)(values=piece, lengths=given.lengths())
        return out

    @staticmethod
    def _ids(config: EmbeddingConfig, features: Mapping[str, Any]) -> tuple[Tensor, list[Tensor]]:
        given = [features[feature] for feature in config.feature_names]
        parts = [part if isinstance(part, Tensor) else part.values() for part in given]
        return torch.cat([part.reshape(-1) for part in parts]), parts

    def synchronize(self) -> None:
        """Waits until the servers have counted every gradient that was pushed; raises as `EmbeddingBag.synchronize`."""
        for rows in self._tables:
            rows.wait()
