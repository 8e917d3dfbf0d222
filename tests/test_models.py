import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import models
from experiments.models import CNN, FAMILY, MLP

PARAMETERS = {
    "digits": 1_446,
    "mnist14": 2_046,
    "mnist28": 5_398,
    "mnist28-9k": 8_706,
    "mnist28-11k": 11_146,
    "cifar16": 3_030,
    "cifar32-4k": 3_878,
    "cifar32": 9_410,
    "cifar32-30k": 30_242,
    "cifar32-60k": 59_622,
}
OTHERS = {
    "one convolution": (CNN((3,), classes=4), (6, 6, 2)),
    "no hidden layer": (MLP((), classes=4), (6, 6, 2)),
    "two hidden layers": (MLP((5, 3), classes=4), (7,)),
}
ALL = {**FAMILY, **OTHERS}


def images(shape: tuple[int, ...], n: int = 3) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (n, *shape))


@functools.cache
def shapes(name: str) -> dict:
    """The variables of a model, without their values."""
    model, shape = ALL[name]
    return dict(jax.eval_shape(model.init, jax.random.key(1), images(shape)))


def drawn(name: str) -> dict:
    """Variables drawn by NumPy: compiling the random numbers of `init` takes seconds."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda v: rng.normal(0, 0.3, v.shape).astype(v.dtype), shapes(name))


def test_every_member_is_counted():
    assert FAMILY.keys() == PARAMETERS.keys()


@pytest.mark.parametrize("name", FAMILY)
def test_member_has_the_parameters_that_the_docstring_tells(name: str):
    model, shape = FAMILY[name]
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes(name)))
    assert count == PARAMETERS[name]
    (row,) = [line for line in str(models.__doc__).splitlines() if line.split()[:1] == [name]]
    assert row.split()[1:3] == ["x".join(map(str, shape)), f"{count:,}"]
    assert " ".join(map(str, model.channels)) in " ".join(row.split())


@pytest.mark.parametrize("name", ALL)
def test_outputs_are_one_row_of_logits_for_each_example(name: str):
    model, shape = ALL[name]
    logits = jax.eval_shape(model.apply, shapes(name), images(shape, 5))
    assert (logits.shape, logits.dtype) == ((5, model.classes), jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes(name))} == {np.dtype("float32")}


@pytest.mark.parametrize("name", ["digits", "mnist28", *OTHERS])
def test_model_keeps_no_state_and_draws_nothing(name: str):
    model, shape = ALL[name]
    variables = drawn(name)
    apply = jax.jit(model.apply)
    assert variables.keys() == {"params"}
    np.testing.assert_array_equal(apply(variables, images(shape)), apply(variables, images(shape)))


@pytest.mark.parametrize("name", ["digits", "mnist28", *OTHERS])
def test_examples_do_not_mix(name: str):
    model, shape = ALL[name]
    variables, apply = drawn(name), jax.jit(model.apply)
    x = images(shape, 4)
    one_by_one = [apply(variables, x[i : i + 1]) for i in range(4)]
    np.testing.assert_allclose(apply(variables, x), jnp.concatenate(one_by_one), atol=1e-5)


@pytest.mark.parametrize("name", ["digits", "mnist28"])
def test_every_parameter_moves_the_logits(name: str):
    model, shape = ALL[name]
    variables = drawn(name)

    @jax.jit
    def gradient(variables: dict, x: jax.Array):
        return jax.grad(lambda v: jnp.sum(jnp.asarray(model.apply(v, x)) ** 2))(variables)

    leaves = jax.tree.leaves(gradient(variables, images(shape)))
    assert all(bool(jnp.all(leaf != 0)) for leaf in leaves)


@pytest.mark.parametrize(("size", "window"), [(6, 1), (6, 2), (7, 2), (7, 3)])
def test_average_is_the_one_of_flax(size: int, window: int):
    x = images((size, size + 1, 2))
    with jax.numpy_dtype_promotion("standard"):
        expected = nn.avg_pool(x, (window, window), (window, window))
    np.testing.assert_allclose(models.average(x, window), expected, rtol=1e-5, atol=1e-6)


def test_windows_must_be_as_many_as_channels():
    model = CNN((8, 12), windows=(2,))
    with pytest.raises(ValueError, match="zip"):
        jax.eval_shape(model.init, jax.random.key(0), images((8, 8, 1)))
