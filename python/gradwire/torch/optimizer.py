"""Optimizers whose state and arithmetic live on parameter servers."""

from dataclasses import replace

import torch

from ..errors import ServerLostError
from ..ps import SGD, Adagrad, Adam


def _rule(optimizer, group):
    """The server's rule for a group of a PyTorch optimizer."""
    for option in ("maximize", "amsgrad", "differentiable"):
        if group.get(option):
            raise ValueError(f"the servers do not know {option}=True of {type(optimizer).__name__}: {_ELSE}")
    lr = float(group["lr"])
    if isinstance(optimizer, torch.optim.SGD):
        return SGD(lr, group["momentum"], group["dampening"], group["weight_decay"], group["nesterov"])
    if isinstance(optimizer, torch.optim.Adam):
        decoupled = isinstance(optimizer, torch.optim.AdamW) or bool(group.get("decoupled_weight_decay"))
        return Adam(lr, tuple(map(float, group["betas"])), group["eps"], group["weight_decay"], decoupled)
    if isinstance(optimizer, torch.optim.Adagrad):
        numbers = (group["lr_decay"], group["weight_decay"], group["initial_accumulator_value"], group["eps"])
        return Adagrad(lr, *numbers)
    raise ValueError(f"the servers know SGD, Adam, AdamW and Adagrad, not {type(optimizer).__name__}: {_ELSE}")


_ELSE = 'with where="worker" the servers only average, and any optimizer will do'


class DistributedOptimizer(torch.optim.Optimizer):
    """Data parallelism through parameter servers: gradients are averaged over the workers and applied there.

    Each parameter is a table. The first worker's values are taken for all. A gradient is pushed as soon as backward has
    finished it, while the rest of backward goes on; `step()` waits for the new values and takes them. Training is
    synchronous, and the same to the bit whoever comes first.

    Args:
        optimizer: a `torch.optim.SGD`, `Adam`, `AdamW` or `Adagrad` over the model's parameters. Its learning rates may change,
            by a scheduler around *this* optimizer or by hand: a change is told to the servers with the next gradient. Its
            other numbers are fixed.
        client: from `gradwire.connect(addresses, rank=...)`.
        workers: how many workers there are.
        name: tells models on the same servers apart.
        backward_passes_per_step: backward passes whose gradients add up before they are pushed.
        schedule: learning rates that the servers work out by themselves, one of `gradwire.schedules`; a rate that a
            scheduler or anybody sets afterwards takes its place.
        max_grad_norm: the averaged gradients are clipped to this norm over all parameters before they are applied, as by
            `torch.nn.utils.clip_grad_norm_`; `grad_norm` is the last one before clipping. Costs a round trip a step.
        compression: how gradients and values travel, as for `Client.dense`: "int8", "bf16", `TopK(0.1)`, `Compression(...)`.
            `pull_whole()` takes the servers' full values, for the end of training.
        recovery: "replicate": the model outlives the death of a server, as for `Client.dense`. "workers": when a server dies,
            `step()` waits until it is there again, all workers give it the model, and training goes on with the same step;
            what it had of the optimizer's state begins anew (with `where="worker"` it has none).
        where: "server", or "worker": the servers only average the gradients, and each worker's own `optimizer`, of any
            kind, takes the step.

    Raises:
        ValueError: an optimizer or option that the servers do not know, or a parameter that is not a contiguous CPU float.
        ServerRefusedError: another worker has described the model otherwise.
    """

    def __init__(
        self,
        optimizer,
        client,
        *,
        workers,
        name="model",
        backward_passes_per_step=1,
        schedule=None,
        max_grad_norm=None,
        compression=None,
        recovery="none",
        where="server",
    ):
        if where not in ("server", "worker"):
            raise ValueError(f'where={where!r}: the step is taken by the "server" or by the "worker"')
        if schedule is not None and where == "worker":
            raise ValueError("the servers follow a schedule only where they take the step: use a torch scheduler here")
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._inner, self._on_server = optimizer, where == "server"
        self._client, self._passes = client, backward_passes_per_step
        self._max_grad_norm, self.grad_norm = max_grad_norm, None
        self._recovers, self._lost = recovery == "workers", False
        how = {"workers": workers, "average": True, "clipped": max_grad_norm is not None}
        how |= {"compression": compression, "recovery": recovery}
        self._entries = {}
        self._works = {}
        index = 0
        for group in self.param_groups:
            rule = _rule(optimizer, group) if self._on_server else "replace"
            for parameter in group["params"]:
                if not parameter.requires_grad:
                    continue
                dtype = str(parameter.dtype).removeprefix("torch.")
                table = client.dense(f"{name}/{index}", parameter.shape, dtype, rule=rule, **how)
                value = parameter.detach()
                table.init(value)
                table.pull(value, whole=True)
                if schedule is not None:
                    table.set_schedule(schedule)
                self._entries[parameter] = _Entry(index, group, table, torch.empty_like(value), rule)
                parameter.register_post_accumulate_grad_hook(self._on_gradient)
                index += 1

    def _on_gradient(self, parameter):
        entry = self._entries[parameter]
        entry.passes += 1
        if entry.passes < self._passes:
            return
        entry.passes = 0
        if parameter in self._works:
            message = f"parameter {entry.index} has a second gradient before step(): raise backward_passes_per_step"
            raise RuntimeError(message)
        # The tensor is kept until the push is done, also when zero_grad() drops it from the parameter.
        gradient = parameter.grad.contiguous()
        self._works[parameter] = (self._start(entry, gradient), gradient)

    def _start(self, entry, gradient):
        """Pushes a gradient; None where that must wait until a server is recovered."""
        try:
            if self._on_server and not self._lost:
                self._tell_rate(entry)
        except ServerLostError:
            if not self._recovers:
                raise
            self._lost = True
        return None if self._lost else entry.table.push_pull_async(gradient, entry.fresh)

    def _tell_rate(self, entry):
        rule = _rule(self._inner, entry.group)
        if rule == entry.rule:
            return
        if replace(rule, lr=entry.rule.lr) != entry.rule:
            message = f"the servers were told {entry.rule}, and only lr may change, not {rule}"
            raise ValueError(f"{message} (OneCycleLR and CyclicLR: pass cycle_momentum=False)")
        # A rate that does not arrive since a server is lost is told when it is recovered.
        entry.rule = rule
        entry.table.set_learning_rate(rule.lr)

    @torch.no_grad()
    def pull_whole(self):
        """Takes the servers' values in full, where they travel compressed: before a model is saved or judged."""
        if not self._on_server:
            return
        for parameter, entry in self._entries.items():
            parameter.copy_(entry.table.pull(entry.fresh, whole=True))

    @torch.no_grad()
    def step(self, closure=None):
        """Waits for the new values and takes them; with `where="worker"`, for the mean gradients, and takes the step.

        Raises:
            RuntimeError: a parameter got no gradient; every worker must contribute to every parameter.
            ServerLostError, ServerTimeoutError: the servers, or another worker, have gone.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        missing = [entry.index for parameter, entry in self._entries.items() if parameter not in self._works]
        if missing:
            message = f"parameters {missing} got no gradient since the last step: every worker must contribute to each"
            raise RuntimeError(message)
        if self._max_grad_norm is not None:
            tables = [entry.table for entry in self._entries.values()]
            self.grad_norm = self._client.clip_grad_norm(tables, self._max_grad_norm)
        while not self._take():
            self._recover()
        if not self._on_server:
            self._inner.step()
        return loss

    def _take(self):
        """Waits for the new values, and takes those that come. False where some are lost with a server, to be recovered."""
        for parameter, (work, _) in list(self._works.items()):
            if work is None:
                continue
            try:
                work.wait()
            except ServerLostError:
                if not self._recovers:
                    raise
                continue
            self._took(parameter)
        return not self._works

    def _took(self, parameter):
        target = parameter if self._on_server else parameter.grad
        target.copy_(self._entries[parameter].fresh)
        del self._works[parameter]

    def _recover(self):
        """Gives lost servers the model again with all workers, and pushes what they have not counted of this step."""
        self._lost = False
        entries = self._entries.items()
        steps = {parameter: entry.table.pulled + 1 for parameter, entry in entries if parameter in self._works}
        # Where the servers only average, a value is what they sent last.
        values = [(entry.table, parameter.detach() if self._on_server else entry.fresh) for parameter, entry in entries]
        self._client.recover(values)
        for parameter, step in steps.items():
            entry, (_, gradient) = self._entries[parameter], self._works[parameter]
            if entry.table.clock < step:
                self._works[parameter] = (self._start(entry, gradient), gradient)
            elif self._on_server:
                # It was counted, and its value came with the recovery.
                del self._works[parameter]
            else:
                self._took(parameter)


class _Entry:
    """A parameter, its table, where new values land, and the rule that its table was told."""

    def __init__(self, index, group, table, fresh, rule):
        self.index, self.group, self.table, self.fresh, self.rule = index, group, table, fresh, rule
        self.passes = 0
