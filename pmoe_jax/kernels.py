"""Convolution and batch norm, each with one entry point and a fast form per backend.

Axes: B batch, H W image, C channel (Cin, Cout of a convolution).

`implementation="plain"` is the XLA form; `"auto"` takes the form that was measured to be fastest on
the backend the program is lowered for (`_select`). All forms compute the same function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pmoe_jax import winograd
from pmoe_jax.errors import PmoeError

IMPLEMENTATIONS = ("auto", "plain")
Array = jax.Array


def compiler_options(backend: str) -> dict[str, Any]:
    """Options for `jax.jit(..., compiler_options=...)` of programs with convolutions.

    Args:
      backend: platform the program is compiled for: "cpu", "gpu", "tpu", ...
    """
    if backend != "cpu":
        return {}
    return {
        # YNNPACK, the default library for dots and convolutions, is half as fast here as Eigen.
        "xla_cpu_experimental_ynn_fusion_type": "",
        # Keeps optimization barriers until code is emitted (`_cpu_conv_grads` says what for).
        "xla_disable_hlo_passes": "cse_barrier_expander",
    }


def options_of_init(backend: str) -> dict[str, Any]:
    """The same for the program that initialises, which runs once and is mostly random numbers.

    Optimised as usual its compilation takes longer than that of a training step: 9.4 instead of 1.6
    CPU seconds for two members of width 1, with the same bits.
    """
    return {"xla_backend_optimization_level": 1} if backend == "cpu" else {}


def conv(x: Array, kernel: Array, *, stride: int = 1, implementation: str = "auto") -> Array:
    """Convolution without bias, padded as TensorFlow's "SAME".

    Args:
      x: [B, H, W, Cin].
      kernel: [size, size, Cin, Cout], same dtype as `x`.
      stride: step in both directions.
      implementation: "auto" or "plain".

    Returns:
      [B, ceil(H / stride), ceil(W / stride), Cout].

    Raises:
      PmoeError: unknown implementation.
    """
    _check(implementation)
    if implementation == "plain":
        return _plain_conv(x, kernel, stride)
    return _conv(x, kernel, stride)


@jax.custom_vjp
def add_bias(x: Array, bias: Array) -> Array:
    """x [..., C] + bias [C]; the bias's gradient is summed as batch norm's sums are."""
    return x + bias


add_bias.defvjp(lambda x, bias: (x + bias, None), lambda _, grad: (grad, _channel_sums(grad)))


def batch_norm(
    x: Array,
    scale: Array,
    bias: Array,
    *,
    epsilon: float = 1e-3,
    relu: bool = False,
    implementation: str = "auto",
    axis_name: str | None = None,
) -> tuple[Array, Array, Array]:
    """Batch norm by the batch's own statistics over all axes but the last.

    Args:
      x: [..., C].
      scale, bias: [C], the statistics' dtype.
      epsilon: added to the variance.
      relu: clip the result at zero.
      implementation: "auto" or "plain".
      axis_name: mesh axis over which the batch is spread in equal parts; `x` is then one part, the
        statistics are those of the whole batch.

    Returns:
      y like `x`; mean and biased variance [C], meant for running statistics: gradients flow through
      y only, those of mean and variance are taken as zero.

    Raises:
      PmoeError: unknown implementation.
    """
    _check(implementation)
    if implementation == "plain":
        return _plain_batch_norm(x, scale, bias, epsilon, relu, axis_name)
    return _batch_norm(x, scale, bias, epsilon, relu, axis_name)


def over_devices(sums: Any, axis_name: str | None) -> Any:
    """Sums of a part of the batch, added up over the devices that have the other parts."""
    return sums if axis_name is None else lax.psum(sums, axis_name)


def devices_along(axis_name: str | None) -> int:
    """How many devices share a batch."""
    return 1 if axis_name is None else lax.axis_size(axis_name)


def _check(implementation: str) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise PmoeError(
            f"implementation={implementation!r} is unknown; choose one of {IMPLEMENTATIONS}"
        )


def _select(
    fast: Callable[..., Any], plain: Callable[..., Any], *args: Array, **kwargs: Any
) -> Any:
    """The fast form where it was measured (CPU), the plain XLA form on every other platform.

    Decided when the program is lowered, so that `jax.export` for a GPU on a CPU machine is right.
    """
    return lax.platform_dependent(
        *args, cpu=partial(fast, **kwargs), default=partial(plain, **kwargs)
    )


def _plain_conv(x: Array, kernel: Array, stride: int) -> Array:
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(x: Array, kernel: Array, stride: int) -> Array:
    return _select(_cpu_conv, _plain_conv, x, kernel, stride=stride)


def _conv_forward(x: Array, kernel: Array, stride: int) -> Any:
    return _conv(x, kernel, stride), (x, kernel)


def _conv_backward(stride: int, residuals: Any, grad: Array) -> Any:
    return _select(_cpu_conv_grads, _plain_conv_grads, *residuals, grad, stride=stride)


_conv.defvjp(_conv_forward, _conv_backward)


def _plain_conv_grads(x: Array, kernel: Array, grad: Array, stride: int) -> Any:
    return jax.vjp(partial(_plain_conv, stride=stride), x, kernel)[1](grad)


def _cpu_conv(x: Array, kernel: Array, stride: int) -> Array:
    if kernel.shape[:2] == (1, 1):  # a dot, because its weight gradient is a dot, too
        return jnp.einsum("bhwc,cf->bhwf", x[:, ::stride, ::stride], kernel[0, 0])
    if _wide(x, kernel, stride):
        return winograd.conv(x, kernel)
    return _per_member(_plain_conv, stride)(x, kernel)


def _cpu_conv_grads(x: Array, kernel: Array, grad: Array, stride: int) -> Any:
    # The weight gradient transposes both tensors. Without the barrier XLA computes the batch norms
    # that made them again inside the transposition, element by element.
    x, grad = lax.optimization_barrier((x, grad))
    if kernel.shape[:2] == (1, 1):
        # One dot an image, then their sum: one dot over all images would transpose both operands
        # first (2 to 6 times slower).
        grad_x = jax.vjp(lambda x: _cpu_conv(x, kernel, stride), x)[1](grad)[0]
        taken = x[:, ::stride, ::stride].reshape(x.shape[0], -1, x.shape[-1])
        flat = grad.reshape(grad.shape[0], -1, grad.shape[-1])
        return grad_x, jnp.einsum("bnc,bnf->bcf", taken, flat).sum(0)[None, None]
    if _wide(x, kernel, stride):
        return winograd.grads(x, kernel, grad)
    return _per_member(_plain_conv_grads, stride)(x, kernel, grad)


def _wide(x: Array, kernel: Array, stride: int) -> bool:
    """Whether Winograd's form is faster than XLA's on CPUs (docs/performance.md)."""
    fits = kernel.shape[:2] == (3, 3) and stride == 1 and min(x.shape[1:3]) >= 4 * winograd.TILE
    return fits and min(kernel.shape[2:]) >= 128 and x.dtype != jnp.bfloat16


@functools.cache
def _per_member(function: Callable[..., Any], stride: int) -> Any:
    """`function`, computed once a member under vmap.

    XLA makes one grouped convolution of a vmapped one, which is several times slower on CPUs.
    """
    alone = jax.custom_batching.custom_vmap(partial(function, stride=stride))

    @alone.def_vmap
    def members(size: int, batched: Sequence[bool], *args: Array) -> tuple[Any, Any]:
        results = [
            alone(*(arg[m] if has else arg for arg, has in zip(args, batched, strict=True)))
            for m in range(size)
        ]
        stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *results)
        return stacked, jax.tree.map(lambda _: True, stacked)

    return alone


def _plain_batch_norm(
    x: Array, scale: Array, bias: Array, epsilon: float, relu: bool, axis_name: str | None
) -> tuple[Array, Array, Array]:
    axes = tuple(range(x.ndim - 1))
    wide = x.astype(scale.dtype)
    if axis_name is None:
        mean, var = wide.mean(axes), wide.var(axes)
    else:
        mean = lax.pmean(wide.mean(axes), axis_name)
        var = lax.pmean(jnp.square(wide - mean).mean(axes), axis_name)
    y = ((wide - mean) * (scale * lax.rsqrt(var + epsilon)) + bias).astype(x.dtype)
    return jax.nn.relu(y) if relu else y, lax.stop_gradient(mean), lax.stop_gradient(var)


def _channel_sums(*xs: Array) -> Any:
    """Sums over all axes but the last."""
    sums = _select(_dot_sums, _plain_sums, *xs)
    return sums if len(xs) > 1 else sums[0]


def _plain_sums(*xs: Array) -> tuple[Array, ...]:
    return tuple(x.sum(tuple(range(x.ndim - 1))) for x in xs)


def _dot_sums(*xs: Array) -> tuple[Array, ...]:
    """XLA:CPU runs a sum over leading axes ten times slower than a product with a row of ones."""

    def total(x: Array) -> Array:
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        ones = jnp.ones((x.shape[0], 1, x.shape[1]), x.dtype)
        return jnp.einsum("bon,bnc->bc", ones, x).sum(0)

    return tuple(total(x) for x in xs)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _batch_norm(
    x: Array, scale: Array, bias: Array, epsilon: float, relu: bool, axis_name: str | None
) -> tuple[Array, Array, Array]:
    return _batch_norm_forward(x, scale, bias, epsilon, relu, axis_name)[0]


def _batch_norm_forward(
    x: Array, scale: Array, bias: Array, epsilon: float, relu: bool, axis_name: str | None
) -> Any:
    if axis_name is None:
        y, mean, var = _select(
            _cpu_batch_norm, _plain_batch_norm, x, scale, bias,
            epsilon=epsilon, relu=relu, axis_name=None,
        )  # fmt: skip
    else:  # Only this form was tried with a batch that is spread over devices.
        y, mean, var = _cpu_batch_norm(x, scale, bias, epsilon, relu, axis_name)
    return (y, mean, var), (x, scale, bias, mean, var)


def _batch_norm_backward(
    epsilon: float, relu: bool, axis_name: str | None, residuals: Any, cotangents: Any
) -> Any:
    if axis_name is None:
        return _select(
            _cpu_batch_norm_grads, _plain_batch_norm_grads, *residuals, cotangents[0],
            epsilon=epsilon, relu=relu, axis_name=None,
        )  # fmt: skip
    x, scale, bias, mean, var = residuals
    grad = cotangents[0]
    return _cpu_batch_norm_grads(x, scale, bias, mean, var, grad, epsilon, relu, axis_name)


def _plain_batch_norm_grads(
    x: Array, scale: Array, bias: Array, mean: Array, var: Array, grad: Array,
    epsilon: float, relu: bool, axis_name: None,
) -> Any:  # fmt: skip
    del mean, var, axis_name

    def normed(x: Array, scale: Array, bias: Array) -> Array:
        return _plain_batch_norm(x, scale, bias, epsilon, relu, None)[0]

    return jax.vjp(normed, x, scale, bias)[1](grad)


def _cpu_batch_norm(
    x: Array, scale: Array, bias: Array, epsilon: float, relu: bool, axis_name: str | None
) -> tuple[Array, Array, Array]:
    wide = x.astype(scale.dtype)
    count = x.size // x.shape[-1] * devices_along(axis_name)
    mean = over_devices(_channel_sums(wide), axis_name) / count
    # Around the mean, since E[x^2] - E[x]^2 would cancel.
    var = over_devices(_channel_sums(jnp.square(wide - mean)), axis_name) / count
    factor = scale * lax.rsqrt(var + epsilon)
    y = (wide * factor + (bias - mean * factor)).astype(x.dtype)
    return jax.nn.relu(y) if relu else y, mean, var


def _cpu_batch_norm_grads(
    x: Array, scale: Array, bias: Array, mean: Array, var: Array, grad: Array,
    epsilon: float, relu: bool, axis_name: str | None,
) -> Any:  # fmt: skip
    grad = grad.astype(scale.dtype)
    inverse = lax.rsqrt(var + epsilon)
    normalised = (x.astype(scale.dtype) - mean) * inverse
    if relu:
        grad = jnp.where(normalised * scale + bias > 0, grad, 0)
    # Gradients in the parameters are those of this device's part, as all gradients are until the
    # step adds them up; the gradient in x depends on the whole batch through the statistics.
    own_bias, own_scale = _channel_sums(grad, grad * normalised)
    grad_bias, grad_scale = over_devices((own_bias, own_scale), axis_name)
    count = x.size // x.shape[-1] * devices_along(axis_name)
    grad_x = scale * inverse * (grad - (grad_bias + normalised * grad_scale) / count)
    return grad_x.astype(x.dtype), own_scale, own_bias


_batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)
