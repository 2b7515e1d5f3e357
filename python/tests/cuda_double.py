"""A process's view of the double of CUDA's driver: arrays in memory that the host cannot touch, on streams that run by themselves."""

from __future__ import annotations

import ctypes
import pathlib
import struct
import subprocess
import time
from typing import Any

import numpy

SOURCE = pathlib.Path(__file__).resolve().parents[2] / "transport" / "tests" / "cuda" / "driver_double.c"
#: Places in the control file, as the double's source has them.
DEVICES, DELAY_US, STREAM_VALUES, DMA_BUF, LIVE_DEVICE_BYTES, LIVE_PINNED_BYTES, LAUNCHES, LIVE_OPENED = 0, 1, 5, 6, 16, 17, 25, 26
#: The legacy default stream, as `__cuda_array_interface__` calls it.
DEFAULT = 1


def build(folder: pathlib.Path) -> str:
    """Builds a double with two devices in `folder`; its path."""
    path = folder / "libcuda.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-fvisibility=hidden", "-pthread", "-o", str(path), str(SOURCE)]
    subprocess.run(command, check=True)
    numbers = [0] * 512
    numbers[DEVICES], numbers[STREAM_VALUES], numbers[DELAY_US], numbers[DMA_BUF] = 2, 1, 200, 1
    pathlib.Path(f"{path}.control").write_bytes(struct.pack("512q", *numbers))
    return str(path)


class Driver:
    """The double at `path`, with the context of `device` current on this thread."""

    def __init__(self, path: str, device: int = 0) -> None:
        self.cuda = ctypes.CDLL(path)
        self.device = device
        context = ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxPushCurrent_v2", context)

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self.cuda, name)(*arguments)
        assert code == 0, f"{name}: {code}"

    def stream(self) -> int:
        handle = ctypes.c_void_p()
        self.call("cuStreamCreate", ctypes.byref(handle), 1)
        assert handle.value is not None
        return handle.value

    def array(self, host: numpy.ndarray, stream: int = DEFAULT, **said: Any) -> Array:
        """A device's copy of `host`; it is on its way when this returns, in the order of `stream`."""
        address, pinned = ctypes.c_uint64(), ctypes.c_void_p()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(host.nbytes, 1)))
        self.call("cuMemHostAlloc", ctypes.byref(pinned), ctypes.c_size_t(max(host.nbytes, 1)), 0)
        ctypes.memmove(pinned, numpy.ascontiguousarray(host).ctypes.data, host.nbytes)
        if host.nbytes:
            size = ctypes.c_size_t(host.nbytes)
            self.call("cuMemcpyHtoDAsync_v2", address, pinned, size, ctypes.c_void_p(stream))
        return Array(address.value, host.shape, host.dtype, stream, said)

    def numpy(self, array: Array, stream: int = DEFAULT) -> numpy.ndarray:
        """What a device's array holds after all that `stream` has been given."""
        pinned, event = ctypes.c_void_p(), ctypes.c_void_p()
        host = numpy.empty(array.shape, array.dtype)
        self.call("cuMemHostAlloc", ctypes.byref(pinned), ctypes.c_size_t(max(host.nbytes, 1)), 0)
        self.call("cuEventCreate", ctypes.byref(event), 2)
        if host.nbytes:
            size, address = ctypes.c_size_t(host.nbytes), ctypes.c_uint64(array.address)
            self.call("cuMemcpyDtoHAsync_v2", pinned, address, size, ctypes.c_void_p(stream))
        self.call("cuEventRecord", event, ctypes.c_void_p(stream))
        until = time.monotonic() + 60
        while self.cuda.cuEventQuery(event) == 600:
            assert time.monotonic() < until, "the stream does not move"
            time.sleep(0.001)
        self.call("cuEventQuery", event)
        ctypes.memmove(host.ctypes.data, pinned, host.nbytes)
        return host


class Array:
    """As CuPy's and Numba's arrays say where their memory is."""

    def __init__(self, address: int, shape: Any, dtype: numpy.dtype, stream: int | None, said: dict[str, Any]) -> None:
        self.address, self.shape, self.dtype = address, shape, dtype
        self.__cuda_array_interface__ = {
            "shape": tuple(shape),
            "typestr": dtype.str,
            "data": (address, False),
            "version": 3,
            "stream": stream,
            **said,
        }


class DLDevice(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("id", ctypes.c_int32)]


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", DLDevice),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class DLManaged(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", DLTensor),
    ]


_FROM = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(ctypes.c_void_p))
_STREAM = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p))


class DLExchange(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("previous", ctypes.c_void_p),
        ("allocator", ctypes.c_void_p),
        ("from_object", _FROM),
        ("to_object", ctypes.c_void_p),
        ("tensor_from_object", ctypes.c_void_p),
        ("current_stream", _STREAM),
    ]


class Tensor:
    """A tensor that says where it is as PyTorch's do: by DLPack's C exchange API, which tells the current stream, too."""

    stream = DEFAULT

    def __init__(self, array: Array, device: int) -> None:
        shape = (ctypes.c_int64 * len(array.shape))(*array.shape)
        assert array.dtype == numpy.float32
        tensor = DLTensor(array.address, DLDevice(2, device), len(array.shape), 2, 32, 1, shape, None, 0)
        self.managed = DLManaged(1, 3, None, None, 0, tensor)
        self._pointed_to = shape
        self.shape = array.shape

    @staticmethod
    def _managed(tensor: Tensor, out: Any) -> int:
        out[0] = ctypes.addressof(tensor.managed)
        return 0

    @staticmethod
    def _current(kind: int, device: int, out: Any) -> int:
        out[0] = Tensor.stream
        return 0 if kind == 2 else 1


_api = DLExchange(1, 3, None, None, _FROM(Tensor._managed), None, None, _STREAM(Tensor._current))
_new = ctypes.pythonapi.PyCapsule_New
_new.restype, _new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
# A capsule does not copy its name.
_name = ctypes.create_string_buffer(b"dlpack_exchange_api")
Tensor.__dlpack_c_exchange_api__ = _new(ctypes.addressof(_api), ctypes.addressof(_name), None)  # type: ignore[attr-defined]
