"""The backend "gradwire" of torch.distributed: c10d's `Backend` in thin Python over the Rust engine."""

import atexit
import os
from datetime import timedelta

import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from .. import _environment, _native
from .collectives import Collectives
from .work import look_through

NAME = "gradwire"
#: c10d's wrapper of TORCH_DISTRIBUTED_DEBUG=DETAIL does not keep the Python half alive: it is held here until shutdown.
_LIVE = set()


class _Store:
    """A torch store, as the engine wants it."""

    def __init__(self, store):
        self._store = store

    def set(self, key, value):
        self._store.set(key, value)

    def get(self, key, timeout_s):
        self._store.wait([key], timedelta(seconds=timeout_s))
        return self._store.get(key)


class GradwireBackend(Collectives, c10d.Backend):
    """One group of ranks."""

    def __init__(self, store, rank, size, options):
        c10d.Backend.__init__(self, rank, size)
        self._rank, self._size, self._options = rank, size, options
        seconds = options._timeout.total_seconds()
        settings = _environment.read(timeout=seconds)
        name = getattr(options, "group_name", "") or "default"
        self._native = _native.Communicator.connect(_Store(store), name, rank, size, {}, settings)
        self._barriers = 0
        _LIVE.add(self)

    @property
    def options(self):
        return self._options

    def getBackendName(self):
        return NAME

    # Properties of the subclass, each: c10d's own descriptors would call the virtual that asks for them.
    supports_splitting = property(lambda self: False)
    supports_coalescing = property(lambda self: False)
    supports_shrinking = property(lambda self: False)
    supports_reconfigure = property(lambda self: False)
    supports_window = property(lambda self: False)
    _supports_time_estimate = property(lambda self: False)

    def describe(self):
        """Which wire leads to which rank, and why; see `gradwire.Communicator.describe`."""
        return self._native.describe()

    def perform_nocolor_split(self, _device):
        pass

    def eager_connect_single_device(self, _device):
        pass  # The group is connected when it is made.

    def set_timeout(self, timeout):
        self._native.set_timeout(timeout.total_seconds())

    def abort(self):
        self._native.abort("torch.distributed abort")

    def shutdown(self):
        self._native.close(10.0)
        _LIVE.discard(self)

    def get_error(self):
        return c10d.ErrorType.SUCCESS

    def _get_sequence_number_for_group(self):
        return self._native.sequence


def _create(opts, pg_options):
    options = pg_options or c10d.Backend.Options(NAME, timeout=opts.timeout)
    options.global_ranks_in_group = opts.global_ranks_in_group
    options.group_name = opts.group_id
    return GradwireBackend(opts.store, opts.group_rank, opts.group_size, options)


@atexit.register
def _leave():
    # A script that ends without destroy_process_group has not crashed: the others are told so.
    for backend in list(_LIVE):
        backend._native.close(1.0)


def register():
    """Makes "gradwire" known to torch.distributed; called by torch through the entry point."""
    look_through()
    if NAME.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(NAME, _create, extended_api=True, devices=["cpu"])


def _reset_after_fork():
    # The engine's threads do not live in a forked child, and its connections are the parent's.
    _LIVE.clear()


os.register_at_fork(after_in_child=_reset_after_fork)
