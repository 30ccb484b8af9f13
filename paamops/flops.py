"""FLOPs of what is no layer: products of activations, and convolutions whose weight the forward pass computes.

Their sizes do not follow what is pruned, since the trace pins whatever meets there; to the cost they are a fixed term.
"""

from torch.utils.flop_counter import flop_registry, sdpa_flop_count


def other_flops(op, args, kwargs, out):
    """2 · multiply-adds of an ATen op, as `torch.utils.flop_counter` counts them; 0 where it knows no formula.

    It has none for attention on a CPU: every `_scaled_dot_product_*` is counted by its two products.
    """
    if op._schema.name.startswith("aten::_scaled_dot_product"):
        return sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
    formula = flop_registry.get(op._overloadpacket)
    return formula(*args, **kwargs, out_val=out) if formula else 0
