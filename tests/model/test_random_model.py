"""Random weights of the published shapes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vsurge.model import PUBLISHED, ConfigError, Qwen3Config, num_parameters, random_model
from vsurge.model.params import param_specs

SMALL = Qwen3Config(300, 64, 96, 2, 4, 2, 32, attention_bias=True)

# Totals of the safetensors on the hub; the tied matrix, which 0.6B and 1.7B store twice, counted once.
TOTALS = {
    "Qwen/Qwen3-0.6B": 751_632_384 - 151_936 * 1024,
    "Qwen/Qwen3-1.7B": 2_031_739_904 - 151_936 * 2048,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_shape_has_the_published_number_of_parameters(name):
    assert num_parameters(PUBLISHED[name]) == TOTALS[name]


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    first, again, other = (jax.tree.leaves(random_model(SMALL, seed=seed).params) for seed in (3, 3, 4))
    for a, b, c, spec in zip(first, again, other, jax.tree.leaves(param_specs(SMALL)), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        assert np.array_equal(np.asarray(a), np.asarray(c)) == (a.ndim == 1), spec.name


def test_no_two_matrices_are_alike():
    matrices = [np.asarray(a) for a in jax.tree.leaves(random_model(SMALL, seed=0).params) if a.ndim == 2]
    starts = {matrix[:4, :4].tobytes() for matrix in matrices}
    assert len(starts) == len(matrices) == 2 + 7 * SMALL.num_layers


def test_matrices_deviate_by_the_initializer_range_norms_are_one_and_biases_zero():
    params = random_model(SMALL, seed=0, dtype="float32").params
    for spec, array in zip(jax.tree.leaves(param_specs(SMALL)), jax.tree.leaves(params), strict=True):
        assert array.shape == spec.shape
        values = np.asarray(array)
        if array.ndim == 2:
            assert values.std() == pytest.approx(0.02, rel=0.05)
            assert abs(values.mean()) < 0.002
        else:
            assert (values == (0 if spec.name.endswith("bias") else 1)).all()


def test_dtypes_are_those_asked_for():
    model = random_model(SMALL, seed=0)
    assert {a.dtype for a in jax.tree.leaves(model.params)} == {np.dtype(jnp.bfloat16)}
    assert model.config.dtype == jnp.bfloat16
    model = random_model(SMALL, seed=0, dtype=np.float32, compute_dtype="bfloat16")
    assert {a.dtype for a in jax.tree.leaves(model.params)} == {np.dtype(np.float32)}
    assert model.config.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("seed", "message"),
    [(-1, "^seed=-1: must be at least 0"), (0.5, "^seed=0.5: must be an integer"), (True, "^seed=True: ")],
)
def test_a_seed_that_is_none_is_named(seed, message, no_type_checker):
    with pytest.raises((ValueError, TypeError), match=message):
        random_model(SMALL, seed=seed)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"name_or_config": 8}, "^name_or_config=8: must be the name of a published model or a Qwen3Config"),
        ({"partition_axis": "tp"}, "^partition_axis='tp': must be a PartitionAxis"),
        ({"dtype": None}, "^dtype=None: supported are"),
    ],
)
def test_an_argument_of_another_type_is_named(argument, message, no_type_checker):
    with pytest.raises((ValueError, TypeError), match=message):
        random_model(**{"name_or_config": SMALL, "seed": 0, **argument})


def test_an_unknown_name_is_refused():
    with pytest.raises(ConfigError, match=r"Qwen3-7B.*Qwen/Qwen3-8B"):
        random_model("Qwen/Qwen3-7B", seed=0)
