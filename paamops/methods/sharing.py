"""Several processes, one decision: what the first one has, all have."""

import torch
from torch import distributed

from paamops.tracing import named_tensors


def several():
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def leads():
    """Whether this process is the first, or the only one."""
    return not several() or distributed.get_rank() == 0


def agree(value):
    """The first process's `value`, in every process."""
    if not several():
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


@torch.no_grad()
def same_tensors(model):
    """Give every process the first one's parameters and buffers: batch norms have seen other images in each."""
    if several():
        for tensor in named_tensors(model).values():
            dense = tensor.contiguous()
            distributed.broadcast(dense, 0)
            tensor.copy_(dense)
