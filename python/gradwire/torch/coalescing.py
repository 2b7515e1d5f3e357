"""What is called between `start_coalescing` and `end_coalescing`, and becomes one work."""

from __future__ import annotations

from .. import _native
from .work import Work


class Coalescing:
    """The works of one window. Each begins when it is called: the engine carries them out side by side."""

    def __init__(self) -> None:
        self._works: list[Work] = []

    def add(self, work: Work) -> Work:
        self._works.append(work)
        return work

    def end(self) -> Work:
        """One work that ends when all have; it raises what the first of those that failed did."""
        works = self._works
        operations = [work.operation for work in works if work.operation is not None]
        results = [tensor for work in works for tensor in work.result()]

        def finish() -> None:
            for work in works:
                work.wait()

        joined = _native.Operation.join(operations) if operations else None
        device = next((work.device for work in works if work.device is not None), None)
        return Work(joined, results, finish if any(work.copies_back for work in works) else None, device)
