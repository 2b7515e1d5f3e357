"""gradwire for PyTorch: the backend of torch.distributed, optimizers and embeddings on parameter servers.

`torch.distributed.init_process_group("gradwire")` finds `register` by its entry point: no import of this is needed.
"""

from __future__ import annotations

import torch.distributed as dist

from .backend import NAME, GradwireBackend, Options, create
from .embedding import EmbeddingBag, EmbeddingCollection, EmbeddingConfig
from .optimizer import DistributedOptimizer
from .splitting import leave_out_strangers
from .work import look_through

__all__ = [
    "DistributedOptimizer",
    "EmbeddingBag",
    "EmbeddingCollection",
    "EmbeddingConfig",
    "GradwireBackend",
    "Options",
    "register",
]


def register() -> None:
    """Makes the backend `gradwire` known to torch.distributed. May be called again."""
    if NAME.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(NAME, create, extended_api=True, devices=["cpu", "cuda"])
    look_through()
    leave_out_strangers(NAME)
