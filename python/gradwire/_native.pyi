"""The engine behind the package: pointers in, handles out. Use the package's own classes instead."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

__version__: str

def after_fork() -> None:
    """Called in the child after each fork: objects of the parent are refused there."""

@final
class Operation:
    """A handle of one or several operations under way. Dropping it does not stop them."""

    @staticmethod
    def join(operations: Sequence[Operation]) -> Operation:
        """One handle for all of `operations`."""

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until all have ended; False when `timeout_s` passed first, and they go on."""

    def is_done(self) -> bool:
        """Whether all have ended."""

    def on_done(self, callback: Callable[[], object]) -> None:
        """Has `callback()` called once all have ended, on a thread of its own."""

    @property
    def source(self) -> int | None:
        """The rank that sent a received message; None for all else, and before it has ended."""

@final
class Group:
    """A group of ranks, and this process's place in it."""

    @staticmethod
    def form(
        name: str,
        *,
        init_method: str | None = None,
        store: Any = None,
        rank: int | None = None,
        world_size: int | None = None,
        timeout_s: float,
        options: Mapping[str, Any],
        environment: Mapping[str, str],
    ) -> Group:
        """Meets the other ranks and connects to them."""

    @property
    def rank(self) -> int:
        """This process's place in the group."""

    @property
    def world_size(self) -> int:
        """The number of ranks."""

    @property
    def sequence(self) -> int:
        """Collectives begun so far."""

    def run(
        self,
        collective: str,
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        *,
        op: str | None = None,
        root: int = 0,
        timeout_s: float | None = None,
        background: bool = False,
    ) -> Operation | None:
        """Begins `collective` and returns its handle; without `background`, carries it out and returns None."""

    def send(self, tensor: Any, to: int, tag: int, timeout_s: float | None = None) -> Operation:
        """Begins to send `tensor` to rank `to`, where it meets a receive with the same tag."""

    def recv(self, tensor: Any, source: int | None, tag: int, timeout_s: float | None = None) -> Operation:
        """Begins to receive into `tensor` from rank `source`, or from whoever is first."""

    def set_timeout(self, timeout_s: float) -> None:
        """How long an operation may take that is given no time-out of its own."""

    def describe(self) -> dict[str, Any]:
        """What `describe()` tells, as plain values."""

    def check(self) -> None:
        """Raises the error that ended the group, if it is over."""

    def abort(self, reason: str) -> None:
        """Ends the group on every rank, with `reason`."""

    def close(self, timeout_s: float) -> None:
        """Leaves the group in good order, within `timeout_s`."""
