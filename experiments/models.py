"""Small smooth networks without state: convolutions or dense layers, tanh, logits of the classes.

FAMILY holds those of the experiments. P counts trainable parameters; us is the price of loss and
gradient, in microseconds an example, in jitted blocks of 128 on two CPU cores:

    name           input      P        channels          us
    digits         8x8x1      1,446    8 12               8
    mnist14        14x14x1    2,046    8 12              22
    mnist28        28x28x1    5,398    8 12 16           42
    mnist28-9k     28x28x1    8,706    8 16 24           49
    mnist28-11k    28x28x1    11,146   8 16 32           52
    cifar16        16x16x3    3,030    8 12              24
    cifar32-4k     32x32x3    3,878    8 12 16           46
    cifar32        32x32x3    9,410    12 16 24         172
    cifar32-30k    32x32x3    30,242   16 32 56         322
    cifar32-60k    32x32x3    59,622   16 32 60 64      355

Ten epochs of Adam (3e-3, cosine decay, batch 128) take mnist28 to 98.9 % of MNIST's test set
and mnist28-11k to 99.1 %.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


class CNN(nn.Module):
    """Convolutions with tanh, each averaged over windows of its own, then one dense layer.

    channels: of each convolution.
    classes: number of outputs.
    windows: width of the average pooling behind each convolution, 1 for none; by default 2.
    strided: False: 3x3 with zero padding throughout. True: first 5x5 in steps of 2, then 3x3, all
        without padding, which costs a half to a third on large images.
    """

    channels: tuple[int, ...]
    classes: int = 10
    windows: tuple[int, ...] | None = None
    strided: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (n, classes) of images (n, height, width, channels)."""
        windows = self.windows or (2,) * len(self.channels)
        for i, (channels, window) in enumerate(zip(self.channels, windows, strict=True)):
            kernel, step = ((5, 5), 2) if self.strided and i == 0 else ((3, 3), 1)
            padding = "VALID" if self.strided else "SAME"
            conv = nn.Conv(channels, kernel, step, padding, param_dtype=jnp.float32)
            x = average(nn.tanh(conv(x)), window)
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(self.classes, param_dtype=jnp.float32)(x)


def average(x: jax.Array, window: int) -> jax.Array:
    """Average pooling; what fills no window is cut off, as in `nn.avg_pool`.

    That one divides by integers: an error under strict promotion. The cost is the same.
    """
    n, height, width, channels = x.shape
    rows, columns = height // window, width // window
    x = x[:, : rows * window, : columns * window]
    return x.reshape(n, rows, window, columns, window, channels).mean((2, 4))


class MLP(nn.Module):
    """Dense layers of the given widths with tanh, then one of logits.

    widths: of the hidden layers; none: multinomial logistic regression.
    classes: number of outputs.
    """

    widths: tuple[int, ...]
    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (n, classes) of inputs (n, ...)."""
        x = x.reshape(x.shape[0], -1)
        for width in self.widths:
            x = nn.tanh(nn.Dense(width, param_dtype=jnp.float32)(x))
        return nn.Dense(self.classes, param_dtype=jnp.float32)(x)


class Member(NamedTuple):
    """A network and the shape of the images it is for."""

    model: CNN
    input_shape: tuple[int, int, int]


FAMILY = {
    "digits": Member(CNN((8, 12)), (8, 8, 1)),
    "mnist14": Member(CNN((8, 12)), (14, 14, 1)),
    "mnist28": Member(CNN((8, 12, 16), windows=(1, 1, 2), strided=True), (28, 28, 1)),
    "mnist28-9k": Member(CNN((8, 16, 24), windows=(1, 1, 2), strided=True), (28, 28, 1)),
    "mnist28-11k": Member(CNN((8, 16, 32), windows=(1, 1, 2), strided=True), (28, 28, 1)),
    "cifar16": Member(CNN((8, 12)), (16, 16, 3)),
    "cifar32-4k": Member(CNN((8, 12, 16), windows=(1, 2, 2), strided=True), (32, 32, 3)),
    "cifar32": Member(CNN((12, 16, 24)), (32, 32, 3)),
    "cifar32-30k": Member(CNN((16, 32, 56)), (32, 32, 3)),
    "cifar32-60k": Member(CNN((16, 32, 60, 64)), (32, 32, 3)),
}
