"""gradwire: collectives and a parameter server over RDMA, TCP and shared memory.

    import numpy, gradwire

    with gradwire.Communicator() as group:          # rank and world size as torchrun, mpirun or srun set them
        gradient = numpy.ones(1000, numpy.float32)
        group.all_reduce(gradient, op="avg")

Needs NumPy alone. With PyTorch there, `torch.distributed.init_process_group("gradwire")` works without any import of ours,
and `gradwire.torch` holds an optimizer that runs on the parameter server.
"""

import os as _os

from . import _native, schedules
from ._native import __version__
from .communicator import Communicator, Description, Explanation, Link, Work
from .config import Config
from .errors import (
    AuthenticationError,
    CollectiveMismatchError,
    CollectiveTimeoutError,
    GradwireError,
    GroupAbortedError,
    MessageLengthError,
    NotANumberError,
    RankFailedError,
    RegistrationError,
    RendezvousTimeoutError,
    ServerTimeoutError,
    TlsError,
    ServerLostError,
    ServerRefusedError,
    TransportError,
)
from .ps import FTRL, SGD, Adagrad, Adam, Checkpoint, CheckpointEvery, Client, Compression, DenseTable, LocalCluster, PsWork, Replicate, TopK, connect
from .sparse import LFU, LRU, TTL, Normal, SparseTable, Uniform

_os.register_at_fork(after_in_child=_native.after_fork)

__all__ = [
    "FTRL",
    "LFU",
    "LRU",
    "SGD",
    "TTL",
    "Adagrad",
    "Adam",
    "AuthenticationError",
    "Checkpoint",
    "CheckpointEvery",
    "Client",
    "CollectiveMismatchError",
    "CollectiveTimeoutError",
    "Communicator",
    "Compression",
    "Config",
    "DenseTable",
    "Description",
    "Explanation",
    "GradwireError",
    "GroupAbortedError",
    "Link",
    "LocalCluster",
    "MessageLengthError",
    "NotANumberError",
    "Normal",
    "PsWork",
    "RankFailedError",
    "RegistrationError",
    "Replicate",
    "RendezvousTimeoutError",
    "ServerTimeoutError",
    "TlsError",
    "ServerLostError",
    "ServerRefusedError",
    "SparseTable",
    "TopK",
    "TransportError",
    "Uniform",
    "Work",
    "__version__",
    "connect",
    "schedules",
]
