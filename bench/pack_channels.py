"""Packing all tensors of ResNet-50 to half their width at random, against copying as many bytes and index_select."""

import torch

from paamops.ops.pack_channels import pack_channels

from .harness import Case


def resnet50_shapes():
    """The shapes of ResNet-50's parameters and buffers, in order: 161 parameters, 3 buffers for each of 53 norms."""
    shapes = []

    def convolution_and_norm(outputs, inputs, size):
        shapes.extend([(outputs, inputs, size, size), *[(outputs,)] * 4, ()])

    convolution_and_norm(64, 3, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolution_and_norm(width, inputs, 1)
            convolution_and_norm(width, width, 3)
            convolution_and_norm(4 * width, width, 1)
            if block == 0:
                convolution_and_norm(4 * width, inputs, 1)
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def half_width(shape, kept, device):
    """Half of every channel axis, the same for axes of one size, but all of the image's channels and of the classes."""
    axes = [None] * len(shape)
    for dim, size in enumerate(shape[:2]):
        if size not in (3, 1000):
            if size not in kept:
                kept[size] = torch.randperm(size, device=device)[: size // 2].sort().values
            axes[dim] = kept[size]
    return axes


def make(memory_format):
    def inputs(device):
        kept, tensors, indices = {}, [], []
        for shape in resnet50_shapes():
            tensor = torch.randn(shape, device=device) if shape else torch.tensor(100, device=device)
            tensors.append(tensor.to(memory_format=memory_format) if tensor.dim() == 4 else tensor)
            indices.append(half_width(shape, kept, device))
        return tensors, indices, index_select(tensors, indices)

    return inputs


def index_select(tensors, indices, packed=None):
    result = []
    for tensor, axes in zip(tensors, indices, strict=True):
        for dim, axis in enumerate(axes):
            if axis is not None:
                tensor = tensor.index_select(dim, axis)
        result.append(tensor)
    return result


def copy(tensors, indices, packed):
    return [tensor.clone() for tensor in packed]


PACKED_BYTES = sum(
    4 * torch.Size([size if size in (3, 1000) or dim > 1 else size // 2 for dim, size in enumerate(shape)]).numel()
    for shape in resnet50_shapes()
)

CASES = [
    Case(
        name=f"pack_channels ResNet-50 half width {name}",
        op="pack_channels",
        make=make(memory_format),
        run=lambda tensors, indices, packed: pack_channels(tensors, indices),
        check=index_select,
        baselines={"copy": copy, "index_select": index_select},
        bytes=2 * PACKED_BYTES,
        target={"copy": 0.5, "index_select": 3},
    )
    for name, memory_format in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last))
]
