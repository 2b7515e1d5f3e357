"""Everything that gradwire raises. Each class carries the fields of the Rust error that it stands for."""


class GradwireError(RuntimeError):
    """Base of all errors of gradwire; caller's mistakes are `ValueError` or `TypeError`."""

    def __init__(self, message: str, **fields: object) -> None:
        super().__init__(message)
        for name, value in fields.items():
            setattr(self, name, value)


class RankFailedError(GradwireError):
    """Ranks died, or left while they were needed.

    Attributes:
        ranks: who, a tuple of int.
        hosts, pids: where they ran.
        cause: what was seen of it.
    """

    ranks: tuple[int, ...]
    hosts: tuple[str, ...]
    pids: tuple[int, ...]
    cause: str


class CollectiveTimeoutError(GradwireError):
    """Ranks did not come before the deadline.

    Attributes:
        missing: who, a tuple of int; empty where all came but no data moved.
        waited_s: the deadline, in seconds.
    """

    missing: tuple[int, ...]
    waited_s: float


class CollectiveMismatchError(GradwireError):
    """A rank called something else, or gave another size.

    Attributes:
        rank: who differs.
        expected: what the others called.
        got: what it called.
    """

    rank: int
    expected: str
    got: str


class GroupAbortedError(GradwireError):
    """A rank ended the group on purpose, or the group is closed."""


class RendezvousTimeoutError(GradwireError):
    """Ranks, or the store, were not there in time."""


class AuthenticationError(GradwireError):
    """The tokens of two ends differ.

    Attributes:
        address: the other end.
    """

    address: str


class ServerLostError(GradwireError):
    """A parameter server is gone.

    Attributes:
        shard: its number.
        address: where it was.
    """

    shard: int
    address: str


class ServerRefusedError(GradwireError):
    """A parameter server does not do what it was asked, and says why."""


class ServerTimeoutError(GradwireError):
    """A parameter server did not answer in time: in synchronous mode it waits for every worker."""
