"""Three training steps in two processes whose weights are sharded (FSDP), against the same steps in one; by torchrun.

Prints the largest difference of the weights and of the losses. test_trainer.py runs it.
"""

import conftest  # noqa: F401  (the package's name)
import torch
import torch.distributed as dist
from models import ragged_batch, tiny_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def batch_of(rank):
    ids, mask = ragged_batch([9, 4])
    ids = (ids + 7 * rank) % 90 + 1
    return ids, mask, torch.where(mask.bool(), ids, -100)


def main():
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    whole, sharded = tiny_model(), tiny_model()
    sharded.load_state_dict(whole.state_dict())
    for module in sharded.modules():
        if type(module).__name__ == "BertLayer":
            fully_shard(module)
    fully_shard(sharded)
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (whole, sharded)]
    difference = 0.0
    for _ in range(3):
        ids, mask, labels = batch_of(rank)
        loss = sharded(ids, mask, labels=labels).loss
        loss.backward()
        for other in range(size):
            ids, mask, labels = batch_of(other)
            expected = whole(ids, mask, labels=labels).loss
            (expected / size).backward()
            if other == rank:
                difference = max(difference, (loss - expected).abs().item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    weights = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        expected = whole.state_dict()
        assert weights.keys() == expected.keys()
        print("weights", max((weights[name] - expected[name]).abs().max().item() for name in expected))
        print("loss", difference)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
