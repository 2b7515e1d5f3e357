"""One-sided reads and writes for PyTorch: `torch.distributed._transport.new_transport("gradwire", "cpu")` finds this.

Where both ends have an RDMA device it reads and writes by itself. Where they have not, the same calls work by messages over
TCP that a thread of the peer serves: slower, and `repr()` says so.
"""

from __future__ import annotations

import asyncio
import math
import operator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch

from .. import _native
from ..config import Config
from .work import Work

try:
    from torch.distributed._transport._api import MemoryView, MutableMemoryView, RemoteBuffer, Transport
    from torch.distributed._transport._work import wait_all
except ImportError as error:
    raise ImportError(
        "gradwire's one-sided transport is made for torch.distributed._transport as PyTorch 2.15 has it, a module that may "
        f"still change; this is PyTorch {torch.__version__}: install torch 2.15, or use gradwire's collectives"
    ) from error


@dataclass(frozen=True)
class GradwireRemoteBuffer:
    """Memory of a peer, as the peer told of it. Who has it may read and write that memory."""

    told: bytes

    def serialize(self) -> bytes:
        return self.told

    @classmethod
    def deserialize(cls, data: bytes) -> GradwireRemoteBuffer:
        if type(data) is not bytes or len(data) != 44 or data[:4] != b"gwm1":
            raise ValueError("malformed descriptor: not what serialize() of gradwire's remote buffer returns")
        return cls(data)


class GradwireMemoryView:
    """A range of registered bytes, to be read from."""

    def __init__(self, memory: GradwireMemory, offset: int, length: int) -> None:
        self._memory = memory
        self._offset = offset
        self._length = length

    def size(self) -> int:
        return self._length


class GradwireMutableMemoryView(GradwireMemoryView):
    """A range of registered bytes, to be written to."""

    writable: Literal[True] = True


class GradwireMemory:
    """A tensor that is registered with a transport, which holds it."""

    def __init__(self, transport: GradwireTransport, native: _native.OneSidedMemory) -> None:
        self._transport = transport
        self._native: _native.OneSidedMemory | None = native

    def to_view(self, offset: int | None = None, length: int | None = None) -> GradwireMemoryView:
        return GradwireMemoryView(self, *self._range(offset, length))

    def to_mutable_view(self, offset: int | None = None, length: int | None = None) -> GradwireMutableMemoryView:
        return GradwireMutableMemoryView(self, *self._range(offset, length))

    def to_remote_buffer(self, *, timeout: float | None = None) -> GradwireRemoteBuffer:
        """What the peer reaches this memory by."""
        return GradwireRemoteBuffer(self._transport._native.expose(self._active(), self._transport._seconds(timeout)))

    def _active(self) -> _native.OneSidedMemory:
        if self._native is None:
            raise RuntimeError("the memory has been unregistered")
        return self._native

    def _range(self, offset: int | None, length: int | None) -> tuple[int, int]:
        whole = len(self._active())
        first = 0 if offset is None else operator.index(offset)
        count = whole - first if length is None else operator.index(length)
        if first < 0 or count < 0 or first + count > whole:
            raise ValueError(f"bytes {first} to {first + count} lie outside of the {whole} that are registered")
        return first, count


class TransferWork(Work):
    """A transfer under way. A time-out ends the wait, not the transfer."""

    def __init__(self, transfer: _native.Transfer, timeout_s: float) -> None:
        super().__init__(transfer, [])
        self._transfer = transfer
        self._timeout_s = timeout_s

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        seconds = timeout.total_seconds() or self._timeout_s
        if not self._transfer.wait(seconds):
            raise TimeoutError(f"the transfer has not ended after {seconds:.3f} s of waiting; it goes on")
        return True


class GradwireTransport(Transport):
    """One end of a pair: offers memory to its peer, and reaches the peer's.

    Args:
        device: "cpu", or None; memory of other devices is refused.
        timeout: seconds that a call may wait where it is given no time-out; default GRADWIRE_TIMEOUT, else 300.
        transport: "auto", "verbs" or "tcp"; default GRADWIRE_TRANSPORT, else "auto".
    """

    def __init__(
        self, device: torch.device | str | None = None, *, timeout: float | None = None, transport: str | None = None
    ) -> None:
        super().__init__(device)
        if self.device is not None and self.device.type != "cpu":
            raise ValueError(f"device: {self.device} is not host memory, which is all that this transport reaches")
        config = Config.from_environment(transport=transport, timeout_s=timeout)
        self._default_timeout = config.timeout_s
        self._native = _native.OneSided.open(timeout_s=config.timeout_s, options=config.options())

    @staticmethod
    def supported() -> bool:
        return True

    def bind(self, *, timeout: float | None = None) -> bytes:
        self._seconds(timeout)
        return self._native.bind()

    def connect(self, peer_url: bytes, *, timeout: float | None = None) -> int:
        self._native.connect(peer_url, self._seconds(timeout))
        return 0

    def connected(self) -> bool:
        return self._native.connected()

    def register_memory(self, tensor: torch.Tensor, *, timeout: float | None = None) -> GradwireMemory:
        self._seconds(timeout)
        self._check_device(tensor.device)
        return GradwireMemory(self, self._native.register(tensor.detach()))

    def unregister_memory(self, memory: Any, *, timeout: float | None = None) -> None:
        if not isinstance(memory, GradwireMemory) or memory._transport is not self:
            raise TypeError("memory was not registered by this transport")
        seconds = self._seconds(timeout)
        native, memory._native = memory._native, None
        if native is not None and not self._native.unregister(native, seconds):
            raise TimeoutError(f"peers still read or write the memory after {seconds:.3f} s")

    def write(
        self,
        local_buffer: MemoryView,
        remote_buffer: RemoteBuffer,
        *,
        async_op: bool = False,
        timeout: float | None = None,
    ) -> int | TransferWork:
        return self._transfer(self._native.write, local_buffer, remote_buffer, async_op, timeout, mutable=False)

    def read(
        self,
        local_buffer: MutableMemoryView,
        remote_buffer: RemoteBuffer,
        *,
        async_op: bool = False,
        timeout: float | None = None,
    ) -> int | TransferWork:
        return self._transfer(self._native.read, local_buffer, remote_buffer, async_op, timeout, mutable=True)

    async def write_async(
        self, local_buffer: MemoryView, remote_buffer: RemoteBuffer, *, timeout: float | None = None
    ) -> None:
        await _finish(self.write(local_buffer, remote_buffer, async_op=True, timeout=timeout), self._seconds(timeout))

    async def read_async(
        self, local_buffer: MutableMemoryView, remote_buffer: RemoteBuffer, *, timeout: float | None = None
    ) -> None:
        await _finish(self.read(local_buffer, remote_buffer, async_op=True, timeout=timeout), self._seconds(timeout))

    def describe(self) -> dict[str, Any]:
        """`wire`: "verbs" where the device reaches the peer's memory, "tcp" where messages do; `text`: it and why."""
        return self._native.describe()

    def close(self, *, timeout: float | None = None) -> None:
        """Waits for what is under way and takes leave; what has not ended by then fails."""
        self._native.close(self._seconds(timeout))

    async def close_async(self, *, timeout: float | None = None) -> None:
        seconds = self._seconds(timeout)
        await asyncio.get_running_loop().run_in_executor(None, self._native.close, seconds)

    def __repr__(self) -> str:
        return f"<GradwireTransport to {self.describe()['text']}>"

    def _check_transfer(self, local_buffer: Any, remote_buffer: Any, *, mutable: bool) -> None:
        view = GradwireMutableMemoryView if mutable else GradwireMemoryView
        if not isinstance(local_buffer, view) or local_buffer._memory._transport is not self:
            raise TypeError(f"local_buffer is not a {view.__name__} of memory that this transport registered")
        if not isinstance(remote_buffer, GradwireRemoteBuffer):
            raise TypeError("remote_buffer was not made by a gradwire transport")

    def _transfer(
        self, begin: Any, local: Any, remote: Any, async_op: bool, timeout: float | None, *, mutable: bool
    ) -> int | TransferWork:
        self._check_transfer(local, remote, mutable=mutable)
        seconds = self._seconds(timeout)
        work = TransferWork(begin(local._memory._active(), local._offset, local._length, remote.told), seconds)
        if async_op:
            return work
        work.wait()
        return 0

    def _seconds(self, timeout: float | None) -> float:
        if timeout is None:
            return float(self._default_timeout or 0)
        if not math.isfinite(timeout) or timeout < 0:
            raise ValueError("timeout must be finite and nonnegative")
        return timeout


async def _finish(work: Any, seconds: float) -> None:
    """Awaits a transfer; what it failed with is raised with its own class, which PyTorch's futures lose."""
    try:
        await wait_all((work,), timeout=seconds)
    except RuntimeError:
        work.wait()
        raise
