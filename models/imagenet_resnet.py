"""ResNets for ImageNet: torchvision's own class, so names and published weights fit, with `outputs` added."""

from torch import Tensor
from torchvision.models import ResNet, get_model_weights
from torchvision.models.resnet import BasicBlock, Bottleneck

from models.outputs import Outputs
from models.sources import torchvision_weights

_BLOCKS = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
    "resnet152": (Bottleneck, [3, 8, 36, 3]),
}
IMAGENET_CLASSES = 1000


class ImageNetResNet(ResNet):
    """torchvision's ResNet (He et al., CVPR 2016; stride in the 3x3 of a bottleneck) over (B, 3, H, W) images."""

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs(x).logits

    def outputs(self, x: Tensor) -> Outputs:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))  # (B, 64, H/4, W/4)
        stages, blocks = [], []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = block(x)
                blocks.append(x)
            stages.append(x)
        embedding = self.avgpool(x).flatten(1)
        return Outputs(self.fc(embedding), tuple(stages), tuple(blocks), embedding)


def build_imagenet_resnet(name: str, *, num_classes: int, pretrained: bool = False) -> ImageNetResNet:
    """The named network, with torchvision's ImageNet weights if `pretrained` (the classifier stays new for other classes).

    Raises UserError where the weights cannot be downloaded.
    """
    block, layers = _BLOCKS[name]
    model = ImageNetResNet(block, layers, num_classes=num_classes)
    if pretrained:
        state = torchvision_weights(name, get_model_weights(name).DEFAULT)
        if num_classes != IMAGENET_CLASSES:
            state = {key: value for key, value in state.items() if not key.startswith("fc.")}
        model.load_state_dict(state, strict=num_classes == IMAGENET_CLASSES)
    return model
