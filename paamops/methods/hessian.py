"""How much the loss bends in each layer: the mean trace of its Hessian, by Hutchinson's estimator."""

import contextlib
import numbers
from typing import NamedTuple

import torch

from paamops import tracing


class HessianTrace(NamedTuple):
    """trace (L,): trace(H_l) / numel_l of each parameter. error (L,): its standard error, NaN after one sample."""

    trace: torch.Tensor
    error: torch.Tensor


def hessian_trace(model, loss, batches, parameters, samples=8, seed=0):
    """trace(H_l) / numel_l for each parameter l, H_l the Hessian of the mean loss with respect to it; a HessianTrace.

    The "average Hessian trace" tells how sensitive a layer is (Dong et al. 2020, HAWQ-V2); from it come the mixed rates
    of GlobalPru (Wang et al. 2023, §4). By Hutchinson: trace(H_l) = E[vᵀ H_l v], where the elements of v are -1 or 1
    with equal chances, and vᵀH_l is the gradient of vᵀ∇loss. The variance of a sample is 2 Σ_ij H_ij² over all i ≠ j in
    the layer, so a diagonal H_l is found exactly by one sample.

    What we chose (the paper says only that it is the average trace): eval mode. Signs for one layer at a time: drawn
    for all layers at once they are unbiased as well and take one backward pass in place of L shorter ones, but add
    Σ_ik H_ik² over all k in other layers to the variance. For ResNet-20 trained on the digits the error of a sample was
    2.5 to 10 times as large, at a fifth of the time. And new signs for every batch, whose errors then average out as
    well: several small batches take as long as a large one, and have more signs.

    Args:
        model: a module. It is left as it was: modes, gradients, buffers and which parameters are trained.
        loss: a function (model, batch) -> scalar, twice differentiable. This project's ops are differentiable once, and
            a model that calls them is refused: it must call their references.
        batches: an iterable of what `loss` takes; it is gone through once. The mean loss is that of the batches, each
            with the same weight.
        parameters: L names of parameters, as `named_parameters` has them. They need not be trained ones.
        samples: ≥ 1, sign vectors for every batch and layer.
        seed: of the signs, which are drawn on the CPU: the same on every device.

    Returns a HessianTrace of two (L,) float64 tensors on the CPU, in the order of `parameters`. The gradients are
    computed in the dtype of the model, what is summed over their elements in float64.

    ValueError: no batches, no parameters, an unknown one, one that is given twice or is not real, a loss that is not a
    finite scalar or does not depend on a parameter (each names the batch), a trace that is not finite. TypeError:
    `loss` returns no tensor; `parameters` is one string; `samples` or `seed` is no int. RuntimeError: an op is
    differentiable once.
    """
    names, tensors = _chosen(model, parameters)
    _check_int("samples", samples)
    if samples < 1:
        raise ValueError(f"samples is {samples}; it must be at least 1")
    _check_int("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    sums, count = torch.zeros(samples, len(names), dtype=torch.float64), 0
    with left_alone(model), torch.enable_grad():
        for tensor in tensors:
            tensor.requires_grad_(True)
        for count, batch in enumerate(batches, 1):
            sums += _forms(_checked(loss(model, batch), count), names, tensors, samples, generator, count)
    if not count:
        raise ValueError("batches is empty; it must hold at least one batch")
    values = sums / count / torch.tensor([tensor.numel() for tensor in tensors], dtype=torch.float64)
    trace = values.mean(0)
    for name, value in zip(names, trace.tolist(), strict=True):
        if not abs(value) < float("inf"):
            raise ValueError(
                f"the trace of the Hessian of {name!r} is {value}: the loss has no finite second derivative"
            )
    return HessianTrace(trace, values.std(0) / samples**0.5 if samples > 1 else torch.full_like(trace, torch.nan))


@contextlib.contextmanager
def left_alone(model):
    """Within it `model` is in eval mode and none of its parameters is trained; afterwards all is as it was."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    buffers = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    try:
        with tracing.evaluating(model):
            for parameter, _ in trained:
                parameter.requires_grad_(False)
            yield
    finally:
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        for held, before in buffers:  # a forward pass may have put others in their place
            held.clear()
            held.update(before)


def _chosen(model, parameters):
    """The names as a list, and their tensors."""
    if isinstance(parameters, str):
        raise TypeError(f"parameters is the string {parameters!r}; it must be a list of names")
    names = list(parameters)
    if not names:
        raise ValueError("parameters is empty; it must name at least one parameter")
    known = dict(model.named_parameters(remove_duplicate=False))
    first = {}
    for name in names:
        if name not in known:
            other = " (it is a buffer)" if name in tracing.named_tensors(model) else ""
            raise ValueError(f"parameters names {name!r}, which is no parameter of the model{other}")
        if not known[name].is_floating_point():
            raise ValueError(
                f"parameters names {name!r}, which is {known[name].dtype}; it must be a real number's dtype"
            )
        if not known[name].numel():
            raise ValueError(f"parameters names {name!r}, which has no elements")
        other = first.setdefault(id(known[name]), name)
        if sum(each == name for each in names) > 1 or other != name:
            raise ValueError(
                f"parameters names {other!r} and {name!r}, which are one tensor; it must name each one once"
            )
    return names, [known[name] for name in names]


def _check_int(name, value):
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be an int")


def _checked(value, number):
    """The loss of batch `number`, a finite scalar."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"loss returned a {type(value).__name__} for batch {number}; it must return a tensor")
    if value.numel() != 1:
        raise ValueError(
            f"loss returned a tensor of shape {tuple(value.shape)} for batch {number}; it must be a scalar"
        )
    if not value.isfinite():
        raise ValueError(f"loss is {value.item()} for batch {number}; it must be finite")
    return value.reshape(())


def _gradients(value, tensors, names, number):
    """The gradients of the loss of batch `number`, which can be differentiated again."""
    found = [None] * len(names)
    if value.requires_grad:
        found = torch.autograd.grad(value, tensors, create_graph=True, allow_unused=True)
    unused = [repr(name) for name, gradient in zip(names, found, strict=True) if gradient is None]
    if unused:
        raise ValueError(f"loss does not depend on {', '.join(unused)} for batch {number}; it must, on every parameter")
    return found


def _signs(tensor, generator):
    """-1 or 1 for every element of `tensor`."""
    signs = torch.randint(2, tensor.shape, generator=generator, dtype=torch.int8) * 2 - 1
    return signs.to(tensor.device, tensor.dtype)


def _forms(value, names, tensors, samples, generator, number):
    """vᵀ H_l v for each sample and parameter, (samples, L) float64 on the CPU; H that of the loss of batch `number`."""
    gradients = _gradients(value, tensors, names, number)
    forms = []
    for _ in range(samples):
        for gradient, tensor in zip(gradients, tensors, strict=True):
            signs, product = _signs(tensor, generator), None
            if gradient.requires_grad:  # a constant one has no second derivative
                (product,) = torch.autograd.grad(gradient, tensor, signs, retain_graph=True, allow_unused=True)
            forms.append(
                tensor.new_zeros((), dtype=torch.float64) if product is None else (signs.double() * product).sum()
            )
    devices = dict.fromkeys(form.device for form in forms)  # the host waits once, unless layers lie on several
    forms = torch.stack(forms) if len(devices) == 1 else torch.stack([form.cpu() for form in forms])
    return forms.detach().cpu().view(samples, len(tensors))
