"""Settings: from arguments, else from the environment, else the defaults of the engine."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import os
import pathlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

#: Every name that is read from the environment, with what it means.
NAMES = {
    "GRADWIRE_TRANSPORT": "auto, verbs, tcp or shm: which wire to use; default auto",
    "GRADWIRE_SOCKET_IFNAME": "network interfaces, in NCCL's grammar; default all, or GLOO_/NCCL_SOCKET_IFNAME",
    "GRADWIRE_PORT_RANGE": "first-last: ports that listeners may take; default any",
    "GRADWIRE_LANES": "TCP connections per peer; default 1",
    "GRADWIRE_ALGO": "algorithms, as `all_reduce:ring;broadcast:tree`; default by size",
    "GRADWIRE_CHECK_NAN": "1: what a rank gives a collective is looked through for NaN, which ends the group with who gave it; default 0",
    "GRADWIRE_DETERMINISTIC": "1: floats are combined in rank order, always; default 0",
    "GRADWIRE_TIMEOUT": "seconds after which an operation fails; default 300",
    "GRADWIRE_TOKEN": "shared secret of all ranks and servers; default none",
    "GRADWIRE_TLS_CERT": "this end's certificate, a PEM file: turns TLS on; listeners need one",
    "GRADWIRE_TLS_KEY": "its private key, a PEM file",
    "GRADWIRE_TLS_CA": "who must have signed the certificates of those that are called: turns TLS on; callers need it",
    "GRADWIRE_TLS_CLIENT_CA": "who must have signed the certificates of those that call; default they need none",
    "GRADWIRE_TLS_SERVER_NAME": "name that called ends must be certified for; default the host, as it is called",
    "GRADWIRE_CUDA_LIBRARY": "file of CUDA's driver; default libcuda.so.1, looked for when a CUDA tensor is handed in",
    "GRADWIRE_CUDA_DIRECT": "0: ranks lend each other no memory of their CUDA devices: all is staged; default 1",
    "GRADWIRE_CUDA_REDUCE": "auto, device or host: where CUDA tensors of more than 4 MiB are summed; default auto, as measured",
    "GRADWIRE_CUDA_ALIKE": "bytes of a call above which all ranks hand in CUDA tensors, or none does; default and most 4194304",
    "GRADWIRE_NVRTC_LIBRARY": "file of NVRTC, which compiles for CUDA devices; default its wheel's, or as the system finds it",
    "GRADWIRE_LOG": "log level of the binaries: error, warn, info, debug or trace",
    "GRADWIRE_LOG_FORMAT": "text or json: how the binaries log",
    "GRADWIRE_TRACE": "folder for the record of the last operations of a group that fails; default none",
    "GRADWIRE_TRACE_SIGNAL": "signal on which the records go to GRADWIRE_TRACE while the program goes on, as USR2 or 12; default none",
    "GRADWIRE_ETCD": "addresses of etcd, by which several `gradwire-ps coordinate` agree who leads; default none",
    "GRADWIRE_IB_HCA": "RDMA devices, in NCCL's grammar: `mlx5_0:1,mlx5_1`, `=exact`, `^not`; default any",
    "GRADWIRE_IB_GID_INDEX": "index of the port's GID; default the RoCE v2 one of the routed address",
    "GRADWIRE_IB_QUEUE_PAIRS": "queue pairs per peer, 1 to 8; default 1",
    "GRADWIRE_IB_TRAFFIC_CLASS": "traffic class of every packet, 0 to 255; default 0",
    "GRADWIRE_IB_SERVICE_LEVEL": "service level, 0 to 15; default 0",
    "GRADWIRE_IB_TIMEOUT": "wait for an acknowledgement, as the exponent in 4.096 us * 2**n, 1 to 31; default 14",
    "GRADWIRE_IB_RETRIES": "how often a packet is sent again, 0 to 6; default 6",
}

_TLS_NAMES = ("cert", "key", "ca", "client_ca", "server_name")
_IB_NUMBERS = ("gid_index", "queue_pairs", "traffic_class", "service_level", "timeout", "retries")

#: The least and the most of what is a whole number.
_LIMITS = {
    "lanes": (1, 64),
    "cuda_alike": (0, 4 << 20),
    "ib_gid_index": (0, 255),
    "ib_queue_pairs": (1, 8),
    "ib_traffic_class": (0, 255),
    "ib_service_level": (0, 15),
    "ib_timeout": (1, 31),
    "ib_retries": (0, 6),
}

#: How long an operation may take, in seconds, where nothing else is said.
DEFAULT_TIMEOUT_S = 300.0
#: The longest that the environment may ask for, 31 years: clocks and `timedelta` can still be added to.
_MOST_SECONDS = 1e9


@dataclass(frozen=True)
class Config:
    """Settings of a group or a client. None: the engine's default.

    Attributes:
        transport: "auto", "verbs", "tcp" or "shm".
        lanes: TCP connections per peer, 1 to 64.
        socket_ifname: network interfaces to use: prefixes, `=exact` or `^not`.
        port_range: first and last port that listeners may take.
        token: shared secret; proved, never sent.
        tls_cert: this end's certificate, a PEM file; listeners (servers, ranks) need one.
        tls_key: its private key.
        tls_ca: who must have signed the certificates of those that are called; callers (clients, ranks) need it.
        tls_client_ca: who must have signed the certificates of those that call; None: they need none.
        tls_server_name: name that called ends must be certified for; None: the host, as it is called.
        algorithms: algorithm per collective.
        deterministic: floats are combined in rank order: the same bits for every algorithm, wire and cut of a buffer.
        check_nan: what this rank gives collectives is looked through for NaN, which ends the group with who gave it.
        trace: folder that the record of the last operations goes to when the group fails.
        trace_signal: signal on which the record goes there too, while the program goes on: "USR2", or its number.
        cuda_direct: whether ranks lend each other memory of their CUDA devices, on one host and over RDMA.
        cuda_reduce: where CUDA tensors of more than 4 MiB are summed: "auto" (where it takes less, as the ranks measure it), "device"
            (wherever there is a kernel) or "host" (where one rank says so, all do).
        cuda_alike: bytes of a call above which all ranks hand in CUDA tensors, or none does, so that they may go from device to device: at
            most 4 MiB; the same on all ranks.
        nvrtc: file of NVRTC, which compiles what folds on a device; None: that of NVIDIA's wheel, or as the system finds it.
        timeout_s: seconds after which an operation fails.
        ib_hca: RDMA devices to use, in NCCL's grammar.
        ib_gid_index: index of the RDMA port's GID.
        ib_queue_pairs: queue pairs per peer, 1 to 8.
        ib_traffic_class: traffic class of every RDMA packet, 0 to 255.
        ib_service_level: service level, 0 to 15.
        ib_timeout: how long the device waits for an acknowledgement: 4.096 us * 2**n, 1 to 31.
        ib_retries: how often it sends again, 0 to 6.
    """

    transport: str | None = None
    lanes: int | None = None
    socket_ifname: str | None = None
    port_range: tuple[int, int] | None = None
    token: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_ca: str | None = None
    tls_client_ca: str | None = None
    tls_server_name: str | None = None
    algorithms: str | None = None
    deterministic: bool | None = None
    check_nan: bool | None = None
    trace: str | None = None
    trace_signal: str | None = None
    cuda_direct: bool | None = None
    cuda_reduce: str | None = None
    cuda_alike: int | None = None
    nvrtc: str | None = None
    timeout_s: float = DEFAULT_TIMEOUT_S
    ib_hca: str | None = None
    ib_gid_index: int | None = None
    ib_queue_pairs: int | None = None
    ib_traffic_class: int | None = None
    ib_service_level: int | None = None
    ib_timeout: int | None = None
    ib_retries: int | None = None

    def __post_init__(self) -> None:
        for name, (least, most) in _LIMITS.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ValueError(f"{name} (GRADWIRE_{name.upper()}): {value} is not from {least} to {most}")
        if self.trace_signal and not self.trace:
            raise ValueError("GRADWIRE_TRACE_SIGNAL: there is no folder for the records: set GRADWIRE_TRACE, too")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None, **given: Any) -> Config:
        """Reads `environment` (default `os.environ`); arguments that are not None win.

        A name that starts with `GRADWIRE_` and means nothing is a `RuntimeWarning` with the nearest name that does.

        Raises:
            ValueError: a value that cannot be read; the message names the variable.
        """
        environment = os.environ if environment is None else environment
        _warn_of_unknown_names(environment)
        names = ("GRADWIRE_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
        config = cls(
            transport=environment.get("GRADWIRE_TRANSPORT"),
            lanes=_number(environment, "GRADWIRE_LANES", int),
            socket_ifname=next((environment[name] for name in names if environment.get(name)), None),
            port_range=_port_range(environment),
            token=environment.get("GRADWIRE_TOKEN"),
            algorithms=environment.get("GRADWIRE_ALGO"),
            deterministic=_switch(environment, "GRADWIRE_DETERMINISTIC"),
            check_nan=_switch(environment, "GRADWIRE_CHECK_NAN"),
            trace=environment.get("GRADWIRE_TRACE"),
            trace_signal=environment.get("GRADWIRE_TRACE_SIGNAL") or None,
            cuda_direct=_switch(environment, "GRADWIRE_CUDA_DIRECT"),
            cuda_reduce=environment.get("GRADWIRE_CUDA_REDUCE"),
            cuda_alike=_number(environment, "GRADWIRE_CUDA_ALIKE", int),
            nvrtc=environment.get("GRADWIRE_NVRTC_LIBRARY"),
            timeout_s=_seconds(environment, "GRADWIRE_TIMEOUT") or DEFAULT_TIMEOUT_S,
            ib_hca=environment.get("GRADWIRE_IB_HCA"),
            **{f"tls_{name}": environment.get(f"GRADWIRE_TLS_{name.upper()}") for name in _TLS_NAMES},
            **{f"ib_{name}": _number(environment, f"GRADWIRE_IB_{name.upper()}", int) for name in _IB_NUMBERS},
        )
        return replace(config, **{name: value for name, value in given.items() if value is not None})

    def options(self) -> dict[str, Any]:
        """What the engine is given."""
        return {
            "transport": self.transport,
            "lanes": self.lanes,
            "socket_ifname": self.socket_ifname,
            "port_range": self.port_range,
            "token": self.token,
            "algorithms": self.algorithms,
            "deterministic": self.deterministic,
            "check_nan": self.check_nan,
            "trace": self.trace,
            "trace_signal": self.trace_signal,
            "cuda_direct": self.cuda_direct,
            "cuda_reduce": self.cuda_reduce,
            "cuda_alike": self.cuda_alike,
            "nvrtc": self.nvrtc or _nvrtc_of_wheels(),
            "cores": len(os.sched_getaffinity(0)),
            "tls": {name: getattr(self, f"tls_{name}") for name in _TLS_NAMES},
            "ib": {name: getattr(self, f"ib_{name}") for name in ("hca", *_IB_NUMBERS)},
        }


@functools.cache
def _nvrtc_of_wheels() -> str | None:
    """NVRTC as pip installs it, which is also where PyTorch's CUDA wheels have it."""
    found = importlib.util.find_spec("nvidia")
    folders = [] if found is None else found.submodule_search_locations or []
    files = [file for folder in folders for file in pathlib.Path(folder).glob("*/lib/libnvrtc.so.*")]
    return str(max(files, key=lambda file: file.name)) if files else None


def _number(environment: Mapping[str, str], name: str, kind: type) -> Any:
    text = environment.get(name)
    if text is None:
        return None
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name}: `{text}` is not a number ({NAMES[name]})") from None


def _seconds(environment: Mapping[str, str], name: str) -> float | None:
    seconds: float | None = _number(environment, name, float)
    if seconds is None or 0 < seconds <= _MOST_SECONDS:
        return seconds
    raise ValueError(f"{name}: `{environment[name]}` is not above 0 and at most {_MOST_SECONDS:.0e} ({NAMES[name]})")


def _switch(environment: Mapping[str, str], name: str) -> bool | None:
    text = environment.get(name)
    if text is None:
        return None
    known = {"1": True, "true": True, "0": False, "false": False, "": False}
    if text.lower() in known:
        return known[text.lower()]
    raise ValueError(f"{name}: `{text}` is neither 0 nor 1 ({NAMES[name]})")


def _port_range(environment: Mapping[str, str]) -> tuple[int, int] | None:
    text = environment.get("GRADWIRE_PORT_RANGE")
    if text is None:
        return None
    first, dash, last = text.partition("-")
    if dash and first.strip().isdigit() and last.strip().isdigit() and int(first) <= int(last) <= 65535:
        return int(first), int(last)
    raise ValueError(f"GRADWIRE_PORT_RANGE: `{text}` is not a range of ports as 20000-20100")


def _warn_of_unknown_names(environment: Mapping[str, str]) -> None:
    for name in environment:
        if name.startswith("GRADWIRE_") and name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(NAMES)}"
            warnings.warn(f"{name} is set, but means nothing to gradwire{hint}", RuntimeWarning, stacklevel=4)
