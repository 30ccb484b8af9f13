"""How many channels each layer loses: one rate for all, turned by how sensitive the layers are."""

import numbers

import torch

HALVINGS = 200  # of an interval of floats: more than there can be


def mixed_rates(rate, traces, spread=0.1, low=0.1, high=0.9):
    """p_l = clip(p + shift − spread · z_l, low, high), z_l = (t_l − mean t) / sd t, the shift such that mean p_l = p.

    The "mixed" pruning rates of GlobalPru (Wang et al. 2023, §4): the rates are aligned to the fixed rate p, the larger
    the average Hessian trace t_l of a layer, the lower its rate, and how far it lies from p goes by the standard
    deviation of the traces. The paper gives no formula. What we chose: a rate that is linear in z_l, bounds, and a mean
    over the layers of p, also after the bounds have cut some of them. The shift is found by bisection, for the mean
    never falls as it grows. sd is that of the layers at hand (divided by L); equal traces, or one layer, give p.

    Args:
        rate: p in [0, 1), the share of the channels that go.
        traces: (L,) numbers, a list or a tensor: `hessian_trace(...).trace`.
        spread: in [0, 1], by how much the rate falls for one standard deviation.
        low, high: the bounds, 0 ≤ low ≤ high < 1. They widen to hold p where it lies outside; all rates are p then.

    Returns (L,) float64 on the CPU. A larger trace never has a higher rate, equal traces have equal rates, and the mean
    is p to 1e-12.

    ValueError: a number out of range, no traces, traces of another shape, one that is not finite. TypeError: what is no
    number.
    """
    rate, spread, low, high = (
        _number(name, value) for name, value in (("rate", rate), ("spread", spread), ("low", low), ("high", high))
    )
    if not 0 <= rate < 1:
        raise ValueError(f"rate is {rate}; it must be at least 0 and below 1")
    if not 0 <= spread <= 1:
        raise ValueError(f"spread is {spread}; it must be from 0 to 1")
    if not 0 <= low <= high < 1:
        raise ValueError(f"low and high are {low} and {high}; they must be 0 ≤ low ≤ high < 1")
    traces = _checked(traces)
    low, high = min(low, rate), max(high, rate)
    offsets = -spread * _standardised(traces)
    if not offsets.any() or rate in (low, high):
        return torch.full_like(traces, rate)
    least, most = low - offsets.max(), high - offsets.min()  # all rates are low; all are high
    for _ in range(HALVINGS):
        middle = (least + most) / 2
        if (offsets + middle).clamp(low, high).mean() < rate:
            least = middle
        else:
            most = middle
    return (offsets + most).clamp(low, high)


def _standardised(traces):
    """z (L,): mean 0 and standard deviation 1; 0 everywhere where all are equal."""
    if traces.max() == traces.min():
        return torch.zeros_like(traces)
    scaled = traces / traces.abs().max()  # the squares of large traces would overflow
    return (scaled - scaled.mean()) / scaled.std(correction=0)


def _number(name, value):
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a number")
    return float(value)


def _checked(traces):
    """The traces as a tensor (L,) float64 on the CPU."""
    try:
        found = torch.as_tensor(traces, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"traces is a {type(traces).__name__}; it must be (L,) numbers") from error
    if found.dim() != 1 or not len(found):
        raise ValueError(f"traces is of shape {tuple(found.shape)}; it must be (L,), L ≥ 1")
    for number, value in enumerate(found.tolist()):
        if not abs(value) < float("inf"):
            raise ValueError(f"traces[{number}] is {value}; it must be finite")
    return found
