"""LeNet-5, in the form the pruning papers train."""

from torch import nn
from torch.nn import functional as F


class LeNet5(nn.Module):
    """Two 5x5 convolutions of 20 and 50 filters, each with ReLU and max pooling, then two linear layers, 500 wide.

    x (N, in_channels, H, W) → logits (N, num_classes). The second pooling is adaptive to 4x4: at the paper's 28x28 that
    is 2x2 pooling exactly, and other sizes from 14x14 up can be read too.
    Source: LeCun et al., Gradient-based learning applied to document recognition (1998), in the wider form of 431,080
    parameters that Caffe shipped and pruning papers since Han et al. (2015) use. Weights start normal, with deviation
    fan_in^(-1/2) (LeCun et al., Efficient backprop, 1998, §4.6).
    """

    def __init__(self, in_channels, num_classes):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.linear1 = nn.Linear(50 * 4 * 4, 500)
        self.linear2 = nn.Linear(500, num_classes)
        for layer in (self.conv1, self.conv2, self.linear1, self.linear2):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.adaptive_max_pool2d(F.relu(self.conv2(x)), 4)
        return self.linear2(F.relu(self.linear1(x.flatten(1))))
