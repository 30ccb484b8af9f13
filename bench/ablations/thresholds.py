"""Layer-aware thresholds (AAP §3.3) at a given size."""

import math

import paamops


def layer_weights(channels):
    """w_l, (L,) float64: the parameters of layer l's weight over those of all layers, N_l = n_(l-1) · k · k · n_l."""
    params, _ = channels.layer_costs()
    return params / params.sum()


def layer_aware(channels, scores, params):
    """The Selection of the smallest T whose thresholds T · w_l leave at most `params` parameters (an int).

    T is bisected until it cannot be halved further: with the next set the network would not fit. But filters that never
    respond go at T = 0, all of them, however little is asked for. ValueError: no T fits.
    """
    weights = layer_weights(channels)

    def at(t):
        return paamops.select(channels, scores, threshold=(t * weights).tolist())

    low, high = 0.0, 2 * float(scores.double().max() / weights[weights > 0].min())
    if at(low).achieved.params <= params:
        return at(low)
    if (smallest := at(high).achieved.params) > params:
        raise ValueError(f"params is {params:,}, but the smallest network that thresholds reach has {smallest:,}")
    while low < (middle := (low + high) / 2) < high and not math.isclose(low, high, rel_tol=1e-15):
        low, high = (low, middle) if at(middle).achieved.params <= params else (middle, high)
    return at(high)
