"""The caller's `train` and `evaluate`: seeded before each call, and held to what they promise."""

import math
import numbers
import random

import numpy as np
import torch

from paamops import tracing
from paamops.methods import sharing
from paamops.methods.networks import tensors_of


def seed_all(seed):
    """Seed the generators that a training may draw from, so that a resumed run draws the same."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - other people's augmentation draws from it
    torch.manual_seed(seed % 2**63)


def trained(train, model, seed):
    """The tensors of `model` after train(model), which may change their values only; the same in all processes."""
    shapes = _shapes(model)
    seed_all(seed)
    train(model.train())
    now = _shapes(model)
    if now != shapes:
        changed = sorted(name for name in shapes.keys() | now.keys() if shapes.get(name) != now.get(name))
        raise ValueError(f"train changed the network: {', '.join(changed[:3])}; it must keep names, shapes and dtypes")
    sharing.same_tensors(model)
    return tensors_of(model)


def evaluated(evaluate, model, seed, where):
    """The number that evaluate(model) returns, the first process's; `where` names the round in an error."""
    seed_all(seed)  # an evaluation may draw too
    with torch.no_grad():
        value = evaluate(model.eval())
    if isinstance(value, (torch.Tensor, np.ndarray)) and math.prod(value.shape) == 1:
        value = value.item()
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    value = sharing.agree(float(value) if number else type(value).__name__)
    if isinstance(value, str):
        raise TypeError(f"evaluate returned a {value}; it must return a number")
    if not math.isfinite(value):
        raise ValueError(f"evaluate returned {value} in {where}; it must return a finite number")
    return value


def _shapes(model):
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tracing.named_tensors(model).items()}
