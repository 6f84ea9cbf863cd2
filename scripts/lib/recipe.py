"""The learning rate schedule of pretraining, and the FLOPs of a step."""

import time
from collections.abc import Callable
from typing import Any, Optional

import torch


def linear_schedule(step: float, warmup: int, total: int, final: float) -> float:
    """Compute the learning rate of a step relative to its peak: linear warmup from 0, then linear decay to `final`.

    Source: https://arxiv.org/abs/2312.17482, appendix A.
    """
    if step < warmup:
        return step / warmup
    return 1 - (1 - final) * min(1.0, (step - warmup) / max(1, total - warmup))


class LinearSchedule(torch.optim.lr_scheduler.LRScheduler):
    """`linear_schedule` by steps or by the clock, whichever is further on.

    The time of the first step is no progress: it compiles kernels, and would otherwise use up the warmup. `state_dict`
    includes the elapsed time, so that a resumed run continues with the rest.

    Args:
        optimizer: whose learning rates are set.
        warmup, total: steps of the warmup, and of the whole run.
        final: learning rate at the end relative to the peak.
        max_seconds: the duration of the run from `start_clock` on; None: the clock does not count.
        agree: a function that turns the numbers of all processes into one.
        clock: returns the time in seconds, from any origin.
    """

    STATE = ("base_lrs", "last_epoch", "_step_count", "_last_lr", "elapsed", "first_step")

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        warmup: int,
        total: int,
        final: float,
        max_seconds: Optional[float] = None,
        agree: Callable[[float], float] = lambda seconds: seconds,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.warmup, self.total, self.final, self.max_seconds = warmup, total, final, max_seconds
        self.agree, self.clock = agree, clock
        self.elapsed, self.first_step, self._began = 0.0, 0.0, None
        super().__init__(optimizer)

    def start_clock(self) -> None:
        """Start the clock, or continue from the time of a loaded state."""
        self._began = self.clock() - self.elapsed

    @property
    def position(self) -> float:
        """The progress of the run, in steps out of `total`."""
        if self.max_seconds is None:
            return self.last_epoch
        left = max(self.max_seconds - self.first_step, 1e-9)
        return max(self.last_epoch, self.total * max(0.0, self.elapsed - self.first_step) / left)

    @property
    def is_over(self) -> bool:
        """Whether steps or time are used up."""
        return self.position >= self.total

    def step(self) -> None:
        """Set the learning rates of the next step."""
        if self.max_seconds is not None and self._began is not None:
            self.elapsed = self.agree(self.clock() - self._began)
            if self.last_epoch == 0:
                self.first_step = self.elapsed
        super().step()

    def get_lr(self) -> list[float]:
        """Return the learning rate of each parameter group."""
        share = linear_schedule(self.position, self.warmup, self.total, self.final)
        return [peak * share for peak in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint; steps and shares come from the command line."""
        return {name: getattr(self, name) for name in self.STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        fits = isinstance(state, dict) and len(state.get("base_lrs", ())) == len(self.base_lrs)
        if not fits or not all(isinstance(state.get(name), int) for name in ("last_epoch", "_step_count")):
            raise ValueError("the state belongs to another kind of schedule")
        self.__dict__.update({name: state[name] for name in self.STATE if name in state})


def count_flops(config, tokens, pairs, predicted):
    """Count the FLOPs of the matrix products in a training step: forward, and twice as many in the backward pass.

    Args:
        config: of the model.
        tokens: of the batch.
        pairs: sum of the squared lengths of its sequences.
        predicted: tokens with a label.

    Returns:
        The number, of the type of the counts: integers, or tensors that stay on their device. A multiply and an add
        count as two.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    layer = 2 * tokens * (4 * hidden**2 + 3 * hidden * inner) + 4 * pairs * hidden
    head = 2 * predicted * (hidden**2 + hidden * config.vocab_size)
    return 3 * (config.num_hidden_layers * layer + head)


def measure_matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOPs per second of a large matrix product on `device` in `dtype`, the best of five."""
    size = 2048 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(6):  # the first run is a warm-up
        began = time.perf_counter()
        (a @ a)[0, 0].item()  # reading a number synchronizes
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds[1:])
