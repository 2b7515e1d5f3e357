"""What can go wrong, one class per cause, each with the fields that its message is made of.

A caller's own mistake is a `ValueError` or `TypeError`; nothing was sent then. All else is a `GradwireError`.
"""

from __future__ import annotations

from collections.abc import Sequence


class GradwireError(RuntimeError):
    """Any failure of gradwire that is not the caller's mistake."""


class RankFailedError(GradwireError):
    """Ranks died, or left the group while they were needed. The group is over: form a new one without them.

    Attributes:
        ranks: the ranks at fault.
        hosts: the host of each.
        pids: the process id of each, on its host.
        cause: what was seen of it.
        operation: what was under way here: call, dtype, count, number and group.
    """

    def __init__(
        self,
        message: str,
        *,
        ranks: Sequence[int],
        hosts: Sequence[str] = (),
        pids: Sequence[int] = (),
        cause: str = "",
        operation: str = "",
    ) -> None:
        super().__init__(message)
        self.ranks = list(ranks)
        self.hosts = list(hosts)
        self.pids = list(pids)
        self.cause = cause
        self.operation = operation


class CollectiveTimeoutError(GradwireError):
    """Ranks did not come to a collective before its deadline. The group is over.

    Attributes:
        missing: the ranks that did not come; empty where all came, but no data moved.
        hosts: the host of each.
        pids: the process id of each, on its host.
        waited_s: the deadline that passed, in seconds.
        operation: what was under way here.
    """

    def __init__(
        self,
        message: str,
        *,
        missing: Sequence[int] = (),
        hosts: Sequence[str] = (),
        pids: Sequence[int] = (),
        waited_s: float = 0.0,
        operation: str = "",
    ) -> None:
        super().__init__(message)
        self.missing = list(missing)
        self.hosts = list(hosts)
        self.pids = list(pids)
        self.waited_s = waited_s
        self.operation = operation


class CollectiveMismatchError(GradwireError):
    """A rank called something else than the others: another operation, dtype, count, reduction or root, or gave another rank more or
    less than that one awaits. The group is over.

    Attributes:
        expected: what the others called.
        got: what the rank called.
        rank: the rank that differs, or that gave another length.
        host: its host.
        pid: its process id there.
        operation: what was under way here.
    """

    def __init__(
        self, message: str, *, expected: str, got: str, rank: int, host: str = "", pid: int = 0, operation: str = ""
    ) -> None:
        super().__init__(message)
        self.expected = expected
        self.got = got
        self.rank = rank
        self.host = host
        self.pid = pid
        self.operation = operation


class NotANumberError(GradwireError):
    """A rank gave NaN to a collective, and the group looks for it (`GRADWIRE_CHECK_NAN=1`). The group is over.

    Attributes:
        rank: the rank that gave it.
        host: its host.
        pid: its process id there.
        element: the first NaN, counted over all that it gave.
        operation: what was under way here.
    """

    def __init__(
        self, message: str, *, rank: int, host: str = "", pid: int = 0, element: int = 0, operation: str = ""
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.host = host
        self.pid = pid
        self.element = element
        self.operation = operation


class MessageLengthError(GradwireError):
    """A message has another length than the receive that it met. The group goes on.

    Attributes:
        source: the rank that sent it.
        tag: the tag of both.
        expected_bytes: length of the receive.
        got_bytes: length of the message.
    """

    def __init__(self, message: str, *, source: int, tag: int, expected_bytes: int, got_bytes: int) -> None:
        super().__init__(message)
        self.source = source
        self.tag = tag
        self.expected_bytes = expected_bytes
        self.got_bytes = got_bytes


class GroupAbortedError(GradwireError):
    """The group was aborted by a rank, or closed here.

    Attributes:
        reason: who ended it, and why.
    """

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class RendezvousTimeoutError(GradwireError):
    """Others could not be found or reached before the deadline.

    Attributes:
        what: whom or what was waited for, and where it was looked for.
        waited_s: for how long, in seconds.
    """

    def __init__(self, message: str, *, what: str, waited_s: float) -> None:
        super().__init__(message)
        self.what = what
        self.waited_s = waited_s


class AuthenticationError(GradwireError):
    """The other end has another token, or none.

    Attributes:
        address: the other end.
        reason: what does not match.
    """

    def __init__(self, message: str, *, address: str, reason: str) -> None:
        super().__init__(message)
        self.address = address
        self.reason = reason


class TlsError(AuthenticationError):
    """The ends do not agree on TLS, or one does not trust the other's certificate.

    Attributes:
        address: the other end.
        reason: what is wrong.
        remedy: what to do about it.
    """

    def __init__(self, message: str, *, address: str, reason: str, remedy: str) -> None:
        super().__init__(message, address=address, reason=reason)
        self.remedy = remedy


class RegistrationError(GradwireError):
    """Memory could not be made known to a network card, for example because `ulimit -l` is too low.

    Attributes:
        bytes: how much was asked for.
    """

    def __init__(self, message: str, *, bytes: int) -> None:
        super().__init__(message)
        self.bytes = bytes


class CudaError(GradwireError):
    """Memory of a CUDA device cannot be used: no driver, another device than was said, or a call that the driver refused.

    Attributes:
        call: the driver's function that failed; empty where none was called.
        code: what it answered; 0 where none was called.
    """

    def __init__(self, message: str, *, call: str = "", code: int = 0) -> None:
        super().__init__(message)
        self.call = call
        self.code = code


class TransportError(GradwireError):
    """The network or the operating system failed in a way that has no class of its own."""


class ServerLostError(GradwireError):
    """A parameter server is gone, and did not come back in time; its tables are gone with it. Or another worker has lost one,
    and waits in `recover` for all others to come.

    Attributes:
        shard: its place in the list of addresses.
        address: where it was.
        cause: what was seen of its end.
    """

    def __init__(self, message: str, *, shard: int, address: str, cause: str = "") -> None:
        super().__init__(message)
        self.shard = shard
        self.address = address
        self.cause = cause


class ServerRefusedError(GradwireError):
    """A parameter server refused a request.

    Attributes:
        shard: its place in the list of addresses.
        address: where it is.
        subject: the table, barrier or client that it is about.
        what: what does not agree.
        expected: what the server expected.
        got: what it got.
    """

    def __init__(
        self, message: str, *, shard: int, address: str, subject: str, what: str, expected: str, got: str
    ) -> None:
        super().__init__(message)
        self.shard = shard
        self.address = address
        self.subject = subject
        self.what = what
        self.expected = expected
        self.got = got


class ServerTimeoutError(GradwireError):
    """A parameter server did not answer in time.

    Attributes:
        what: what was waited for.
        waited_s: for how long, in seconds.
    """

    def __init__(self, message: str, *, what: str, waited_s: float) -> None:
        super().__init__(message)
        self.what = what
        self.waited_s = waited_s
