"""AlexNet with batch normalisation for 32x32 images: after Krizhevsky et al., NeurIPS 2012.

The form that pruning papers use on CIFAR: 11x11 stem with stride 4 and padding 5, 2x2 poolings, one 1x1 map left for a
32x32 image. Larger images are average-pooled to that 1x1 map.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.outputs import Outputs

HIDDEN_UNITS = 4096


class AlexNet(nn.Module):
    """Five convolutions and three linear layers over (B, 3, H, W) images, H and W at least 29."""

    def __init__(self, *, num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 11, stride=4, padding=5)
        self.conv1_bn = nn.BatchNorm2d(64)
        self.conv2 = nn.Conv2d(64, 192, 5, padding=2)
        self.conv2_bn = nn.BatchNorm2d(192)
        self.conv3 = nn.Conv2d(192, 384, 3, padding=1)
        self.conv3_bn = nn.BatchNorm2d(384)
        self.conv4 = nn.Conv2d(384, 256, 3, padding=1)
        self.conv4_bn = nn.BatchNorm2d(256)
        self.conv5 = nn.Conv2d(256, 256, 3, padding=1)
        self.conv5_bn = nn.BatchNorm2d(256)
        self.fc1 = nn.Linear(256, HIDDEN_UNITS)
        self.fc2 = nn.Linear(HIDDEN_UNITS, HIDDEN_UNITS)
        self.fc3 = nn.Linear(HIDDEN_UNITS, num_classes)
        self.pool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout()
        self.global_pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs(x).logits

    def outputs(self, x: Tensor) -> Outputs:
        map1 = F.relu(self.conv1_bn(self.conv1(x)))  # (B, 64, 8, 8) of a 32x32 image
        map2 = F.relu(self.conv2_bn(self.conv2(self.pool(map1))))  # (B, 192, 4, 4)
        map3 = F.relu(self.conv3_bn(self.conv3(self.pool(map2))))  # (B, 384, 2, 2)
        map4 = F.relu(self.conv4_bn(self.conv4(map3)))
        map5 = F.relu(self.conv5_bn(self.conv5(map4)))  # (B, 256, 2, 2)
        features = self.global_pool(self.pool(map5)).flatten(1)  # (B, 256)
        hidden = F.relu(self.fc1(self.dropout(features)))
        embedding = F.relu(self.fc2(self.dropout(hidden)))
        return Outputs(self.fc3(embedding), (map1, map2, map5), (map1, map2, map3, map4, map5), embedding)
