"""3x3 convolutions by Winograd's minimal filtering F(4x4, 3x3), for wide layers on CPUs.

A tile of 4x4 outputs needs 36 products a channel pair instead of 144 (Lavin and Gray, "Fast
algorithms for convolutional neural networks", 2016, section 4):

    y = A' [ (G k G') * (B' d B) ] A        d: the 6x6 inputs of a tile, k: the kernel

Summed over channels, the products at each of the 36 points (i, j) are one matrix product
[tiles, C] x [C, F], which also stays one (batched) product under vmap. In float32 the result is
about 1e-5 (relative to the largest output) from the direct form.

Axes: B batch, H W image, T tiles along H, U tiles along W, C input and F output channel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array

TILE = 4
#: Input transform B', from 6 input positions to 6 points.
_INPUT = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
#: Kernel transform G, from 3 taps to 6 points.
_KERNEL = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24
#: Output transform A', from 6 points to 4 outputs.
_OUTPUT = np.array(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
)
_POINTS = range(len(_INPUT))


def conv(x: Array, kernel: Array) -> Array:
    """Convolution of stride 1 with "SAME" padding.

    Args:
      x: [B, H, W, C].
      kernel: [3, 3, C, F].

    Returns:
      [B, H, W, F].
    """
    batch, height, width, _ = x.shape
    taps = _kernel_points(kernel)
    points = {
        (i, j): jnp.einsum("btuc,cf->btuf", inputs, taps[i, j]) for i, j, inputs in _input_points(x)
    }
    rows = [
        [_combine(weights, [points[i, j] for i in _POINTS]) for j in _POINTS] for weights in _OUTPUT
    ]
    outputs = [jnp.stack([_combine(weights, row) for weights in _OUTPUT], axis=3) for row in rows]
    stacked = jnp.stack(outputs, axis=2)  # [B, T, 4, U, 4, F]
    tiles_h, tiles_w = stacked.shape[1], stacked.shape[3]
    full = stacked.reshape(batch, TILE * tiles_h, TILE * tiles_w, -1)
    return full[:, :height, :width]


def grads(x: Array, kernel: Array, grad: Array) -> tuple[Array, Array]:
    """Gradients of `conv` in its arguments.

    Args:
      x, kernel: as for `conv`.
      grad: [B, H, W, F], gradient in the result.
    """
    flipped = jnp.swapaxes(kernel[::-1, ::-1], 2, 3)
    return conv(grad, flipped), _kernel_grad(x, grad)


def _kernel_grad(x: Array, grad: Array) -> Array:
    # Tiles in one axis: XLA:CPU would transpose both tensors before a sum over three of them.
    products = [
        jnp.einsum("nc,nf->cf", _flat(inputs), _flat(outputs))
        for (_, _, inputs), outputs in zip(_input_points(x), _output_points(grad), strict=True)
    ]
    points = jnp.stack(products).reshape(len(_POINTS), len(_POINTS), *products[0].shape)
    taps = jnp.asarray(_KERNEL, x.dtype)
    return jnp.einsum("ia,jb,ijcf->abcf", taps, taps, points)


def _kernel_points(kernel: Array) -> Array:
    """G k G': [6, 6, C, F]."""
    taps = jnp.asarray(_KERNEL, kernel.dtype)
    return jnp.einsum("ia,jb,abcf->ijcf", taps, taps, kernel)


def _input_points(x: Array) -> Iterator[tuple[int, int, Array]]:
    """B' d B: (i, j, [B, T, U, C]) of every point, row by row."""
    batch, height, width, channels = x.shape
    tiles_h, tiles_w = -(-height // TILE), -(-width // TILE)
    # One position before and up to three behind the tiles, so that it cuts into groups of four.
    below = TILE * (tiles_h + 1) - height - 1
    right = TILE * (tiles_w + 1) - width - 1
    padded = jnp.pad(x, ((0, 0), (1, below), (1, right), (0, 0)))
    rows = _windows(padded.reshape(batch, tiles_h + 1, TILE, -1, channels), axis=1)
    # Kept apart by a barrier: fused, all 36 points would start from the rows again.
    for i, row in enumerate(lax.optimization_barrier([_combine(w, rows) for w in _INPUT])):
        columns = _windows(row.reshape(batch, tiles_h, tiles_w + 1, TILE, channels), axis=2)
        for j, weights in enumerate(_INPUT):
            yield i, j, _combine(weights, columns)


def _output_points(grad: Array) -> Iterator[Array]:
    """A y A': [B, T, U, F] of every point, row by row; the output transform's transpose."""
    batch, height, width, channels = grad.shape
    below, right = -height % TILE, -width % TILE
    if below or right:
        grad = jnp.pad(grad, ((0, 0), (0, below), (0, right), (0, 0)))
    tiles_h, tiles_w = grad.shape[1] // TILE, grad.shape[2] // TILE
    groups = grad.reshape(batch, tiles_h, TILE, -1, channels)
    rows = [groups[:, :, a] for a in range(TILE)]
    for row in lax.optimization_barrier([_combine(w, rows) for w in _OUTPUT.T]):
        groups = row.reshape(batch, tiles_h, tiles_w, TILE, channels)
        columns = [groups[:, :, :, a] for a in range(TILE)]
        for weights in _OUTPUT.T:
            yield _combine(weights, columns)


def _windows(groups: Array, axis: int) -> list[Array]:
    """The six positions of each tile, from groups of four positions along `axis`, `axis + 1`."""
    tiles = groups.shape[axis] - 1
    own = lax.slice_in_dim(groups, 0, tiles, axis=axis)
    after = lax.slice_in_dim(groups, 1, tiles + 1, axis=axis)
    parts = [(own, a) for a in range(TILE)] + [(after, a) for a in range(len(_POINTS) - TILE)]
    return [lax.index_in_dim(part, a, axis + 1, keepdims=False) for part, a in parts]


def _flat(x: Array) -> Array:
    """[..., C] -> [n, C]."""
    return x.reshape(-1, x.shape[-1])


def _combine(weights: Sequence[float] | np.ndarray, parts: Sequence[Array]) -> Array:
    """Sum of weight times part, without the terms of weight zero."""
    terms = [
        part if weight == 1 else part * np.asarray(weight, part.dtype)
        for weight, part in zip(weights, parts, strict=True)
        if weight
    ]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
