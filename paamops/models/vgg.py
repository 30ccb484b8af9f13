"""VGG-16 and VGG-19 with batch norm, in their CIFAR form."""

from torch import nn

WIDTHS = (64, 128, 256, 512, 512)  # of each stage
CONVOLUTIONS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}  # of each stage: configurations D and E


class VGG(nn.Module):
    """3x3 convolutions, each with batch norm and ReLU, in five stages with max pooling; then one linear layer.

    x (N, in_channels, H, W), H and W at least 16 (the papers: 32) → logits (N, num_classes). The last pooling takes the
    maximum over all that is left of space: at 32x32 that is its 2x2 pooling exactly.
    Source: Simonyan and Zisserman, Very deep convolutional networks (2015), configurations D (depth 16: 13
    convolutions) and E (depth 19: 16 convolutions); on CIFAR the three linear layers are one, of 512 inputs: 14,728,266
    and 20,040,522 parameters for 3 channels and 10 classes. Initialised as in He et al. (2015).
    """

    def __init__(self, depth, in_channels, num_classes):
        super().__init__()
        layers = []
        for channels, convolutions in zip(WIDTHS, CONVOLUTIONS[depth], strict=True):
            for _ in range(convolutions):
                layers += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
                in_channels = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])
        self.linear = nn.Linear(in_channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x):
        return self.linear(self.features(x).amax((2, 3)))
