"""Every operation of c10d over every dtype, reduction and layout, as cases: what a rank gets, and what it should get.

All ranks run the same cases in the same order within one group. Values are small whole numbers, so that every reduction of
them is exact in every dtype that it is made in, and results are compared bit for bit.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
FLOATS8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
COMPLEX = [torch.complex32, torch.complex64, torch.complex128]
#: Moved, never reduced: the first is an exponent alone, the second two numbers in a byte.
BITS = [torch.float8_e8m0fnu, torch.float4_e2m1fn_x2]
REDUCED = [*FLOATS, *FLOATS8, *INTEGERS, torch.bool, *COMPLEX]
MOVED = [*REDUCED, *BITS]

Op = dist.ReduceOp
HALF = dist._make_nccl_premul_sum(0.5)
ARITHMETIC = [Op.SUM, Op.AVG, Op.MIN, Op.MAX, Op.PRODUCT]
BITWISE = [Op.BAND, Op.BOR, Op.BXOR]

#: A case: its name, and what gives the pairs of what came and what should have.
Case = tuple[str, Callable[[], list[tuple[Any, Any]]]]


def reductions(dtype: torch.dtype) -> list[Any]:
    """What `dtype` can be reduced by."""
    if dtype.is_complex:
        return [Op.SUM, Op.AVG]
    if dtype == torch.bool:
        return [Op.SUM, Op.MIN, Op.MAX, Op.PRODUCT, *BITWISE]
    return [*ARITHMETIC, *BITWISE] if dtype in INTEGERS else [*ARITHMETIC, HALF] if dtype in FLOATS else ARITHMETIC


def kind(op: Any) -> str:
    return str(getattr(op, "op", op)).rpartition(".")[2]


def numbers(shape: tuple[int, ...], rank: int, salt: int = 0) -> Tensor:
    """Whole numbers from 1 to 4 that tell their place, their rank and `salt`."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * 7 + rank * 3 + salt) % 4 + 1).reshape(shape)


def of(values: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.bool:
        return values > 2
    if dtype in BITS:
        return values.to(torch.uint8).view(dtype)
    if dtype.is_complex:
        part = torch.float32 if dtype == torch.complex32 else torch.float64
        return torch.complex(values.to(part), (values % 3).to(part)).to(dtype)
    return values.to(dtype)


def reduced(inputs: list[Tensor], op: Any, dtype: torch.dtype) -> Tensor:
    """The reduction of all ranks' `inputs`."""
    name = kind(op)
    if dtype == torch.bool:
        every = torch.stack(inputs)
        if name == "BXOR":
            return every.sum(0) % 2 == 1
        return every.all(0) if name in ("MIN", "PRODUCT", "BAND") else every.any(0)
    if dtype.is_complex:
        parts = [torch.view_as_real(one.to(torch.complex128)) for one in inputs]
        return torch.view_as_complex(reduced(parts, op, torch.float64)).to(dtype)
    whole = torch.int64 if dtype in INTEGERS else torch.float64
    every = torch.stack([one.to(whole) for one in inputs])
    size = len(inputs)
    if name in ("BAND", "BOR", "BXOR"):
        by = {"BAND": torch.bitwise_and, "BOR": torch.bitwise_or, "BXOR": torch.bitwise_xor}[name]
        return functools.reduce(by, every).to(dtype)
    if name == "AVG":
        total = every.sum(0)
        return (total.div(size, rounding_mode="trunc") if whole == torch.int64 else total / size).to(dtype)
    if name == "PREMUL_SUM":
        return (every.sum(0) * 0.5).to(dtype)
    found = {"SUM": every.sum, "PRODUCT": every.prod}.get(name)
    return (found(0) if found else every.amin(0) if name == "MIN" else every.amax(0)).to(dtype)


def same(got: Any, want: Any) -> bool:
    """Equality to the bit, of tensors also of shape and dtype."""
    if not isinstance(want, Tensor):
        return bool(got == want)
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    if want.numel() == 0:
        return True
    bits = [one.detach().contiguous().reshape(-1).view(torch.uint8) for one in (got, want)]
    return torch.equal(*bits)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t()


def strided(tensor: Tensor) -> Tensor:
    bytes_wide = tensor.contiguous().view(torch.uint8) if tensor.dtype in BITS else tensor
    spread = torch.stack([bytes_wide, bytes_wide], 1).flatten(0, 1)
    return (spread.view(tensor.dtype) if tensor.dtype in BITS else spread)[::2]


#: Shape, and what lays a tensor of it out.
LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "plain": ((4, 3), Tensor.clone),
    "0-dim": ((), Tensor.clone),
    "empty": ((0, 3), Tensor.clone),
    "transposed": ((4, 3), transposed),
    "strided": ((4, 3), strided),
    "long": ((30_011, 1), Tensor.clone),
}


def hole(tensor: Tensor, lay: Callable[[Tensor], Tensor] = Tensor.clone) -> Tensor:
    """A tensor like `tensor` that holds something else."""
    return lay(of(torch.zeros(tensor.shape, dtype=torch.int64), tensor.dtype))


class Cases:
    """The cases of one rank in a group of `size`: a method for each operation of c10d."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def inputs(self, dtype: torch.dtype, shape: tuple[int, ...], salt: int = 0) -> list[Tensor]:
        """Every rank's tensor."""
        return [of(numbers(shape, rank, salt), dtype) for rank in range(self.size)]

    def all_reduce(self) -> Iterator[Case]:
        for dtype in FLOATS8:
            yield f"{dtype} SUM of every two values", functools.partial(self.every_two, dtype)
        for dtype, op, layout in self.grid():
            yield from self.in_place(dtype, op, layout, lambda t, op=op: dist.all_reduce(t, op=op), range(self.size))

    def all_reduce_coalesced(self) -> Iterator[Case]:
        def case(dtype: torch.dtype) -> list[tuple[Any, Any]]:
            inputs = [self.inputs(dtype, shape) for shape in [(5,), (0,), (2, 3)]]
            got = [each[self.rank].clone() for each in inputs]
            dist.all_reduce_coalesced(got)
            return [(one, reduced(each, Op.SUM, dtype)) for one, each in zip(got, inputs, strict=True)]

        for dtype in REDUCED:
            # c10d hands over complex tensors of this call as they are.
            yield f"{dtype}", functools.partial(case, dtype)

    def reduce(self) -> Iterator[Case]:
        for dtype, op, layout in self.grid():
            for root in {0, self.size - 1}:
                yield from self.in_place(
                    dtype, op, layout, lambda t, op=op, root=root: dist.reduce(t, root, op=op), [root], f" to {root}"
                )

    def broadcast(self) -> Iterator[Case]:
        def case(dtype: torch.dtype, layout: str, root: int) -> list[tuple[Any, Any]]:
            shape, lay = LAYOUTS[layout]
            inputs = self.inputs(dtype, shape)
            got = lay(inputs[self.rank])
            dist.broadcast(got, root)
            return [(got, inputs[root])]

        for dtype in MOVED:
            for layout in LAYOUTS:
                yield f"{dtype} {layout}", functools.partial(case, dtype, layout, self.size - 1)

    def all_gather(self) -> Iterator[Case]:
        def case(dtype: torch.dtype, layout: str) -> list[tuple[Any, Any]]:
            shape, lay = LAYOUTS[layout]
            inputs = self.inputs(dtype, shape)
            got = [hole(each, lay) for each in inputs]
            dist.all_gather(got, lay(inputs[self.rank]))
            return list(zip(got, inputs, strict=True))

        def uneven(dtype: torch.dtype) -> list[tuple[Any, Any]]:
            inputs = [of(numbers((rank, 3), rank), dtype) for rank in range(self.size)]
            got = [hole(each) for each in inputs]
            dist.all_gather(got, inputs[self.rank])
            return list(zip(got, inputs, strict=True))

        for dtype in MOVED:
            yield f"{dtype} uneven", functools.partial(uneven, dtype)
            for layout in LAYOUTS:
                yield f"{dtype} {layout}", functools.partial(case, dtype, layout)

    def all_gather_coalesced(self) -> Iterator[Case]:
        def case(dtype: torch.dtype) -> list[tuple[Any, Any]]:
            inputs = [self.inputs(dtype, shape) for shape in [(5,), (2, 3)]]
            got = [[hole(each[rank]) for each in inputs] for rank in range(self.size)]
            dist.all_gather_coalesced(got, [each[self.rank] for each in inputs])
            return [(got[rank][at], each[rank]) for rank in range(self.size) for at, each in enumerate(inputs)]

        for dtype in MOVED:
            yield f"{dtype}", functools.partial(case, dtype)

    def all_gather_into_tensor(self) -> Iterator[Case]:
        def case(dtype: torch.dtype, shape: tuple[int, ...], stacked: bool, lay: Any) -> list[tuple[Any, Any]]:
            inputs = self.inputs(dtype, shape)
            want = torch.stack([bits(one) for one in inputs]) if stacked else torch.cat([bits(one) for one in inputs])
            want = want.view(dtype)
            got = hole(want, lay)
            dist.all_gather_into_tensor(got, lay(inputs[self.rank]))
            return [(got, want)]

        for dtype in MOVED:
            for stacked in (False, True):
                yield f"{dtype} {stacked=}", functools.partial(case, dtype, (4, 3), stacked, Tensor.clone)
            yield f"{dtype} empty", functools.partial(case, dtype, (0, 3), False, Tensor.clone)
            yield f"{dtype} long", functools.partial(case, dtype, (30_011,), False, Tensor.clone)
            yield f"{dtype} 0-dim", functools.partial(case, dtype, (), True, Tensor.clone)

    def reduce_scatter(self) -> Iterator[Case]:
        def case(dtype: torch.dtype, op: Any, layout: str) -> list[tuple[Any, Any]]:
            shape, lay = LAYOUTS[layout]
            inputs = [self.inputs(dtype, shape, salt) for salt in range(self.size)]
            got = hole(inputs[0][0], lay)
            dist.reduce_scatter(got, [lay(each[self.rank]) for each in inputs], op=op)
            return [(got, reduced(inputs[self.rank], op, dtype))]

        for dtype, op, layout in self.grid():
            yield f"{dtype} {kind(op)} {layout}", functools.partial(case, dtype, op, layout)

    def reduce_scatter_tensor(self) -> Iterator[Case]:
        def case(dtype: torch.dtype, op: Any, rows: int) -> list[tuple[Any, Any]]:
            inputs = self.inputs(dtype, (rows * self.size, 3))
            got = hole(inputs[0][:rows])
            dist.reduce_scatter_tensor(got, inputs[self.rank], op=op)
            return [(got, reduced(inputs, op, dtype)[self.rank * rows :][:rows])]

        for dtype in REDUCED:
            for op in reductions(dtype):
                for rows in (4, 10_007) if op == Op.SUM else (4,):
                    yield f"{dtype} {kind(op)} {rows} rows", functools.partial(case, dtype, op, rows)
            yield f"{dtype} empty", functools.partial(case, dtype, Op.SUM, 0)

    def all_to_all(self) -> Iterator[Case]:
        def case(dtype: torch.dtype, layout: str) -> list[tuple[Any, Any]]:
            shape, lay = LAYOUTS[layout]
            inputs = [self.inputs(dtype, shape, salt) for salt in range(self.size)]
            got = [hole(inputs[0][0], lay) for _ in range(self.size)]
            dist.all_to_all(got, [lay(inputs[to][self.rank]) for to in range(self.size)])
            return list(zip(got, inputs[self.rank], strict=True))

        def uneven(dtype: torch.dtype) -> list[tuple[Any, Any]]:
            def between(source: int, to: int) -> Tensor:
                return of(numbers((source * to, 2), source, to), dtype)

            got = [hole(between(source, self.rank)) for source in range(self.size)]
            dist.all_to_all(got, [between(self.rank, to) for to in range(self.size)])
            return [(one, between(source, self.rank)) for source, one in enumerate(got)]

        for dtype in MOVED:
            yield f"{dtype} uneven", functools.partial(uneven, dtype)
            for layout in LAYOUTS:
                yield f"{dtype} {layout}", functools.partial(case, dtype, layout)

    def all_to_all_single(self) -> Iterator[Case]:
        def case(dtype: torch.dtype, even: bool, lay: Any) -> list[tuple[Any, Any]]:
            def between(source: int, to: int) -> Tensor:
                rows = 2 if even else source + to
                return bits(of(numbers((rows, 4), source, to), dtype))

            ours = torch.cat([between(self.rank, to) for to in range(self.size)]).view(dtype)
            want = torch.cat([between(source, self.rank) for source in range(self.size)]).view(dtype)
            got = hole(want, lay)
            splits = None if even else [self.rank + other for other in range(self.size)]
            dist.all_to_all_single(got, lay(ours), splits, splits)
            return [(got, want)]

        for dtype in MOVED:
            for name, lay in [("plain", Tensor.clone), ("transposed", transposed)]:
                for even in (True, False):
                    yield f"{dtype} {even=} {name}", functools.partial(case, dtype, even, lay)

    def gather(self) -> Iterator[Case]:
        def case(dtype: torch.dtype, layout: str, root: int) -> list[tuple[Any, Any]]:
            shape, lay = LAYOUTS[layout]
            inputs = self.inputs(dtype, shape)
            got = [hole(each, lay) for each in inputs] if self.rank == root else None
            dist.gather(lay(inputs[self.rank]), got, dst=root)
            return list(zip(got or [], inputs if got else [], strict=True))

        for dtype in MOVED:
            for layout in LAYOUTS:
                yield f"{dtype} {layout}", functools.partial(case, dtype, layout, self.size - 1)

    def scatter(self) -> Iterator[Case]:
        def case(dtype: torch.dtype, layout: str, root: int) -> list[tuple[Any, Any]]:
            shape, lay = LAYOUTS[layout]
            inputs = self.inputs(dtype, shape)
            got = hole(inputs[0], lay)
            dist.scatter(got, [lay(one) for one in inputs] if self.rank == root else None, src=root)
            return [(got, inputs[self.rank])]

        for dtype in MOVED:
            for layout in LAYOUTS:
                yield f"{dtype} {layout}", functools.partial(case, dtype, layout, self.size - 1)

    def send_and_recv(self) -> Iterator[Case]:
        def case(dtype: torch.dtype, layout: str, source: int | None) -> list[tuple[Any, Any]]:
            shape, lay = LAYOUTS[layout]
            inputs = self.inputs(dtype, shape)
            if self.rank == 0:
                dist.send(lay(inputs[0]), 1, tag=7)
            if self.rank != 1:
                return []
            got = hole(inputs[0], lay)
            return [(dist.recv(got, source, tag=7), 0), (got, inputs[0])]

        for dtype in MOVED:
            for layout in LAYOUTS:
                for source in (0, None):
                    yield f"{dtype} {layout} from {source}", functools.partial(case, dtype, layout, source)

    def batch_isend_irecv(self) -> Iterator[Case]:
        def case(dtype: torch.dtype) -> list[tuple[Any, Any]]:
            inputs = [of(numbers((rank + 1, 3), rank), dtype) for rank in range(self.size)]
            others = [rank for rank in range(self.size) if rank != self.rank]
            got = {rank: hole(inputs[rank]) for rank in others}
            calls = [dist.P2POp(dist.irecv, got[rank], rank) for rank in others]
            calls += [dist.P2POp(dist.isend, inputs[self.rank], rank) for rank in others]
            for work in dist.batch_isend_irecv(calls):
                work.wait()
            return [(one, inputs[rank]) for rank, one in got.items()]

        for dtype in MOVED:
            yield f"{dtype}", functools.partial(case, dtype)

    def coalescing_manager(self) -> Iterator[Case]:
        def collectives(dtype: torch.dtype, device: Any, background: bool) -> list[tuple[Any, Any]]:
            inputs = [self.inputs(dtype, shape) for shape in [(5,), (2, 3), (0,)]]
            summed = [each[self.rank].clone() for each in inputs]
            gathered = [hole(torch.stack([bits(one) for one in each]).view(dtype)) for each in inputs]
            wide = [self.inputs(dtype, (self.size * rows,)) for rows in (1, 3)]
            parts = [hole(each[0][: len(each[0]) // self.size]) for each in wide]
            for call, many in [
                (dist.all_reduce, [(one,) for one in summed]),
                (dist.all_gather_into_tensor, [(out, each[self.rank]) for out, each in zip(gathered, inputs, strict=True)]),
                (dist.reduce_scatter_tensor, [(out, each[self.rank]) for out, each in zip(parts, wide, strict=True)]),
            ]:
                with dist._coalescing_manager(device=device, async_ops=background) as manager:
                    for arguments in many:
                        call(*arguments)
                if background:
                    manager.wait()
            return [
                *[(one, reduced(each, Op.SUM, dtype)) for one, each in zip(summed, inputs, strict=True)],
                *[(one, torch.stack(each)) for one, each in zip(gathered, inputs, strict=True)],
                *[
                    (one, reduced(each, Op.SUM, dtype)[len(one) * self.rank :][: len(one)])
                    for one, each in zip(parts, wide, strict=True)
                ],
            ]

        for dtype in [torch.float32, torch.bfloat16, torch.int64, torch.bool]:
            for device in (None, torch.device("cpu")):
                for background in (False, True):
                    name = f"{dtype} {device=} {background=}"
                    yield name, functools.partial(collectives, dtype, device, background)

    def barrier(self) -> Iterator[Case]:
        yield "synchronous", lambda: [(dist.barrier(), None)]
        yield "asynchronous", lambda: [(dist.barrier(async_op=True).wait(), True)]
        yield "monitored", lambda: [(dist.monitored_barrier(wait_all_ranks=True), None)]

    def every_two(self, dtype: torch.dtype) -> list[tuple[Any, Any]]:
        """All pairs of 8-bit floats, the first rank's and the second's, against PyTorch's sums and its rounding."""
        codes = torch.arange(256, dtype=torch.uint8)
        pairs = [codes.repeat(256).view(dtype), codes.repeat_interleave(256).view(dtype)]
        got = pairs[self.rank].clone() if self.rank < 2 else torch.zeros(256 * 256).to(dtype)
        dist.all_reduce(got)
        want = (pairs[0].float() + pairs[1].float()).to(dtype).float()
        assert torch.equal(got.float().isnan(), want.isnan()), "where there is no number"
        # A third rank's zeros make a positive zero of two negative ones.
        return [((got.float() + 0.0).nan_to_num(), (want + 0.0).nan_to_num())]

    def grid(self) -> Iterator[tuple[torch.dtype, Any, str]]:
        """Every dtype by every reduction, and by every layout once."""
        for dtype in REDUCED:
            for op in reductions(dtype):
                yield dtype, op, "plain"
            for layout in list(LAYOUTS)[1:]:
                yield dtype, Op.SUM, layout

    def in_place(
        self, dtype: torch.dtype, op: Any, layout: str, call: Callable[[Tensor], Any], takers: Any, more: str = ""
    ) -> Iterator[Case]:
        def case() -> list[tuple[Any, Any]]:
            shape, lay = LAYOUTS[layout]
            inputs = self.inputs(dtype, shape)
            got = lay(inputs[self.rank])
            call(got)
            return [(got, reduced(inputs, op, dtype) if self.rank in takers else inputs[self.rank])]

        yield f"{dtype} {kind(op)} {layout}{more}", case


def bits(tensor: Tensor) -> Tensor:
    """Bytes in place of types that cannot be put together."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 and tensor.dim() else tensor


#: The operations that there are cases of.
OPERATIONS = [name for name, method in vars(Cases).items() if name not in ("__init__", "inputs", "grid", "in_place", "every_two") and callable(method)]


def run_all(rank: int, size: int) -> dict[str, list[str]]:
    """Runs every case on this rank; the failures of each operation."""
    warnings.simplefilter("ignore")
    failures: dict[str, list[str]] = {name: [] for name in OPERATIONS}
    for operation in OPERATIONS:
        for name, case in getattr(Cases(rank, size), operation)():
            try:
                wrong = [f"got {got}, not {want}" for got, want in case() if not same(got, want)]
            except Exception as error:
                wrong = [f"{type(error).__name__}: {error}"]
            failures[operation] += [f"{name}: {text[:300]}" for text in wrong]
    return failures
