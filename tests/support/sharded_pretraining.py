"""Runs scripts/pretrain_mlm.py sharded over two processes, then again from its second checkpoint of two.

    python sharded_pretraining.py FIRST [options of pretrain_mlm.py]

Trainer shards weights (FSDP) on accelerators only, so accelerate takes a gloo group of CPUs for one of accelerators.
All else is what a user runs: the sharding, the gathering and the files are those of accelerate, torch and transformers.
Processes are forks, which have imported all of these already. FIRST gets a copy of the first results. Prints how many
weights each process holds a part of. test_pretrain.py runs it.
"""

import os
import shutil
import socket
import sys
import traceback
from pathlib import Path

import pretrain_mlm
from accelerate.state import DistributedType, PartialState
from lib import pretraining
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
    """Run the script in two processes, with the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sys.argv = ["pretrain_mlm.py", *words]
    for rank in range(2):
        if not os.fork():
            sizes = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in sizes.items()}, MASTER_ADDR="127.0.0.1")
            try:
                pretrain_mlm.main()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
    if any(os.wait()[1] for _ in range(2)):
        sys.exit("a process failed")


if __name__ == "__main__":
    PartialState.__init__ = start_as_accelerators
    pretraining.PretrainingTrainer = CountingTrainer
    first, *flags = sys.argv[1:]
    output = Path(flags[flags.index("--output_dir") + 1])
    train(flags)
    shutil.copytree(output, first)
    shutil.rmtree(output / "checkpoint-4")
    train([*flags, "--resume_from_checkpoint", "last"])
