"""gradwire for PyTorch (2.14 or newer): the `torch.distributed` backend "gradwire"."""

from .backend import GradwireBackend, register

__all__ = ["GradwireBackend", "register"]
