"""Training that was cut goes on: all it needs, in one file of tensors and JSON. Nothing in it is ever unpickled."""

import hashlib
import json
import os
import warnings
from pathlib import Path

import safetensors
import safetensors.torch
import torch

VERSION = 1  # of what is written under the header's key
KEY = "paamops_checkpoint"


def fingerprint(model, call):
    """A hash of the weights that training starts from and of `call`, a dict of plain values: the rest of its arguments.

    Two calls of one fingerprint would train the same weights, so one may go on from the other's file.
    """
    state = hashlib.sha256(json.dumps(call, sort_keys=True).encode())
    for name, tensor in model_tensors(model).items():
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return state.hexdigest()


def write(path, model, optimizer, facts):
    """Write parameters, buffers, momentum and `facts` (a dict of plain values) to `path`, whole or not at all."""
    path = Path(path)
    tensors = {
        # A copy: tensors that share memory without being one, and strides that are not dense, would be refused.
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in (model_tensors(model) | momentum(model, optimizer)).items()
    }
    header = {KEY: json.dumps({"version": VERSION, **facts})}
    partial = path.with_name(f".{path.name}.partial")  # one name, so that a killed process leaves at most one behind
    with open(partial, "wb") as file:
        file.write(safetensors.torch.save(tensors, metadata=header))
        file.flush()
        os.fsync(file.fileno())  # a machine that loses power must not find the new name with nothing behind it
    partial.replace(path)


def facts(path):
    """The facts that `write` stored in `path`. ValueError: no such file, truncated, or no checkpoint."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            found = json.loads(file.metadata()[KEY])
        if found["version"] != VERSION:
            raise ValueError(f"it is written in format {found['version']}, not {VERSION}")
        return found
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(" ".join(f"{path}: is no checkpoint that can be read ({error})".split())) from error


def find(path, wanted):
    """The facts in `path` if a call of the fingerprint `wanted` wrote them, else None; a warning if unreadable."""
    if not Path(path).exists():
        return None
    try:
        found = facts(path)
    except ValueError as error:
        warnings.warn(f"{error}; training starts from its beginning", stacklevel=3)
        return None
    return found if found.get("fingerprint") == wanted else None


def restore(path, model, optimizer):
    """Copy the tensors of `path` into `model` and the momentum into `optimizer`."""
    stored = safetensors.torch.load_file(path)
    velocity = {f"momentum {name}": parameter for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, tensor in model_tensors(model).items():
            tensor.copy_(stored[name])
        for name in stored.keys() & velocity.keys():
            parameter = velocity[name]
            optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(stored[name])


def model_tensors(model):
    """Every parameter and buffer once, by a name that tells which of the two it is."""
    named = {f"parameter {name}": tensor for name, tensor in model.named_parameters()}
    return named | {f"buffer {name}": tensor for name, tensor in model.named_buffers()}


def momentum(model, optimizer):
    """The momentum of every parameter that has one: none before its first step, none without a gradient."""
    named = {f"momentum {name}": optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}
    return {name: state["momentum_buffer"] for name, state in named.items() if state.get("momentum_buffer") is not None}
