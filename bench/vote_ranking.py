"""vote_ranking against a stable sort and a scattered sum, as eager PyTorch and compiled; at 512 channels and at few."""

import torch

from paamops.ops.vote_ranking import vote_ranking

from .harness import Case, compiled

SHAPES = [(256, 512, torch.float32), (256, 512, torch.bfloat16), (256, 64, torch.float32), (4096, 16, torch.float32)]


def eager(saliency):
    """The same table by a sort of every image."""
    channels = saliency.shape[1]
    cells = saliency.argsort(dim=1, descending=True, stable=True) * channels
    cells += torch.arange(channels, device=saliency.device)
    votes = torch.zeros(channels * channels, dtype=torch.int64, device=saliency.device)
    one = torch.ones((), dtype=torch.int64, device=saliency.device).expand(cells.numel())
    return votes.scatter_add_(0, cells.flatten(), one).view(channels, channels)


def case(images, channels, dtype):
    """Saliencies as a sigmoid gives them are read once, the table is written once."""
    return Case(
        name=f"vote_ranking {images}x{channels} {str(dtype)[6:]}",
        op="vote_ranking",
        make=lambda device: (torch.randn(images, channels, device=device).sigmoid().to(dtype),),
        run=vote_ranking,
        check=lambda saliency: eager(saliency.double()),
        baselines={"eager": eager, "compile": compiled(eager)},
        bytes=images * channels * dtype.itemsize + channels * channels * 8,
        target={"eager": 4} if channels == 512 else {},
        cold=False,  # saliencies come out of the layer that computed them
    )


CASES = [case(*shape) for shape in SHAPES]
