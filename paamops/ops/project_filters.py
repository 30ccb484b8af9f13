"""The filters of all layers, as rows, times their layers' projections: what PAAM's filter attention starts from.

result = I_1 W_1 above I_2 W_2 above …        I_l (n_l, d_l) the filters, W_l (d_l, m) the projection of layer l
"""

import functools
import math

import torch

from paamops.ops.registration import define

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CONSTANT = 8  # a layer whose deviation is below so many units in the last place of its mean counts as constant
CHUNK = 4096  # entries that are summed by one block of a GPU


def project_filters(rows, weight, standardised=False):
    """I_l W_l of all layers, one above the other: (Σ n_l, m).

    rows: list of L tensors (n_l, d_l), the filters of each layer, float16 to float64, on one device; a layer may be
    empty. weight: (Σ d_l, m), the layers' projections W_l one above the other, float32 or float64. The rows are taken
    in the dtype of weight, which is that of the result. Only weight has a gradient, Σ over nothing but its own layer:
    ∂W_l = I_lᵀ ∂result_l; the filters are detached. Differentiable once.
    standardised: each layer's rows are replaced by (I_l - mean) / std over all its entries, std that of the population;
    a layer whose entries are all equal, to rounding, becomes zeros. NaN and infinities spread over their layer.
    TypeError: rows is no list, or a row or weight is no tensor of such a dtype. ValueError: rows is empty, a row is not
    (n, d), weight has not Σ d_l rows, or the devices differ.
    Source: PAAM (pruning by active attention manipulation, Babaiee et al. 2022, arXiv 2210.11114); the paper's excerpt
    gives no formula. Rows of their layer's own width with a projection of their own, and their standardisation, are our
    choice.
    """
    heights, widths = _check(rows, weight)
    flat = torch.cat([row.detach().reshape(-1) for row in rows]).to(weight.dtype)
    if standardised and weight.is_cuda:
        flat = _standardise_at_once(flat, heights, widths)
    elif standardised:
        for part in flat.split([row.numel() for row in rows]):
            if len(part):
                _standardise(part)
    return project_filters_op(flat, weight, heights, widths)


def _standardise(part):
    """In place, the entries of one layer."""
    std, mean = torch.std_mean(part, correction=0)
    part.sub_(mean).mul_(_factor(std, mean))


def _factor(std, mean):
    """1 / std, or 0 where the entries differ by no more than rounding; NaN stays."""
    return torch.where(std <= CONSTANT * torch.finfo(std.dtype).eps * mean.abs(), 0.0, 1 / std)


def _standardise_at_once(flat, heights, widths):
    """All layers in a number of launches that does not depend on theirs: sums over chunks, then over their chunks."""
    if not len(flat):
        return flat
    sizes, lengths, chunks = _segments(tuple(heights), tuple(widths), flat.device)

    def mean(values):
        sums = torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)  # unsafe: lengths are not read back
        return torch.segment_reduce(sums, "sum", lengths=chunks, unsafe=True) / sizes

    def spread(values):
        return values.repeat_interleave(sizes, output_size=len(flat))

    average = mean(flat)
    centred = flat - spread(average)
    return centred.mul_(spread(_factor(mean(centred.square()).sqrt(), average)))


@functools.lru_cache(maxsize=64)
def _segments(heights, widths, device):
    """On the device: the entries of each layer, the lengths of all chunks, and how many chunks a layer has."""
    sizes = [n * d for n, d in zip(heights, widths, strict=True)]
    lengths = [min(CHUNK, size - begin) for size in sizes for begin in range(0, size, CHUNK)]
    chunks = [math.ceil(size / CHUNK) for size in sizes]
    tables = [torch.tensor(table, dtype=torch.int64) for table in (sizes, lengths, chunks)]
    if device.type != "cuda":
        return tuple(table.to(device) for table in tables)
    return tuple(table.pin_memory().to(device, non_blocking=True) for table in tables)


def _check(rows, weight):
    """Raise the error that names the argument, what it was and what it must be; the heights and widths of the rows."""
    if not isinstance(rows, (list, tuple)):
        raise TypeError(f"rows is a {type(rows).__name__}; it must be a list of tensors, one for each layer")
    if not rows:
        raise ValueError("rows is empty; it must have at least one layer")
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"weight is a {type(weight).__name__}; it must be a tensor")
    if weight.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"weight has dtype {weight.dtype}; it must be float32 or float64")
    for index, row in enumerate(rows):
        if not isinstance(row, torch.Tensor):
            raise TypeError(f"rows[{index}] is a {type(row).__name__}; it must be a tensor")
        if row.dtype not in DTYPES:
            raise TypeError(f"rows[{index}] has dtype {row.dtype}; it must be float16, bfloat16, float32 or float64")
        if row.ndim != 2:
            raise ValueError(f"rows[{index}] has shape {tuple(row.shape)}; it must have two dimensions, (n, d)")
        if row.device != weight.device:
            raise ValueError(f"rows[{index}] is on {row.device}; it must be on the device of weight, {weight.device}")
    heights, widths = [row.shape[0] for row in rows], [row.shape[1] for row in rows]
    if weight.ndim != 2 or weight.shape[0] != sum(widths):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; it must have two dimensions and as many rows as all layers have "
            f"columns, {sum(widths)}"
        )
    return heights, widths


def _layers(rows, heights, widths):
    """Of every layer its matrix (n, d), and where its rows of the result and of weight begin."""
    height = width = begin = 0
    for n, d in zip(heights, widths, strict=True):
        yield rows[begin : begin + n * d].view(n, d), slice(height, height + n), slice(width, width + d)
        begin, height, width = begin + n * d, height + n, width + d


def project_filters_reference(rows, weight, heights, widths):
    """(Σ n_l, m): a product for each layer, into its rows of the result."""
    result = weight.new_empty(sum(heights), weight.shape[1])
    for matrix, own, projection in _layers(rows, heights, widths):
        torch.mm(matrix, weight[projection], out=result[own])
    return result


def project_filters_backward_reference(grad, rows, heights, widths):
    """∂weight: (Σ d_l, m), I_lᵀ ∂result_l for each layer."""
    result = grad.new_empty(sum(widths), grad.shape[1])
    for matrix, own, projection in _layers(rows, heights, widths):
        torch.mm(matrix.t(), grad[own], out=result[projection])
    return result


def _save(ctx, inputs, output):
    rows, _, ctx.heights, ctx.widths = inputs
    ctx.save_for_backward(rows)


def _backward(ctx, grad):
    return None, project_filters_backward_op(grad, *ctx.saved_tensors, ctx.heights, ctx.widths), None, None


project_filters_backward_op = define(
    "project_filters_backward(Tensor grad, Tensor rows, int[] heights, int[] widths) -> Tensor",
    reference=project_filters_backward_reference,
    fake=lambda grad, rows, heights, widths: grad.new_empty(sum(widths), grad.shape[1]),
)

project_filters_op = define(
    "project_filters(Tensor rows, Tensor weight, int[] heights, int[] widths) -> Tensor",
    reference=project_filters_reference,
    fake=lambda rows, weight, heights, widths: weight.new_empty(sum(heights), weight.shape[1]),
    setup_context=_save,
    backward=_backward,
)
