"""The papers' networks, small and plain: `paamops.models.build("resnet20", in_channels=3, num_classes=10)`."""

from functools import partial

from paamops.excitation import install
from paamops.models.bottleneck import BottleneckResNet
from paamops.models.lenet import LeNet5, LeNet300
from paamops.models.mobilenet import MobileNetV2
from paamops.models.resnet import ResNet
from paamops.models.shufflenet import ShuffleNetV2
from paamops.models.vgg import VGG

NETWORKS = {
    "lenet5": LeNet5,
    "lenet300-100": LeNet300,
    "resnet20": partial(ResNet, 20),
    "resnet32": partial(ResNet, 32),
    "resnet44": partial(ResNet, 44),
    "resnet56": partial(ResNet, 56),
    "resnet110": partial(ResNet, 110),
    "resnet50": partial(BottleneckResNet, 50),
    "resnet101": partial(BottleneckResNet, 101),
    "vgg16": partial(VGG, 16),
    "vgg19": partial(VGG, 19),
    "mobilenetv2": MobileNetV2,
    "shufflenet": ShuffleNetV2,
}


def build(name, in_channels=3, num_classes=10, excitations=None):
    """The network `name` (a key of NETWORKS) with fresh weights, for images of `in_channels` channels.

    excitations: where the network has squeeze-and-excitations, as `paamops.excite` returned it.
    The model remembers its recipe in `model.paamops_recipe`, so that `paamops.load` can build it again.
    ValueError: an unknown name, a number that is not a positive int, or excitations where the network has no host.
    """
    if name not in NETWORKS:
        raise ValueError(f"name is {name!r}; it must be one of {', '.join(NETWORKS)}")
    for argument, value in (("in_channels", in_channels), ("num_classes", num_classes)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{argument} is {value!r}; it must be a positive int")
    model = NETWORKS[name](in_channels=in_channels, num_classes=num_classes)
    model.paamops_recipe = {"name": name, "in_channels": in_channels, "num_classes": num_classes}
    if excitations is not None:
        install(model, excitations)
    return model
