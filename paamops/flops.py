"""FLOPs of what is no layer: products of activations, and convolutions whose weight the forward pass computes.

Their sizes do not follow what is pruned, since the trace pins whatever meets there; to the cost they are a fixed term.
"""

from torch.utils.flop_counter import flop_registry


def other_flops(op, args, kwargs, out):
    """2 · multiply-adds of an ATen op, as `torch.utils.flop_counter` counts them; 0 where it knows no formula."""
    formula = flop_registry.get(op._overloadpacket)
    return formula(*args, **kwargs, out_val=out) if formula else 0
