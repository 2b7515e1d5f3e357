"""Tensors and arrays as memory: checked here, used by address in Rust, never copied."""

import numpy


def memory(value, argument, *, write):
    """(address, bytes, owner) and the dtype's name of a NumPy array, a torch tensor, or anything with the buffer protocol.

    Raises:
        TypeError: not an array.
        ValueError: not contiguous, not on the CPU, or read-only where it is to be written.
    """
    if hasattr(value, "data_ptr"):
        return _tensor(value, argument)
    if not isinstance(value, numpy.ndarray):
        if isinstance(value, (str, list, tuple, int, float)) or value is None:
            raise TypeError(f"{argument} must be an array or a tensor, got {type(value).__name__}")
        try:
            value = numpy.asarray(memoryview(value))
        except TypeError:
            message = f"{argument} must be an array, a tensor or a buffer, got {type(value).__name__}"
            raise TypeError(message) from None
    if not value.flags.c_contiguous:
        raise ValueError(f"{argument} of shape {value.shape} is not contiguous: pass numpy.ascontiguousarray({argument})")
    if write and not value.flags.writeable:
        raise ValueError(f"{argument} of shape {value.shape} is read-only, but is to be written")
    if value.dtype.hasobject or not value.dtype.isnative:
        raise ValueError(f"{argument} has dtype {value.dtype}, which cannot travel")
    return (value.ctypes.data, value.nbytes, value), value.dtype.name


def _tensor(value, argument):
    if value.device.type != "cpu":
        raise ValueError(f"{argument} is on {value.device}: only CPU tensors can travel so far; call .cpu() first")
    if value.layout != _strided(value):
        raise ValueError(f"{argument} is {value.layout}, which cannot travel: call .to_dense() first")
    if not value.is_contiguous():
        raise ValueError(f"{argument} of shape {tuple(value.shape)} is not contiguous: pass {argument}.contiguous()")
    if value.is_conj() or value.is_neg():
        raise ValueError(f"{argument} is a lazy conjugate or negative view: pass {argument}.resolve_conj().resolve_neg()")
    return (value.data_ptr(), value.nbytes, value), str(value.dtype).removeprefix("torch.")


def _strided(value):
    import sys

    return sys.modules["torch"].strided
