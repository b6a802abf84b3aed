"""Batch norm for a number of channels that fills no vector, in training on a CPU: what filter pruning leaves.

PyTorch's channels-last kernels go through a map pixel by pixel, and keep the sums of each thread one behind the other.
10 channels leave most of a vector empty, and two threads write to the same cache line all the time. Here many pixels side
by side pass for one pixel of many channels: the same kernels take its sums, which are then brought together.
"""

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LINE = 16  # float32 numbers in a cache line, and in the widest vector
ROW = 640  # numbers in a row at which the kernels are fastest (docs/performance.md)

aten = torch.ops.aten


class _WideBatchNorm(torch.autograd.Function):
    """Widened images, weight and bias (c,) -> the images normalised, as wide, and mean and variance (c,)."""

    @staticmethod
    def forward(ctx, wide: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        repeats = wide.shape[1] // len(weight)
        unused = weight.new_zeros(wide.shape[1])  # running statistics, whose type the result has
        means, variances = (part.view(repeats, -1) for part in aten.batch_norm_update_stats(wide, unused, unused, 0.0))
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)
        statistics = [part.repeat(repeats) for part in (weight, bias, mean, variance)]
        normalised, *_ = aten.native_batch_norm(wide, *statistics, False, 0.0, eps)
        ctx.save_for_backward(wide, weight, mean, variance)
        ctx.repeats, ctx.eps = repeats, eps
        ctx.mark_non_differentiable(mean, variance)
        return normalised, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """With z the normalised images before weight and bias: w / std * (g - mean(g) - z * mean(g * z))."""
        wide, weight, mean, variance = ctx.saved_tensors
        statistics = [part.repeat(ctx.repeats) for part in (weight, mean, variance)]
        needed = [False, True, True]  # not the gradient of the images, which knows nothing of the other repeats
        sums = aten.native_batch_norm_backward(gradient, wide, *statistics, None, None, False, ctx.eps, needed)
        weight_gradient, bias_gradient = (part.view(ctx.repeats, -1).sum(0) for part in sums[1:])
        inverse, count = torch.rsqrt(variance + ctx.eps), wide.numel() // len(weight)
        scale = weight * inverse
        slope = -scale * inverse * weight_gradient / count
        offset = -scale * bias_gradient / count - slope * mean
        offset, scale, slope = (part.repeat(ctx.repeats).view(1, -1, 1, 1) for part in (offset, scale, slope))
        images_gradient = torch.addcmul(offset, gradient, scale).addcmul_(wide, slope)
        return images_gradient.to(wide.dtype), weight_gradient, bias_gradient, None


def _repeats(images: Tensor) -> int:
    """How many pixels make a row of whole lines, near `ROW` where the number of pixels allows it; 0 if it allows none."""
    channels = images.shape[1]
    pixels = images.numel() // channels
    repeats = LINE // math.gcd(channels, LINE)
    if pixels % repeats:
        return 0
    while repeats * channels < ROW and pixels % (2 * repeats) == 0:
        repeats *= 2
    return repeats


def _widened(images: Tensor) -> Tensor:
    """(1, repeats * c, pixels / repeats, 1): a view, in channels-last layout as the images are."""
    rows = images.permute(0, 2, 3, 1).reshape(1, -1, 1, _repeats(images) * images.shape[1])
    return rows.permute(0, 3, 1, 2)


def _narrowed(wide: Tensor, like: Tensor) -> Tensor:
    batch, channels, height, width = like.shape
    return wide.permute(0, 2, 3, 1).reshape(batch, height, width, channels).permute(0, 3, 1, 2)


class UnevenBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d`, faster where its channels-last kernel is slow; the same everywhere else."""

    def forward(self, images: Tensor) -> Tensor:
        if not self._is_slow_case(images):
            return super().forward(images)
        wide, mean, variance = _WideBatchNorm.apply(_widened(images), self.weight, self.bias, self.eps)
        if self.track_running_stats:
            count = images.numel() // images.shape[1]
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        return _narrowed(wide, images)

    def _is_slow_case(self, images: Tensor) -> bool:
        return (
            self.training
            and not torch.compiler.is_compiling()
            and images.device.type == "cpu"
            and images.dtype in (self.weight.dtype, torch.bfloat16)
            and images.is_contiguous(memory_format=torch.channels_last)
            and _repeats(images) > 0
        )


def quicken_batch_norms(network: nn.Module) -> None:
    """Turns each batch norm that it is for into an `UnevenBatchNorm2d`, which is the same module otherwise."""
    for norm in network.modules():
        if type(norm) is nn.BatchNorm2d and norm.num_features % LINE and norm.affine and norm.momentum is not None:
            norm.__class__ = UnevenBatchNorm2d
