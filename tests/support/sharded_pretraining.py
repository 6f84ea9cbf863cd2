"""Runs scripts/pretrain_mlm.py sharded over two processes, then again from its second checkpoint of two.

    python sharded_pretraining.py FIRST [options of pretrain_mlm.py]

Trainer shards weights (FSDP) on accelerators only, so accelerate takes a gloo group of CPUs for one of accelerators.
All else is what a user runs: the sharding, the gathering and the files are those of accelerate, torch and transformers.
Processes are forks, which have imported all of these already. FIRST gets a copy of the first results. Prints how many
weights each process holds a part of. test_pretrain.py runs it.
"""

import shutil
import sys
from pathlib import Path

import pretrain_mlm
from accelerate.state import DistributedType, PartialState
from lib import pretraining
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.tensor import DTensor

start = PartialState.__init__


def start_as_accelerators(self, *args, **kwargs):
    start(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_XPU


class CountingTrainer(pretraining.PretrainingTrainer):
    def training_step(self, model, *args, **kwargs):
        if self.state.global_step == 0:
            parts = sum(isinstance(weight, DTensor) for weight in model.parameters())
            print(f"parts {parts}\n", end="", flush=True)  # in one write, since two processes share the stream
        return super().training_step(model, *args, **kwargs)


def train(words):
    """Run the script in two processes, as torchrun starts them."""
    sys.argv = ["pretrain_mlm.py", *words]
    config = LaunchConfig(1, 1, nproc_per_node=2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork")
    elastic_launch(config, pretrain_mlm.main)()


if __name__ == "__main__":
    PartialState.__init__ = start_as_accelerators
    pretraining.PretrainingTrainer = CountingTrainer
    first, *flags = sys.argv[1:]
    output = Path(flags[flags.index("--output_dir") + 1])
    train(flags)
    shutil.copytree(output, first)
    shutil.rmtree(output / "checkpoint-4")
    train([*flags, "--resume_from_checkpoint", "last"])
