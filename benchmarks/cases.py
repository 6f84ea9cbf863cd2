"""The benchmark cases as data: input, contenders and goals."""

import csv
import random
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Optional

VALIDATION_LENGTHS = Path(__file__).with_name("validation_lengths.csv")


@dataclass(frozen=True)
class Case:
    """One workload.

    Attributes:
        name: C1 to C9 on the CPU and G1 to G15 on a GPU have the project's goals; the others have none.
        command: `attention` (q, k, v of 12 heads of 64 channels, scores up to 5), `model` (encoder, forward), `train`
            (MLM step, forward and backward, of a padded batch), `pretrain` (the step of scripts/pretrain_mlm.py:
            sequences without padding, float32 weights under bfloat16 autocast, hidden dropout, AdamW), `startup`
            (from `python` to an answer), `serve` (as `model`, in other engines too), `sorted`
            (sentence-transformers) or `host` (the Python of one attention call).
        what: the workload, as the tables describe it.
        lengths: tokens of each sequence.
        against: contender to the smallest ratio that reaches the goal (its time divided by ours), or None without a
            goal; names are those of contenders.py.
        ours: the contender by whose time the others are divided.
        mode: `forward`, `backward` (alone) or `step` (forward and backward).
        dtype: of weights and activations, a name of torch.
        device: `cpu` or `cuda`.
        sizes: of the model, a key of `SIZES` in contenders.py.
        memory_goal: a contender, and the largest share of its peak memory that ours may take; or None.
        speed_goal: the fewest tokens per second that reach the goal, or None.
    """

    name: str
    command: str
    what: str
    lengths: tuple
    against: dict
    ours: str = "ours"
    mode: str = "forward"
    dtype: str = "float32"
    device: str = "cpu"
    sizes: str = "base"
    memory_goal: Optional[tuple] = None
    speed_goal: Optional[int] = None


def shuffled(lengths) -> tuple:
    """The lengths in a fixed random order: neighbours of equal length would be an advantage."""
    lengths = list(lengths)
    random.Random(0).shuffle(lengths)
    return tuple(lengths)


def normal_law(longest: int, count: int) -> tuple:
    """`count` quantiles of N(longest / 2, longest / 8), in tokens, from 1 to `longest`."""
    law = NormalDist(longest / 2, longest / 8)
    return shuffled(min(longest, max(1, round(law.inv_cdf((n + 0.5) / count)))) for n in range(count))


def validation_law(longest: int, count: int) -> tuple:
    """`count` quantiles of the lengths of the validation documents, in tokens, cut at `longest`."""
    with VALIDATION_LENGTHS.open(newline="") as file:
        lengths = sorted(min(longest, int(row["wordpieces"])) for row in csv.DictReader(file))
    return shuffled(lengths[int((n + 0.5) / count * len(lengths))] for n in range(count))


# 1,776 of 4,096 tokens are real.
RAGGED = (208, 512, 48, 272, 112, 384, 80, 160)
SHORT = shuffled(round(5 + n * 27 / 63) for n in range(64))
LONG = (2048,)
EIGHT = (128,) * 8
MODERN = {"ModernBERT": None}

CPU_CASES = (
    Case("C1-2", "model", "encoder, 8 texts of 48 to 512 tokens", RAGGED, {"published": 3.3, "BERT": 3.2, **MODERN}),
    Case("C3", "model", "encoder, one text of 2,048 tokens", LONG, {"published": 3.2, "BERT": 1.3, **MODERN}),
    *(
        Case(f"C4-{name}", "model", f"encoder, {what}, bfloat16", lengths, {"published": 1.0, **goal}, dtype="bfloat16")
        for name, what, lengths, goal in (
            ("ragged", "8 texts of 48 to 512 tokens", RAGGED, {"BERT": 2.3}),
            ("long", "one text of 2,048 tokens", LONG, {"BERT": 1.1}),
            ("full", "8 texts of 128 tokens", EIGHT, {"BERT": 0.85}),
            *(
                (f"{length}", f"one text of {length:,} tokens", (length,), {})
                for length in (16, 64, 256, 512, 1024, 4096)
            ),
        )
    ),
    Case("C5-4096", "attention", "attention, 4,096 tokens", (4096,), {"one SDPA call": 2.0, "eager": None}),
    Case("C5-8192", "attention", "attention, 8,192 tokens", (8192,), {"one SDPA call": 3.2}),
    Case("C6", "attention", "attention, 16,384 tokens", (16_384,), {"one SDPA call": None}),
    Case("C7-short", "model", "encoder, 64 texts of 5 to 32 tokens", SHORT, {"BERT": 2.5, "published": None}),
    Case("C7-full", "model", "encoder, 8 texts of 128 tokens", EIGHT, {"BERT": 1.4, "published": None}),
    Case("C8", "train", "MLM step, 8 texts of 48 to 512 tokens", RAGGED, {"published": 2.0, "BERT": None}, mode="step"),
    Case("C9", "startup", "start of Python to answer of fill-mask, shipped checkpoint", (9,), {"BERT": 1 / 1.1}),
    *(
        Case(f"{name}-512", "model", f"encoder, 16 texts, {what}", lengths, {"BERT": None, "published": None})
        for name, what, lengths in (
            ("law", "lengths N(256, 64)", normal_law(512, 16)),
            ("validation", "lengths of validation documents cut at 512", validation_law(512, 16)),
        )
    ),
    *(
        Case(
            f"host-{mode}-{length}",
            "host",
            f"Python time of one attention call, {mode}, {count} × {length:,} tokens",
            (length,) * count,
            {"empty autograd.Function": None},
            mode=mode,
            dtype="bfloat16",
        )
        for mode in ("forward", "step")
        for count, length in ((8, 128), (1, 4096))
    ),
    Case("compile", "model", "encoder, 8 texts of 128 tokens, eager against compiled", EIGHT, {"ours, compiled": None}),
)

# A library that sorts texts by length leaves little padding to save. The time is that of all texts, whole or cut.
SORTED_CASES = tuple(
    Case(
        f"sorted-{name}",
        "sorted",
        f"sentence-transformers, 512 texts of the lengths of validation documents, {cut}",
        validation_law(8192, 512),
        {"BERT, cut at 512": None},
        ours=f"ours, {cut}",
        sizes="shipped",
    )
    for name, cut in (("whole", "whole"), ("512", "cut at 512"))
)

# What people serve, in the order of the table in docs/serving.md.
SERVING_CASES = tuple(
    Case(
        f"S-{name}{'-bf16' if dtype == 'bfloat16' else ''}",
        "serve",
        what,
        lengths,
        {
            **({"ours, ONNX Runtime": None} if dtype == "float32" else {}),
            "ours, OpenVINO": None,
            "BERT": None,
            **({"BERT, ONNX Runtime": None} if dtype == "float32" else {}),
            "BERT, OpenVINO": None,
        },
        dtype=dtype,
    )
    for dtype in ("float32", "bfloat16")
    for name, what, lengths in (
        ("16", "one text of 16 tokens", (16,)),
        ("128", "one text of 128 tokens", (128,)),
        ("full", "8 texts of 128 tokens", EIGHT),
        ("512", "one text of 512 tokens", (512,)),
        ("ragged", "8 texts of 48 to 512 tokens", RAGGED),
        ("long", "one text of 2,048 tokens", LONG),
    )
)

# For the plot of cost against length. The published MosaicBERT holds five [12, S, S] buffers: 3.2 GiB each at 8,192.
LENGTH_CASES = tuple(
    Case(
        f"length-{length}",
        "model",
        f"encoder, one text of {length:,} tokens",
        (length,),
        {**({"published": None} if length <= 4096 else {}), "BERT": None, "ModernBERT": None},
    )
    for length in (128, 256, 512, 1024, 2048, 4096, 8192, 16_384)
)

FLASH_4 = {"FlashAttention 4, no bias": None}
GPU = {"dtype": "bfloat16", "device": "cuda"}
PRETRAINING = {"mode": "step", "dtype": "float32", "device": "cuda"}
GPU_CASES = (
    *(
        Case(
            f"G1-2-{length}",
            "attention",
            f"attention without skipping, {8192 // length} × {length:,} tokens",
            (length,) * (8192 // length),
            {"SDPA flash, no bias": 1.1, "SDPA cuDNN, no bias": 0.85, **FLASH_4},
            ours="ours, skipping off",
            **GPU,
        )
        for length in (1024, 2048, 8192)
    ),
    *(
        Case(name, "attention", f"attention{what}", lengths, against, mode=mode, **GPU)
        for name, what, lengths, mode, against in (
            ("G3", ", 8 × 2,048 tokens", (2048,) * 8, "forward", {"SDPA, dense bias": 2.5}),
            ("G4-forward", ", 32 texts, N(512, 128)", normal_law(1024, 32), "forward", {"Flex": 2.0}),
            ("G4-backward", " backward, 32 texts, N(512, 128)", normal_law(1024, 32), "backward", {"Flex": 1.8}),
            ("G5", " backward, 4 × 2,048 tokens", (2048,) * 4, "backward", {"SDPA flash, no bias": 1.25, **FLASH_4}),
            ("G6-2048", " step, 4 × 2,048 tokens", (2048,) * 4, "step", {"ours, skipping off": 1.6}),
            ("G6-8192", " step, 8,192 tokens", (8192,), "step", {"ours, skipping off": 3.0}),
        )
    ),
    Case("G7", "model", "encoder, 64 texts, lengths N(256, 64)", normal_law(512, 64), {"ours, full rows": 0.97}, **GPU),
    Case("G8", "model", "encoder, 64 × 512 tokens", (512,) * 64, {"its matrix products": 1 / 1.5}, **GPU),
    *(
        Case(name, command, f"{what}, 8 × (8 texts of 48 to 512 tokens)", RAGGED * 8, against, mode=mode, **GPU)
        for name, command, what, mode, against in (
            ("G9-10", "model", "encoder", "forward", {"BERT": 1.6, "published": 5.0, **MODERN}),
            ("G10-step", "train", "MLM step", "step", {"published": 4.5, "BERT": 2.4}),
        )
    ),
    Case(
        "G11",
        "train",
        "MLM step, 8 × 2,048 tokens",
        (2048,) * 8,
        {"published": None},
        mode="step",
        memory_goal=("published", 0.18),
        **GPU,
    ),
    *(
        Case(
            f"G11-{length}",
            "train",
            f"MLM step, {16_384 // length} × {length:,} tokens",
            (length,) * (16_384 // length),
            {},
            mode="step",
            **GPU,
        )
        for length in (512, 2048, 8192)
    ),
    Case("G12", "model", "encoder, 8 × 128 tokens", EIGHT, {"BERT": 1.8}, **GPU),
    Case(
        "G14-base",
        "pretrain",
        "pretraining step, base size, row of 65,536 tokens at length 128",
        (128,) * 512,
        {"one large product": 0.5},
        **PRETRAINING,
    ),
    *(
        Case(
            f"G14-shipped-{tokens}",
            "pretrain",
            f"pretraining step, size of the shipped model, row of {tokens:,} tokens at length 128",
            (128,) * (tokens // 128),
            {"one large product": None},
            sizes="shipped",
            speed_goal=3_000_000,
            **PRETRAINING,
        )
        for tokens in (65_536, 131_072)
    ),
    Case(
        "G14-layers",
        "pretrain",
        "pretraining step, base size, against compiled or unfused layers",
        (128,) * 512,
        {"ours, unfused layers": None, "ours, layers compiled": None},
        **PRETRAINING,
    ),
    *(
        Case(
            f"G15-{count}x{length}",
            "model",
            f"encoder, SDPA in place of Triton, {count} × {length:,} tokens",
            (length,) * count,
            {"BERT": 0.8},
            ours="ours, SDPA",
            **GPU,
        )
        for count, length in ((8, 128), (32, 512), (1, 8192))
    ),
    # Last, because a capture that fails may leave the device unusable.
    *(
        Case(name, "model", what, EIGHT, {"ours, no mask": goal}, ours=ours, **GPU)
        for name, what, goal, ours in (
            ("G13", "encoder, 8 × 128 tokens, captured in a CUDA graph", 4.0, "ours, CUDA graph"),
            ("G13-compiled", 'the same by torch.compile(mode="reduce-overhead")', None, "ours, reduce-overhead"),
        )
    ),
)

CASES = CPU_CASES + SORTED_CASES + SERVING_CASES + LENGTH_CASES + GPU_CASES
