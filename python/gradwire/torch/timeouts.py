"""How long a group's operations may take: what its maker says, else GRADWIRE_TIMEOUT, else PyTorch's own 30 minutes.

PyTorch always hands a backend a timeout and does not tell whether anybody asked for it, so its default counts as nobody's wish.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from torch.distributed.constants import default_pg_timeout

from ..config import Config


def of_group(options: Any, came: timedelta = default_pg_timeout) -> float:
    """The seconds of a group's operations.

    Args:
        options: the group's `Backend.Options`; a timeout that they were made with is the first to count.
        came: what PyTorch hands over beside them, which counts next.
    """
    own: timedelta = options._timeout
    asked_for = getattr(options, "says_timeout", own != default_pg_timeout)
    if not asked_for and came != default_pg_timeout:
        own, asked_for = came, True
    if not asked_for and "GRADWIRE_TIMEOUT" in os.environ:
        return Config.from_environment().timeout_s
    return own.total_seconds()
