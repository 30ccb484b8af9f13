"""LeNet-5 and LeNet-300-100, in the forms the pruning papers train."""

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


class LeNet300(nn.Module):
    """Two linear layers of 300 and 100 with ReLU, and one for the logits, over the pixels of the image.

    x (N, in_channels, H, W), H and W at least 1 → logits (N, num_classes). It reads 28x28 pixels, as in the paper;
    images of another size are first averaged down or repeated up to that, which leaves 28x28 as it is.
    Source: LeCun et al., Gradient-based learning applied to document recognition (1998), §III.C.4, with ReLU, as the
    pruning papers since Han et al. (2015) train it: 266,610 parameters for 1 channel and 10 classes. Weights start like
    LeNet-5's.
    """

    def __init__(self, in_channels, num_classes):
        super().__init__()
        self.linear1 = nn.Linear(in_channels * 28 * 28, 300)
        self.linear2 = nn.Linear(300, 100)
        self.linear3 = nn.Linear(100, num_classes)
        for layer in (self.linear1, self.linear2, self.linear3):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        x = F.relu(self.linear1(F.adaptive_avg_pool2d(x, 28).flatten(1)))
        return self.linear3(F.relu(self.linear2(x)))
