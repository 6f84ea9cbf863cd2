"""The learning rate schedule of pretraining, and the FLOPs of a step; needs nothing but torch."""

import time

import torch


def linear_schedule(step: int, warmup: int, total: int, final: float) -> float:
    """The learning rate of a step over its peak: up from 0 in a line, then down in a line.

    Args:
        step: number of the step, from 0.
        warmup: steps that warm up.
        total: steps of the run.
        final: where the line ends.

    Source: https://arxiv.org/abs/2312.17482, appendix A.
    """
    if step < warmup:
        return step / warmup
    return 1 - (1 - final) * min(1.0, (step - warmup) / max(1, total - warmup))


def count_flops(config, tokens, pairs, predicted):
    """FLOPs of the matrix products of one training step, forward and backward (twice forward).

    Args:
        config: of the model.
        tokens: tokens of the batch.
        pairs: sum of the squared lengths of its sequences.
        predicted: tokens with a label.

    Returns:
        The number, of the type of the counts: integers, or tensors that stay on their device. A multiply and an add are
        two.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    layer = 2 * tokens * (4 * hidden**2 + 3 * hidden * inner) + 4 * pairs * hidden
    head = 2 * predicted * (hidden**2 + hidden * config.vocab_size)
    return 3 * (config.num_hidden_layers * layer + head)


def measure_matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of a large matrix product, the best of five, on `device` in `dtype`."""
    size = 2048 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(6):  # the first one warms up
        began = time.perf_counter()
        (a @ a)[0, 0].item()  # reading a number waits for the device
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds[1:])
