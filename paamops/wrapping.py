"""What a model comes wrapped in: data parallelism and torch.compile, which are looked through."""

import contextlib
import sys

import torch
from torch import nn

PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrapped(model):
    """The network within DistributedDataParallel, DataParallel and torch.compile's wrapper, however they are nested.

    TypeError: it is no module, or TorchScript, which cannot be followed.
    """
    while isinstance(model, nn.Module):
        if isinstance(model, PARALLEL):
            model = model.module
        elif type(model).__name__ == "OptimizedModule":  # importing the class of torch.compile would take seconds
            model = model._orig_mod
        else:
            break
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise TypeError("model is, or holds, a TorchScript module; it must be ordinary PyTorch code")
    return model


def eager():
    """A context in which what torch.compile has compiled runs as it was written, op after op."""
    # What was never imported has compiled nothing, and importing it takes seconds.
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
