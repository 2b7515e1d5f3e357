"""Reads `GRADWIRE_*`: the only place that does."""

import difflib
import os
import warnings

#: Every setting, with what it means; the README's table is made of this.
SETTINGS = {
    "GRADWIRE_TRANSPORT": "auto, tcp or shm: which wire ranks use; auto takes shared memory where all share a host",
    "GRADWIRE_LANES": "TCP connections per pair of ranks; default 1, a fast NIC wants 4 to 8",
    "GRADWIRE_SOCKET_IFNAME": "interfaces to use, in NCCL's grammar (eth,ib  =eth0  ^docker); falls back to GLOO_ and NCCL_SOCKET_IFNAME",
    "GRADWIRE_PORT_RANGE": "ports that listeners may take, first-last; default any",
    "GRADWIRE_TOKEN": "secret that all ends share; proved, never sent",
    "GRADWIRE_ALGO": "algorithms, e.g. all_reduce:ring;broadcast:tree; default by size",
    "GRADWIRE_TIMEOUT": "seconds an operation may take; default 300",
}


def read(**given):
    """The settings of a group: arguments that are not None, else the environment, else defaults.

    Unknown `GRADWIRE_*` names are warned about, with the nearest known one.
    """
    for name in os.environ:
        if name.startswith("GRADWIRE_") and name not in SETTINGS:
            near = difflib.get_close_matches(name, SETTINGS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            warnings.warn(f"{name} is not a setting of gradwire{hint}", stacklevel=3)

    def setting(key, default=None):
        value = given.get(key)
        return value if value is not None else os.environ.get("GRADWIRE_" + key.upper(), default)

    ports = setting("port_range")
    if isinstance(ports, str):
        try:
            first, last = (int(part) for part in ports.split("-"))
        except ValueError:
            raise ValueError(f"GRADWIRE_PORT_RANGE must be first-last, got {ports!r}") from None
        ports = (first, last)
    ifname = setting("socket_ifname") or os.environ.get("GLOO_SOCKET_IFNAME") or os.environ.get("NCCL_SOCKET_IFNAME")
    return {
        "timeout_s": _number(setting("timeout", 300.0), float, "GRADWIRE_TIMEOUT"),
        "transport": setting("transport", "auto"),
        "lanes": _number(setting("lanes", 1), int, "GRADWIRE_LANES"),
        "socket_ifname": ifname,
        "port_range": ports,
        "token": setting("token"),
        "algorithms": setting("algo"),
        "cores": len(os.sched_getaffinity(0)),
    }


def _number(value, kind, name):
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{name} must be a number, got {value!r}") from None
