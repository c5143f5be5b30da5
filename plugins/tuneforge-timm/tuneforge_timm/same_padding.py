"""Convolutions with TensorFlow's "same" padding that torch.fx can trace.

Shapes: b samples, c channels, h and w pixels.
"""

from __future__ import annotations

from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F


def make_same_padding_traceable(network: nn.Module) -> None:
    """Let each convolution of timm with dynamic padding compute it in a way that `torch.fx` can trace, in place.

    timm's own code rounds with `math.ceil` and `max`, which fail on the symbols of a trace. Without a trace by fx, the
    feature cache of a frozen backbone needs one by `torch.export`, which takes many times as long.
    """
    for module in network.modules():
        # A kernel that is smaller than its stride may need no padding, where `max` cannot be avoided.
        if type(module) is Conv2dSame and all(
            dilation * (kernel - 1) + 1 >= stride
            for kernel, stride, dilation in zip(module.kernel_size, module.stride, module.dilation, strict=True)
        ):
            module.__class__ = _TraceableConv2dSame


class _TraceableConv2dSame(Conv2dSame):
    """A convolution (b, c, h, w) whose output has ceil(h / stride) rows and ceil(w / stride) columns."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2], x.shape[-1]
        rows, columns = self._padding_of(height, 0), self._padding_of(width, 1)
        padded = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return F.conv2d(padded, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)

    def _padding_of(self, size: int, axis: int) -> int:
        stride, kernel = self.stride[axis], self.dilation[axis] * (self.kernel_size[axis] - 1) + 1
        return (-(-size // stride) - 1) * stride + kernel - size
