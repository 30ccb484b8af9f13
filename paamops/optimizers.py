"""Optimizers that go on with a packed network: their parameters replaced by its own, their states cut along."""

import torch
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_unflatten

from paamops.ops.pack_channels import pack_channels


def check(optimizer, tensors, indices):
    """The optimizers in `optimizer` (None, one, or a list or tuple of them), each of which can follow the packing.

    tensors: name -> the model's parameters and buffers before packing; indices: name -> kept indices of every axis.
    TypeError: something else is in it. ValueError: it trains none of the model's parameters, keeps them elsewhere than
    in its groups and states, or has a state that cannot be cut. Nothing is changed.
    """
    optimizers = () if optimizer is None else optimizer if isinstance(optimizer, (list, tuple)) else (optimizer,)
    names = {id(tensor): name for name, tensor in tensors.items()}
    for each in optimizers:
        if not isinstance(each, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer is, or holds, a {type(each).__name__}; it must be a torch.optim.Optimizer or a list of them"
            )
        kind = type(each).__name__
        if not any(id(parameter) in names for group in each.param_groups for parameter in group["params"]):
            raise ValueError(f"optimizer ({kind}) holds no parameter of model; it must be one that trains model")
        if isinstance(each, torch.optim.LBFGS) and each.state:
            raise ValueError("optimizer is an LBFGS with a state of all parameters in one, which cannot be cut")
        _check_attributes(each, kind, names)
        for parameter, state in each.state.items():
            name = names.get(id(parameter))
            if name is None or all(axis is None for axis in indices[name]):
                continue
            for path, value in tree_flatten_with_path(state)[0]:
                if _axes(value, parameter, indices[name]) is None:
                    found = (
                        f"{value.layout} of shape {tuple(value.shape)}"
                        if isinstance(value, torch.Tensor)
                        else f"a {type(value).__name__}"
                    )
                    raise ValueError(
                        f"optimizer ({kind}) has for {name!r}, of shape {tuple(parameter.shape)}, the state"
                        f" {keystr(path)}, {found}; it can be cut only if each of its sizes is the parameter's or 1"
                    )
    return optimizers


def _check_attributes(optimizer, kind, names):
    """Refuse what would go on with the old parameters: an optimizer around another one, lists of its own."""
    groups = [group["params"] for group in optimizer.param_groups]
    for attribute, value in vars(optimizer).items():
        if attribute in ("param_groups", "state") or any(value is group for group in groups):
            continue
        for leaf in tree_leaves(value):
            if isinstance(leaf, torch.optim.Optimizer):
                raise ValueError(
                    f"optimizer is a {kind} around another one; pass that one, its attribute {attribute!r}"
                )
            if isinstance(leaf, torch.Tensor) and id(leaf) in names:
                raise ValueError(
                    f"optimizer ({kind}) keeps {names[id(leaf)]!r} in its attribute {attribute!r} too; pack can only"
                    " replace parameters in its groups and states"
                )


def _axes(value, parameter, indices):
    """For every axis of a state the kept indices, or None for the whole axis; () for what is kept as it is.

    None where it cannot be cut: a tensor whose sizes are not the parameter's or 1, or an object that nobody knows.
    """
    if isinstance(value, torch.Tensor):
        if value.numel() == 1 and value.shape != parameter.shape:
            return ()
        if value.dim() != parameter.dim() or value.layout != torch.strided:
            return None
        if any(size not in (1, whole) for size, whole in zip(value.shape, parameter.shape, strict=True)):
            return None
        return [None if size == 1 else index for size, index in zip(value.shape, indices, strict=True)]
    plain = value is None or isinstance(value, (bool, int, float, complex, str, torch.dtype, torch.device))
    return () if plain else None


def cut(optimizers, tensors, packed, indices):
    """The optimizers that `check` returned, each with the parameters of its groups and the states that are to be its.

    packed: name -> the packed network's parameters and buffers. The states on one device are gathered in one pass.
    """
    new = {id(tensor): packed[name] for name, tensor in tensors.items()}
    names = {id(tensor): name for name, tensor in tensors.items()}
    result, gathers = [], {}  # gathers: device -> (the values of a state, the place of one of them, its kept indices)
    for optimizer in optimizers:
        groups = [[new.get(id(p), p) for p in group["params"]] for group in optimizer.param_groups]
        states = {}
        for parameter, state in optimizer.state.items():
            axes = indices[names[id(parameter)]] if id(parameter) in names else ()
            paths, structure = tree_flatten_with_path(state)
            values = [value for _, value in paths]
            for place, value in enumerate(values):
                if any(axis is not None for axis in axes) and (kept := _axes(value, parameter, axes)):
                    gathers.setdefault(value.device, []).append((values, place, kept))
            states[new.get(id(parameter), parameter)] = values, structure
        result.append((optimizer, groups, states))
    for places in gathers.values():
        whole = [values[place].detach() for values, place, _ in places]
        smaller = pack_channels(whole, [kept for _, _, kept in places])
        for (values, place, _), value in zip(places, smaller, strict=True):
            values[place] = value
    return [(o, groups, {p: tree_unflatten(*state) for p, state in states.items()}) for o, groups, states in result]


def install(packed):
    """Let the optimizers go on with what `cut` returned. Their groups and states stay the objects that they are."""
    for optimizer, groups, states in packed:
        for group, parameters in zip(optimizer.param_groups, groups, strict=True):
            group["params"][:] = parameters
        optimizer.state.clear()
        optimizer.state.update(states)
