"""Named streams: stable keys, independent of one another, the same under jit and vmap."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pmoe_jax.errors import PmoeError
from pmoe_jax.streams import STREAMS, stream_key


def data(key):
    return np.asarray(jax.random.key_data(key))


def test_keys_are_these_for_ever():
    # A changed value would silently change every published run.
    assert STREAMS == ("init", "poison", "trigger", "order")
    assert data(stream_key(0, "init")).tolist() == [3020537540, 2946840664]
    assert data(stream_key(7, "order")).tolist() == [3183410677, 1073741952]


def test_streams_and_seeds_differ():
    keys = {tuple(data(stream_key(seed, name))) for seed in range(5) for name in STREAMS}
    assert len(keys) == 5 * len(STREAMS)


class StreamVariants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_a_traced_seed_gives_the_same_key(self):
        for name in STREAMS:
            key = self.variant(lambda seed, name=name: stream_key(seed, name))(jnp.int32(3))
            np.testing.assert_array_equal(data(key), data(stream_key(3, name)))

    @chex.variants(with_jit=True, without_jit=True)
    def test_vmapped_equals_alone(self):
        seeds = jnp.array([0, 5, 2**31 - 1], jnp.int32)
        draw = jax.vmap(lambda seed: jax.random.normal(stream_key(seed, "init"), (3,)))
        draws = self.variant(draw)(seeds)
        for seed, drawn in zip(seeds.tolist(), draws, strict=True):
            alone = jax.random.normal(stream_key(seed, "init"), (3,))
            np.testing.assert_array_equal(drawn, alone)


def test_keys_do_not_depend_on_the_precision():
    keys = [data(stream_key(seed, "order")) for seed in (1, 2**31 - 1)]
    with jax.enable_x64(True):
        wide = [data(stream_key(jnp.int64(seed), "order")) for seed in (1, 2**31 - 1)]
    np.testing.assert_array_equal(keys, wide)


@pytest.mark.parametrize("seed", [-1, 2**31])
def test_seed_out_of_range(seed):
    with pytest.raises(PmoeError, match=r"seed .* out of range"):
        stream_key(seed, "init")


def test_unknown_name():
    with pytest.raises(PmoeError, match="unknown stream 'augment': use one of init, poison"):
        stream_key(0, "augment")
