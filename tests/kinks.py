"""ReLUs that cut where those of an earlier run did: rounding moves what lies close to the kink to its other side.

There the value differs by that rounding, but the gradient jumps from 0 to 1; a network that repeats its oracle's cuts
can be compared with it in its gradients too.
"""

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_)
PRELUS = (F.prelu, torch.prelu)


class Cuts(TorchFunctionMode):
    """The first block within it notes for each ReLU, ReLU6 and PReLU which elements pass, the later ones repeat it."""

    def __init__(self):
        super().__init__()
        self.noted, self.calls, self.repeat = [], 0, False

    def __enter__(self):
        self.repeat, self.calls = bool(self.noted), 0
        return super().__enter__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in RELUS:
            return args[0] * self._cut(args[0] > 0)
        if func is F.relu6:
            above = self._cut(args[0] >= 6)
            return torch.where(above, 6, args[0] * self._cut((args[0] > 0) & ~above))
        if func in PRELUS:
            x, slopes = args
            slopes = slopes.view(-1, *[1] * (x.dim() - 2))
            return x * torch.where(self._cut(x > 0), 1, slopes)
        return func(*args, **(kwargs or {}))

    def _cut(self, passes):
        if self.repeat:
            noted = self.noted[self.calls]
            assert (noted != passes).float().mean() < 0.01
            passes = noted
        else:
            self.noted.append(passes)
        self.calls += 1
        return passes
