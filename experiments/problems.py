"""The image problems that claims are measured on: which examples, at which resolution, for which network.

name        examples   input      P        Q
digits         1,437   8x8x1      1,446    9.9
mnist14       60,000   14x14x1    2,046    293
mnist28       60,000   28x28x1    11,146   54
cifar16       20,000   16x16x3    3,030    66
cifar32-4k    50,000   32x32x3    3,878    129
cifar32       50,000   32x32x3    9,410    53

Every channel of the inputs has mean 0 and variance 1 over the training examples.
"""

import dataclasses
import functools
from typing import Any

import jax
from sklearn.preprocessing import StandardScaler

from experiments.data import downsample, load
from experiments.models import FAMILY
from experiments.runs import Arrays, Price, count, gradient_flops
from subsetopt import overdetermination_ratio


@dataclasses.dataclass(frozen=True)
class Problem:
    """Classify images with a network of the family.

    images: name of the data set. model: name in the family. examples: the first so many of the training set; None:
    all. window: pixels averaged in each direction. tests: examples of the test set, None: all.
    """

    images: str
    model: str
    examples: int | None = None
    window: int = 1
    tests: int | None = None

    @property
    def network(self) -> Any:
        """The flax module."""
        return FAMILY[self.model].model

    @property
    def train(self) -> Arrays:
        """Images and labels to train on."""
        return self._splits["train"]

    @property
    def test(self) -> Arrays:
        """Images and labels to test on."""
        return self._splits["test"]

    @functools.cached_property
    def price(self) -> Price:
        """What gradients cost here."""
        return Price(len(self.train[0]), gradient_flops(self.network, self.train[0].shape[1:]))

    @functools.cached_property
    def parameters(self) -> int:
        """P."""
        return count(self.network.init(jax.random.key(0), self.train[0][:1])["params"])

    def config(self) -> dict[str, Any]:
        """What records say of it."""
        examples, parameters, outputs = self.price.examples, self.parameters, self.network.classes
        found = {"examples": examples, "shape": self.train[0].shape[1:], "parameters": parameters, "outputs": outputs}
        found |= {"ratio": overdetermination_ratio(examples, outputs, parameters), "network": repr(self.network)}
        return dataclasses.asdict(self) | found | {"inputs": "standardised by channel"}

    def tiny(self) -> "Problem":
        """So few examples that a run takes seconds."""
        return dataclasses.replace(self, examples=300, tests=300)

    @functools.cached_property
    def _splits(self) -> dict[str, Arrays]:
        """Without standardised inputs all methods are slower, first-order training most of all."""
        scaler = StandardScaler()
        ways = {"train": (self.examples, scaler.fit_transform), "test": (self.tests, scaler.transform)}
        splits = {}
        for split, (n, scaled) in ways.items():
            x, y = load(self.images, split)
            x = downsample(x[:n], self.window)
            splits[split] = scaled(x.reshape(-1, x.shape[-1])).reshape(x.shape), y[:n]
        return splits


PROBLEMS = {
    "digits": Problem("digits", "digits"),
    "mnist14": Problem("mnist", "mnist14", window=2),
    "mnist28": Problem("mnist", "mnist28-11k"),
    "cifar16": Problem("cifar10", "cifar16", examples=20_000, window=2),
    "cifar32-4k": Problem("cifar10", "cifar32-4k"),
    "cifar32": Problem("cifar10", "cifar32"),
}
