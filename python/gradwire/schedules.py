"""Learning rates as functions of the clock: told to the servers once, worked out there at every step."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What all schedules share: a linear warm-up before them, as `torch.optim.lr_scheduler.LinearLR`.

    `warm_up` steps lead from `warm_up_from` times the first rate to it.
    """

    warm_up: int = 0
    warm_up_from: float = 1 / 3

    def warmed_up(self, steps, start=1 / 3):
        """The same schedule after a warm-up of `steps` steps from `start` times its first rate."""
        return replace(self, warm_up=steps, warm_up_from=start)

    def _native(self):
        return (*self._course(), self.warm_up, float(self.warm_up_from))


@dataclass(frozen=True)
class Constant(Schedule):
    """One rate for ever; of use after a warm-up."""

    lr: float

    def _course(self):
        return ("constant", [self.lr], 0)


@dataclass(frozen=True)
class Step(Schedule):
    """`StepLR`: multiplied by `gamma` every `step_size` steps."""

    lr: float
    step_size: int
    gamma: float = 0.1

    def _course(self):
        return ("step", [self.lr, self.gamma], self.step_size)


@dataclass(frozen=True)
class Cosine(Schedule):
    """`CosineAnnealingLR`: half a cosine from `lr` to `eta_min` in `T_max` steps, where it stays."""

    lr: float
    T_max: int
    eta_min: float = 0.0

    def _course(self):
        return ("cosine", [self.lr, self.eta_min], self.T_max)


@dataclass(frozen=True)
class OneCycle(Schedule):
    """`OneCycleLR`: up to `max_lr` and down again by cosines. The momentum is not cycled."""

    max_lr: float
    total_steps: int
    pct_start: float = 0.3
    div_factor: float = 25.0
    final_div_factor: float = 1e4

    def _course(self):
        return ("one_cycle", [self.max_lr, self.pct_start, self.div_factor, self.final_div_factor], self.total_steps)


@dataclass(frozen=True)
class Listed(Schedule):
    """A rate a step, at most 1000 of them; the last one stays."""

    rates: tuple[float, ...]

    def _course(self):
        return ("list", [float(rate) for rate in self.rates], 0)
