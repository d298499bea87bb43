"""Every fast form equals the plain XLA form: values and gradients, float32 and float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from pmoe_jax import kernels, winograd
from pmoe_jax.errors import PmoeError

TOLERANCE = {np.float32: 2e-5, np.float64: 1e-11}
CONVOLUTIONS = [  # size, stride, side, Cin, Cout
    (1, 1, 6, 5, 7),
    (1, 2, 6, 5, 7),
    (1, 2, 5, 5, 7),
    (3, 1, 8, 3, 16),
    (3, 1, 5, 16, 16),
    (3, 2, 8, 16, 32),
    (3, 2, 5, 6, 4),
    (3, 1, 16, 128, 132),  # wide: Winograd's form
    (3, 1, 18, 130, 128),  # the same with tiles that overhang
]


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param is np.float64):
        yield request.param


def close(actual, expected, dtype):
    actual, expected = np.asarray(actual), np.asarray(expected)
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(actual / scale, expected / scale, atol=TOLERANCE[dtype], rtol=0)


def draw(seed, *shapes, dtype):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def value_and_grads(f, *args, weight):
    def loss(*args):
        y = f(*args)
        return (y * weight).sum(), y

    (_, y), grads = jax.jit(
        jax.value_and_grad(loss, argnums=tuple(range(len(args))), has_aux=True),
        compiler_options=kernels.compiler_options("cpu"),
    )(*args)
    return (y, *grads)


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("members", [0, 2])
def test_conv_equals_the_plain_form(case, members, dtype):
    size, stride, side, before, after = case
    lead = (members,) if members else ()
    out = -(-side // stride)
    x, kernel, weight = draw(
        0,
        (*lead, 4, side, side, before),
        (*lead, size, size, before, after),
        (*lead, 4, out, out, after),
        dtype=dtype,
    )
    results = []
    for implementation in ("auto", "plain"):
        f = partial(kernels.conv, stride=stride, implementation=implementation)
        results.append(value_and_grads(jax.vmap(f) if members else f, x, kernel, weight=weight))
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == dtype
        close(actual, expected, dtype)


def test_wide_layers_take_winograds_form_on_the_cpu():
    x, kernel = jnp.ones((1, 16, 16, 128)), jnp.ones((3, 3, 128, 128))
    assert "convolution" not in jax.jit(kernels.conv).lower(x, kernel).as_text()
    assert "convolution" in jax.jit(kernels.conv).lower(x, kernel[..., :127]).as_text()


def test_winograd_by_hand():
    # A kernel that only copies the pixel to the right of the centre: the image moves to the left.
    x = jnp.arange(2 * 6 * 5.0).reshape(1, 6, 5, 2)
    kernel = jnp.zeros((3, 3, 2, 2)).at[1, 2].set(jnp.eye(2))
    moved = jnp.concatenate([x[:, :, 1:], jnp.zeros((1, 6, 1, 2))], 2)
    np.testing.assert_allclose(winograd.conv(x, kernel), moved, atol=1e-4)


@pytest.mark.parametrize("height, width", [(17, 20), (19, 16), (16, 21)])
def test_winograd_of_any_size_equals_the_plain_form(height, width, dtype):
    x, kernel, weight = draw(
        5, (1, height, width, 3), (3, 3, 3, 4), (1, height, width, 4), dtype=dtype
    )
    plain = partial(kernels.conv, implementation="plain")
    y, grad_x, grad_kernel = value_and_grads(plain, x, kernel, weight=weight)
    close(winograd.conv(x, kernel), y, dtype)
    for actual, expected in zip(
        winograd.grads(x, kernel, weight), (grad_x, grad_kernel), strict=True
    ):
        close(actual, expected, dtype)


@pytest.mark.parametrize("shared", [0, 1], ids=["images", "kernel"])
def test_members_may_share_in_wide_layers(shared):
    x, kernel = draw(3, (2, 1, 16, 16, 128), (2, 3, 3, 128, 128), dtype=np.float32)
    args, axes = [x, kernel], [0, 0]
    args[shared], axes[shared] = args[shared][0], None
    together = jax.jit(jax.vmap(kernels.conv, in_axes=axes))(*args)
    plain = partial(kernels.conv, implementation="plain")
    close(together, jax.vmap(plain, in_axes=axes)(*args), np.float32)


@pytest.mark.parametrize("shared", [0, 1], ids=["images", "kernel"])
def test_members_may_share_the_images_or_the_kernel(shared):
    x, kernel = draw(3, (2, 2, 6, 6, 3), (2, 3, 3, 3, 4), dtype=np.float32)
    args = [x, kernel]
    args[shared] = args[shared][0]
    axes = [0, 0]
    axes[shared] = None
    together = jax.jit(jax.vmap(kernels.conv, in_axes=axes))(*args)
    for m in range(2):
        alone = kernels.conv(
            *(a if axis is None else a[m] for a, axis in zip(args, axes, strict=True))
        )
        close(together[m], alone, np.float32)


def test_members_make_no_grouped_convolution_on_the_cpu():
    x, kernel = draw(3, (2, 2, 6, 6, 3), (2, 3, 3, 3, 4), dtype=np.float32)

    def loss(x, kernel):
        return (kernels.conv(x, kernel) ** 2).sum()

    step = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1))))
    text = step.lower(x, kernel).compile(kernels.compiler_options("cpu")).as_text()
    assert "convolution" in text
    assert "feature_group_count" not in text


def test_conv_pads_as_tensorflow():
    # 2x2 image, stride 2, kernel of ones: SAME pads one row and column behind, none in front.
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    y = kernels.conv(x, jnp.ones((3, 3, 1, 1)), stride=2)
    expected = [[0 + 1 + 2 + 4 + 5 + 6 + 8 + 9 + 10, 2 + 3 + 6 + 7 + 10 + 11], [66, 50]]
    np.testing.assert_allclose(y[0, :, :, 0], [expected[0], [8 + 9 + 10 + 12 + 13 + 14, 50]])


def test_batch_norm_by_hand():
    # Two values a channel: (1, 3) has mean 2 and variance 1, (0, 4) mean 2 and variance 4.
    x = jnp.array([[1.0, 0.0], [3.0, 4.0]])
    for implementation in kernels.IMPLEMENTATIONS:
        y, mean, var = kernels.batch_norm(
            x,
            jnp.array([1.0, 2.0]),
            jnp.array([0.5, 0.0]),
            epsilon=0.0,
            relu=True,
            implementation=implementation,
        )
        np.testing.assert_allclose(y, [[0.0, 0.0], [1.5, 2.0]], atol=1e-6)
        np.testing.assert_allclose((mean, var), ([2.0, 2.0], [1.0, 4.0]), atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 6, 6, 5), (8, 3)], ids=str)
def test_add_bias_equals_addition(shape, dtype):
    x, bias, weight = draw(5, shape, shape[-1:], shape, dtype=dtype)
    results = [value_and_grads(f, x, bias, weight=weight) for f in (kernels.add_bias, jnp.add)]
    for actual, expected in zip(*results, strict=True):
        close(actual, expected, dtype)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", [(4, 8, 8, 16), (3, 5, 5, 7), (32, 3)], ids=str)
@pytest.mark.parametrize("members", [0, 2])
def test_batch_norm_equals_the_plain_form(shape, relu, members, dtype):
    lead = (members,) if members else ()
    channels = shape[-1]
    x, scale, bias, weight = draw(
        1, (*lead, *shape), (*lead, channels), (*lead, channels), (*lead, *shape), dtype=dtype
    )
    x = 3 * x + 2  # a mean away from zero: a cancelling variance would show

    def fast(x, scale, bias):
        return kernels.batch_norm(x, scale, bias, relu=relu)

    def plain(x, scale, bias):
        return kernels.batch_norm(x, scale, bias, relu=relu, implementation="plain")

    batched = jax.vmap if members else lambda f: f
    for actual, expected in zip(
        batched(fast)(x, scale, bias), batched(plain)(x, scale, bias), strict=True
    ):
        close(actual, expected, dtype)
    results = [
        value_and_grads(batched(lambda *args, f=f: f(*args)[0]), x, scale, bias, weight=weight)
        for f in (fast, plain)
    ]
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == dtype
        close(actual, expected, dtype)


@pytest.mark.parametrize("implementation", kernels.IMPLEMENTATIONS)
def test_bfloat16_keeps_its_dtype_and_float32_statistics(implementation):
    x, kernel = draw(2, (2, 6, 6, 4), (3, 3, 4, 8), dtype=jnp.bfloat16)
    y = kernels.conv(x, kernel, implementation=implementation)
    normed, mean, var = kernels.batch_norm(
        y, jnp.ones(8), jnp.zeros(8), implementation=implementation
    )
    assert (y.dtype, normed.dtype, mean.dtype, var.dtype) == (
        jnp.bfloat16,
        jnp.bfloat16,
        jnp.float32,
        jnp.float32,
    )


def test_bfloat16_batch_norm_rounds_once():
    x, scale, bias = draw(6, (4, 8, 8, 4), (4,), (4,), dtype=np.float32)
    x = (x + 10).astype(jnp.bfloat16)
    exact = kernels.batch_norm(x.astype(np.float32), scale, bias)[0]
    y = kernels.batch_norm(x, scale, bias)[0]
    np.testing.assert_allclose(y.astype(np.float32), exact, rtol=2**-8, atol=1e-3)


def test_other_platforms_get_the_plain_form():
    def f(x, kernel, wide, point, scale, bias):
        y = kernels.conv(kernels.conv(x, kernel), wide)
        y = kernels.conv(y, point, stride=2)
        return kernels.batch_norm(y, scale, bias, relu=True)[0].sum()

    shapes = (2, 16, 16, 4), (3, 3, 4, 128), (3, 3, 128, 128), (1, 1, 128, 8), (8,), (8,)
    args = draw(3, *shapes, dtype=np.float32)
    grads = jax.jit(jax.grad(f, argnums=(1, 2, 3, 4)))
    texts = {
        platform: export.export(grads, platforms=[platform])(*args).mlir_module()
        for platform in ("cpu", "cuda", "tpu")
    }
    # What the fast forms are made of: the CPU has them, the others do not.
    for mark in ("stablehlo.dot_general", "optimization_barrier"):
        assert mark in texts["cpu"]
        assert mark not in texts["cuda"]
        assert mark not in texts["tpu"]
    assert texts["cuda"].count("stablehlo.convolution") == 8  # 3 forward, 5 backward


def test_unknown_implementation_is_a_clear_error():
    x, kernel = draw(4, (1, 4, 4, 2), (1, 1, 2, 2), dtype=np.float32)
    with pytest.raises(PmoeError, match=r"quick.*auto.*plain"):
        kernels.conv(x, kernel, implementation="quick")
    with pytest.raises(PmoeError, match="quick"):
        kernels.batch_norm(x, x[0, 0, 0], x[0, 0, 0], implementation="quick")


def test_compiler_options_are_for_the_cpu_only():
    assert kernels.compiler_options("cpu")
    assert not kernels.compiler_options("gpu")
    assert not kernels.compiler_options("tpu")
