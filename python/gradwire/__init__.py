"""gradwire moves gradients, parameters and embeddings between machines.

`Communicator` is a group of ranks over arrays; `torch.distributed.init_process_group("gradwire")` needs no import of this
package at all.
"""

from .communicator import Communicator, Work
from .errors import (
    AuthenticationError,
    CollectiveMismatchError,
    CollectiveTimeoutError,
    GradwireError,
    GroupAbortedError,
    RankFailedError,
    RendezvousTimeoutError,
    ServerLostError,
    ServerRefusedError,
    ServerTimeoutError,
)

__all__ = [
    "AuthenticationError",
    "CollectiveMismatchError",
    "CollectiveTimeoutError",
    "Communicator",
    "GradwireError",
    "GroupAbortedError",
    "RankFailedError",
    "RendezvousTimeoutError",
    "ServerLostError",
    "ServerRefusedError",
    "ServerTimeoutError",
    "Work",
]
