"""scripts/pretrain_mlm.py under torchrun, where accelerate takes a gloo group of CPUs for one of accelerators.

Trainer shards weights (FSDP) on accelerators only. All else is what a user runs: the sharding, the gathering and the
files are those of accelerate, torch and transformers. Prints how many weights each process holds a part of.
test_pretrain.py runs it.
"""

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


if __name__ == "__main__":
    PartialState.__init__ = start_as_accelerators
    pretraining.PretrainingTrainer = CountingTrainer
    pretrain_mlm.main()
