"""Tensors made ready for the engine, which takes contiguous ones: others go by way of a copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Staging:
    """The tensors of one operation, and what is to be copied back when it has ended.

    Args:
        factor: what inputs are multiplied by first (PREMUL_SUM); None: nothing.
        in_place: whether outputs are inputs at the same time.
    """

    def __init__(self, factor: Any = None, *, in_place: bool = False) -> None:
        self._factor = factor
        self._in_place = in_place
        self._back: list[tuple[Tensor, Tensor]] = []
        self.device: torch.device | None = None

    def input(self, tensor: Tensor) -> Tensor:
        """`tensor`, or a copy that can be sent."""
        self._see(tensor)
        return _plain(tensor) if self._factor is None else _plain(tensor.detach() * self._factor)

    def output(self, tensor: Tensor, *, changes: bool = True) -> Tensor:
        """`tensor`, or another to be filled in its place; unless it `changes` (the root's does), it stays as it is."""
        self._see(tensor)
        if self._factor is not None and self._in_place:
            staged = _plain(tensor.detach() * self._factor)
        elif _is_plain(tensor):
            return tensor
        else:
            staged = _plain(tensor)
        if changes:
            self._back.append((tensor.detach(), staged))
        return staged

    def _see(self, tensor: Tensor) -> None:
        """Remembers the CUDA device, whose streams are to be ordered.

        Raises:
            ValueError: a tensor on it that would have to be copied back, when nobody knows in which stream's order.
        """
        if not tensor.is_cuda:
            return
        if not _is_plain(tensor):
            raise ValueError("a CUDA tensor is not contiguous: pass `.contiguous()`, and copy the result back. Nothing was sent")
        if self._factor is not None and self._in_place:
            raise ValueError("PREMUL_SUM of a CUDA tensor in place: multiply it first, then sum. Nothing was sent")
        self.device = tensor.device

    def finish(self) -> Callable[[], None] | None:
        """Copies back what was staged; None where there is nothing to copy."""
        if not self._back:
            return None
        back = self._back

        def copy() -> None:
            for tensor, staged in back:
                tensor.copy_(staged)

        return copy


def rank_views(tensor: Tensor, splits: Sequence[int], world_size: int, argument: str) -> list[Tensor]:
    """`tensor` cut along its first dimension, by `splits`, or evenly where there are none.

    Raises:
        RuntimeError: the parts do not make up the tensor. Nothing was sent.
    """
    rows = tensor.size(0) if tensor.dim() else 1
    if not splits:
        if rows % world_size:
            raise RuntimeError(
                f"{argument}: Tensor's dim 0 does not divide equally across group size: {rows} rows, {world_size} ranks"
            )
        splits = [rows // world_size] * world_size
    elif len(splits) != world_size or sum(splits) != rows:
        raise RuntimeError(
            f"Split sizes doesn't match {argument} tensor's dim 0 size / group: {list(splits)} for {rows} rows and "
            f"{world_size} ranks"
        )
    return list(tensor.detach().split(list(splits)))


def _is_plain(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and not tensor.is_neg() and not tensor.is_conj()


def _plain(tensor: Tensor) -> Tensor:
    if _is_plain(tensor):
        return tensor
    return tensor.detach().resolve_conj().resolve_neg().contiguous(memory_format=torch.contiguous_format)
