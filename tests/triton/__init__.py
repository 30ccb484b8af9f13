"""The Triton launchers, called directly: on a GPU where there is one, else on the CPU in Triton's interpreter."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
