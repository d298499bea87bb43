"""The three triggers of the paper (Section 3): a square, a blended pattern, a warp (WaNet).

Axes: H, W, C height, width and channels of an image; M member; "..." any leading axes.
Images are float32 [..., H, W, C] in [0, 1]. Grids hold, for every output pixel, where it is read
from: [H, W, 2], last axis (column, row), from -1 (centre of the first pixel) to 1 (centre of the
last). Every function works under jit, vmap and grad; inputs, but for the values of images, are
checked where they are known, that is outside jit.

`square`, `blend` and `warp` stand alone. A training program that treats all members alike uses
`Trigger` with `make` and `apply`, which give the same images.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pmoe_jax.errors import PmoeError

NAMES = ("none", "square", "blend", "warp")
CORNERS = ("top_left", "top_right", "bottom_left", "bottom_right")
UPSAMPLINGS = ("wanet", "authors")
SAMPLINGS = ("bilinear", "truncate")

# --- Square and blend -----------------------------------------------------------------------


def square(
    images: ArrayLike, size: int = 4, corner: str = "top_left", value: ArrayLike = 0.0
) -> jax.Array:
    """Images with a uniform square in one corner (paper, Section 3; BadNets).

    Args:
      images: float32 [..., H, W, C] in [0, 1].
      size: side of the square in pixels, 1 to min(H, W).
      corner: one of `CORNERS`.
      value: what the square is filled with, a number or one a channel [C], in [0, 1]; 0 is
        black. The authors' code fills in 1/255 (quirk A1).

    Returns:
      float32 [..., H, W, C] in [0, 1].

    Raises:
      PmoeError: bad size, corner, value or image rank.
    """
    images = _as_images(images)
    alpha = jnp.asarray(_square_alpha(images.shape[-3:], size, corner))
    return _overlay(images, alpha, _square_value(value, images.shape[-1]))


def blend(images: ArrayLike, pattern: ArrayLike, alpha: ArrayLike = 0.5) -> jax.Array:
    """Images mixed with a pattern: (1 - alpha) * image + alpha * pattern (paper, Section 3).

    Args:
      images: float32 [..., H, W, C] in [0, 1].
      pattern: float32 [H, W, C] in [0, 1].
      alpha: opacity of the pattern in [0, 1].

    Returns:
      float32 [..., H, W, C] in [0, 1].

    Raises:
      PmoeError: alpha or pattern out of range, or the pattern's shape is not the images'.
    """
    images = _as_images(images)
    pattern = _as_pattern(pattern, images.shape[-3:])
    return _overlay(images, _in_unit_range("blend alpha", alpha), pattern)


def default_pattern(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A procedural picture to blend in: bent bands of colour, smooth but of high contrast.

    Args:
      key: typed PRNG key; the same key gives the same picture, at every resolution.
      shape: (H, W, C).

    Returns:
      float32 [H, W, C], spanning [0, 1].

    Raises:
      PmoeError: the key is none, or the shape no image's.
    """
    return _draw_pattern(_as_key(key), _image_shape(shape))


# --- Warp -----------------------------------------------------------------------------------


def warp_control_grid(key: jax.Array, k: int = 2) -> jax.Array:
    """A random k x k control grid of displacements (WaNet, Nguyen and Tran 2021, Section 3.2).

    Args:
      key: typed PRNG key.
      k: control points a side, at least 2.

    Returns:
      float32 [k, k, 2]: U(-1, 1), divided by the mean absolute value.

    Raises:
      PmoeError: k is no whole number from 2, or the key is none.
    """
    if _whole_number("warp k", k) < 2:
        raise PmoeError(f"warp k is {k}: use 2 or more control points a side")
    grid = jax.random.uniform(_as_key(key), (k, k, 2), jnp.float32, -1.0, 1.0)
    return grid / jnp.abs(grid).mean()


def identity_grid(size: int | tuple[int, int]) -> jax.Array:
    """The sampling grid that leaves an image as it is: float32 [H, W, 2]; `size` int or (H, W)."""
    height, width = _size(size)
    column, row = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    return jnp.asarray(np.stack([column, row], axis=-1), jnp.float32)


def warp_grid(
    control_grid: ArrayLike,
    size: int | tuple[int, int] = 32,
    strength: ArrayLike = 0.25,
    upsampling: str = "wanet",
) -> jax.Array:
    """The sampling grid of a warp: identity + strength * upsampled control grid / size.

    "wanet" is the original (bicubic, corners aligned, coefficient -0.75, not clamped). "authors" is
    the paper's notebook (quirk A3: TensorFlow's half-pixel bicubic, clamped to [-1, 1]). Each axis
    is divided by its own size.

    Args:
      control_grid: float32 [k, k, 2]; last axis (column, row) for "wanet", (row, column) for
        "authors", as their own code has it.
      size: H = W, or (H, W).
      strength: about twice the displacement in pixels that a control value of 1 causes.
      upsampling: one of `UPSAMPLINGS`.

    Returns:
      float32 [H, W, 2], last axis (column, row), clamped to [-1, 1].

    Raises:
      PmoeError: bad shape, size, strength or upsampling.
    """
    height, width = _size(size)
    _one_of("warp upsampling", upsampling, UPSAMPLINGS)
    if not isinstance(strength, jax.core.Tracer):
        known = _known_numbers("warp strength", strength)
        if not np.isfinite(known).all():
            raise PmoeError(f"warp strength is {strength}: use a finite number, 0 for no warp")
    control = _numbers("control grid", control_grid)
    k = control.shape[0] if control.ndim == 3 else 0
    if control.shape != (k, k, 2) or k < 2:
        raise PmoeError(f"control grid has shape {control.shape}: use [k, k, 2] with k >= 2")
    if upsampling == "wanet":
        rows, columns = _align_corners_bicubic(height, k), _align_corners_bicubic(width, k)
        precision = jax.lax.Precision.HIGHEST
        noise = jnp.einsum("hi,wj,ijd->hwd", rows, columns, control, precision=precision)
    else:
        # jax.image has TensorFlow's half-pixel bicubic: coefficient -0.5, edges renormalised.
        noise = jax.image.resize(control, (height, width, 2), "cubic", antialias=False)
        noise = jnp.clip(noise, -1.0, 1.0)[..., ::-1]
    sizes = jnp.array([width, height], jnp.float32)
    return jnp.clip(identity_grid((height, width)) + strength * noise / sizes, -1.0, 1.0)


def warp(images: ArrayLike, grid: ArrayLike, sampling: str = "bilinear") -> jax.Array:
    """Images read at the positions of a grid; what lies outside the image is 0.

    Args:
      images: float32 [..., H, W, C] in [0, 1].
      grid: float32 [H, W, 2] for all images, or [..., H, W, 2] with the images' leading axes for
        one grid an image; last axis (column, row).
      sampling: "bilinear" (WaNet), or "truncate": coordinates cut to whole pixels, as the paper's
        notebook has it (quirk A3).

    Returns:
      float32 [..., H, W, C] in [0, 1].

    Raises:
      PmoeError: shapes that do not fit, or an unknown sampling.
    """
    images = _as_images(images)
    grid = _numbers("grid", grid)
    _one_of("warp sampling", sampling, SAMPLINGS)
    spatial = images.shape[-3:-1]
    if grid.shape == (*spatial, 2):
        return _sample(images, grid, sampling)
    if grid.shape != (*images.shape[:-1], 2):
        raise PmoeError(
            f"grid has shape {grid.shape}: use {(*spatial, 2)}, or {(*images.shape[:-1], 2)} for "
            "one grid an image"
        )
    flat_images = images.reshape(-1, *images.shape[-3:])
    flat_grid = grid.reshape(-1, *spatial, 2)
    warped = jax.vmap(lambda image, own: _sample(image, own, sampling))(flat_images, flat_grid)
    return warped.reshape(images.shape)


def warp_noise(images: ArrayLike, grid: ArrayLike, offsets: ArrayLike) -> jax.Array:
    """WaNet's noise mode: images warped by the grid plus a random offset a pixel, bilinearly.

    Args:
      images: float32 [..., H, W, C] in [0, 1].
      grid: float32 [H, W, 2], last axis (column, row).
      offsets: float32 [..., H, W, 2] with the images' leading axes, or [H, W, 2] for all images:
        raw draws from U(-1, 1); divided by the size here.

    Returns:
      float32 [..., H, W, C] in [0, 1].

    Raises:
      PmoeError: shapes that do not fit, or no numbers.
    """
    images = _as_images(images)
    height, width = images.shape[-3:-1]
    grid, offsets = _numbers("grid", grid), _numbers("offsets", offsets)
    if grid.shape != (height, width, 2):
        raise PmoeError(f"grid has shape {grid.shape}: use {(height, width, 2)}")
    if offsets.shape not in ((height, width, 2), (*images.shape[:-1], 2)):
        raise PmoeError(f"offsets have shape {offsets.shape}: use {(*images.shape[:-1], 2)}")
    sizes = jnp.array([width, height], jnp.float32)
    return warp(images, jnp.clip(grid + offsets / sizes, -1.0, 1.0))


# --- One form for all triggers --------------------------------------------------------------


@flax.struct.dataclass
class Trigger:
    """One member's trigger as arrays; triggers of several members stack on a leading M axis.

    Attributes:
      alpha: float32 [H, W, 1], opacity of the pattern.
      pattern: float32 [H, W, C] in [0, 1].
      grid: float32 [H, W, 2] sampling grid, or None where no member of the program warps;
        `identity_grid` changes no bit of an image.
      sampling: how the grid is read, one of `SAMPLINGS`; the same for all members of a program.
    """

    alpha: jax.Array
    pattern: jax.Array
    grid: jax.Array | None = None
    sampling: str = flax.struct.field(pytree_node=False, default="bilinear")


def apply(images: ArrayLike, trigger: Trigger) -> jax.Array:
    """Images with the trigger: warped if it has a grid, then overlaid (paper, Section 3).

    Args:
      images: float32 [..., H, W, C] in [0, 1].
      trigger: one member's.

    Returns:
      float32 [..., H, W, C] in [0, 1].

    Raises:
      PmoeError: images that are not such floats, or of another shape than the trigger.
    """
    images = _as_images(images)
    if trigger.pattern.shape != images.shape[-3:]:
        raise PmoeError(
            f"the trigger is for images of shape {trigger.pattern.shape}, these have "
            f"{images.shape[-3:]}: make one for them, or give one member's of a stacked trigger"
        )
    if trigger.grid is not None:
        images = warp(images, trigger.grid, trigger.sampling)
    return _overlay(images, trigger.alpha, trigger.pattern)


def make(name: str, key: jax.Array, image_shape: tuple[int, ...], **parameters: Any) -> Trigger:
    """A trigger by name: `apply(images, make("square", ...))` is `square(images, ...)`, and so on.

    Args:
      name: one of `NAMES`. "none" leaves images as they are.
      key: typed PRNG key for what is drawn: the warp's control grid, the default blend pattern.
      image_shape: (H, W, C).
      **parameters: of a square: `size`, `corner`, `value`; of a blend: `alpha`, `pattern`
        ([H, W, C] in [0, 1], or None for `default_pattern(key)`); of a warp: `k`, `strength`,
        `upsampling`, `sampling`. Defaults as in the functions of these names.

    Returns:
      A `Trigger` for images of that shape, without an M axis.

    Raises:
      PmoeError: an unknown name or parameter, or a value out of range.
    """
    _one_of("trigger", name, NAMES)
    build, allowed = _BUILDERS[name]
    unknown = sorted(set(parameters) - set(allowed))
    if unknown:
        raise PmoeError(
            f"trigger {name!r} has no parameter {unknown[0]!r}: "
            f"it takes {', '.join(allowed) or 'none'}"
        )
    return build(key, _image_shape(image_shape), **parameters)


def stack(members: Sequence[Trigger]) -> Trigger:
    """The triggers of M members as one, every array with a leading M axis.

    If one of them warps, those that do not get the identity grid.

    Returns:
      A `Trigger`: alpha [M, H, W, 1], pattern [M, H, W, C], grid [M, H, W, 2] or None.

    Raises:
      PmoeError: warps of different sampling, which cannot share a program.
    """
    warping = [member for member in members if member.grid is not None]
    samplings = sorted({member.sampling for member in warping})
    if len(samplings) > 1:
        raise PmoeError(f"warps of sampling {' and '.join(samplings)} cannot share one program")
    if warping:
        shape = warping[0].alpha.shape[0], warping[0].alpha.shape[1]
        members = [
            member.replace(  # type: ignore[attr-defined]
                grid=identity_grid(shape) if member.grid is None else member.grid,
                sampling=samplings[0],
            )
            for member in members
        ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)


def _make_none(key: jax.Array, shape: tuple[int, int, int]) -> Trigger:
    return Trigger(
        alpha=jnp.zeros((*shape[:2], 1), jnp.float32), pattern=jnp.zeros(shape, jnp.float32)
    )


def _make_square(
    key: jax.Array,
    shape: tuple[int, int, int],
    size: int = 4,
    corner: str = "top_left",
    value: ArrayLike = 0.0,
) -> Trigger:
    alpha = jnp.asarray(_square_alpha(shape, size, corner))
    return Trigger(alpha=alpha, pattern=jnp.full(shape, _square_value(value, shape[-1])))


def _make_blend(
    key: jax.Array,
    shape: tuple[int, int, int],
    alpha: ArrayLike = 0.5,
    pattern: ArrayLike | None = None,
) -> Trigger:
    picture = default_pattern(key, shape) if pattern is None else _as_pattern(pattern, shape)
    opacity = jnp.full((*shape[:2], 1), _in_unit_range("blend alpha", alpha))
    return Trigger(alpha=opacity, pattern=picture)


def _make_warp(
    key: jax.Array,
    shape: tuple[int, int, int],
    k: int = 2,
    strength: ArrayLike = 0.25,
    upsampling: str = "wanet",
    sampling: str = "bilinear",
) -> Trigger:
    _one_of("warp sampling", sampling, SAMPLINGS)
    grid = warp_grid(warp_control_grid(key, k), shape[:2], strength, upsampling)
    return _make_none(key, shape).replace(grid=grid, sampling=sampling)  # type: ignore[attr-defined]


_BUILDERS: dict[str, tuple[Callable[..., Trigger], tuple[str, ...]]] = {
    "none": (_make_none, ()),
    "square": (_make_square, ("size", "corner", "value")),
    "blend": (_make_blend, ("alpha", "pattern")),
    "warp": (_make_warp, ("k", "strength", "upsampling", "sampling")),
}

# --- Helpers --------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="shape", inline=True)
def _draw_pattern(key: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    height, width, channels = shape
    direction_key, phase_key, colour_key = jax.random.split(key, 3)
    row, column = jnp.meshgrid(
        (jnp.arange(height, dtype=jnp.float32) + 0.5) / height,
        (jnp.arange(width, dtype=jnp.float32) + 0.5) / width,
        indexing="ij",
    )
    # Two waves of one to three periods bend a third one, which draws the bands.
    angle = jax.random.uniform(direction_key, (3,), jnp.float32, maxval=2 * jnp.pi)
    phase = jax.random.uniform(phase_key, (3,), jnp.float32, maxval=2 * jnp.pi)
    periods = jnp.array([1.0, 1.7, 2.6], jnp.float32)
    along = row[..., None] * jnp.sin(angle) + column[..., None] * jnp.cos(angle)
    waves = 2 * jnp.pi * periods * along + phase
    bands = waves[..., 2] + 1.3 * jnp.sin(waves[..., 0]) + 0.9 * jnp.sin(waves[..., 1])
    colour = jax.random.uniform(colour_key, (channels,), jnp.float32, maxval=2 * jnp.pi)
    picture = jnp.tanh(3.0 * jnp.sin(bands[..., None] + colour))
    low, high = picture.min(), picture.max()
    spread = jnp.where(high > low, high - low, 1.0)
    return jnp.clip((picture - low) / spread, 0.0, 1.0).astype(jnp.float32)


def _overlay(images: jax.Array, alpha: jax.Array, pattern: jax.Array) -> jax.Array:
    # This form, unlike image + alpha * (pattern - image), is exact where alpha is 0 or 1.
    return (1.0 - alpha) * images + alpha * pattern


def _square_alpha(shape: tuple[int, ...], size: int, corner: str) -> np.ndarray:
    height, width = shape[:2]
    if not 1 <= _whole_number("square size", size) <= min(height, width):
        raise PmoeError(
            f"square size is {size}: use 1 to {min(height, width)} on images of {height}x{width}"
        )
    _one_of("square corner", corner, CORNERS)
    vertical, horizontal = corner.split("_")
    alpha = np.zeros((height, width, 1), np.float32)
    rows = slice(0, size) if vertical == "top" else slice(height - size, height)
    columns = slice(0, size) if horizontal == "left" else slice(width - size, width)
    alpha[rows, columns] = 1.0
    return alpha


def _align_corners_bicubic(size: int, k: int) -> np.ndarray:
    """Weights float32 [size, k] of PyTorch's bicubic with align_corners, edges replicated."""
    a = -0.75
    weights = np.zeros((size, k))
    for i, position in enumerate(np.linspace(0, k - 1, size)):
        for tap in range(int(position) - 1, int(position) + 3):
            x = abs(position - tap)
            if x <= 1:
                weight = (a + 2) * x**3 - (a + 3) * x**2 + 1
            else:
                weight = a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0
            weights[i, min(max(tap, 0), k - 1)] += weight
    return weights.astype(np.float32)


@functools.partial(jax.jit, static_argnames="sampling", inline=True)
def _sample(images: jax.Array, grid: jax.Array, sampling: str) -> jax.Array:
    """Images [..., H, W, C] read at one grid [H, W, 2], the grid's arithmetic done once for all."""
    height, width, channels = images.shape[-3:]
    column = _to_pixels(grid[..., 0], width).reshape(-1, 1)
    row = _to_pixels(grid[..., 1], height).reshape(-1, 1)
    # One line a pixel with that pixel of all images, and a line of zeros for what lies outside:
    # the gathers copy whole lines (about 1.5 times faster on CPU than gathering in each image).
    lines = jnp.moveaxis(images.reshape(-1, height * width, channels), 0, 1)
    lines = jnp.pad(lines.reshape(height * width, -1), ((0, 1), (0, 0)))

    def read(row_index: jax.Array, column_index: jax.Array) -> jax.Array:
        inside = (row_index >= 0) & (row_index < height)
        inside &= (column_index >= 0) & (column_index < width)
        index = jnp.where(inside, row_index * width + column_index, height * width)
        return jnp.take(lines, index[:, 0], axis=0, mode="clip")

    if sampling == "truncate":
        sampled = read(jnp.trunc(row).astype(jnp.int32), jnp.trunc(column).astype(jnp.int32))
    else:
        top, left = jnp.floor(row), jnp.floor(column)
        down, right = row - top, column - left
        i, j = top.astype(jnp.int32), left.astype(jnp.int32)
        upper_left, upper_right = read(i, j), read(i, j + 1)
        lower_left, lower_right = read(i + 1, j), read(i + 1, j + 1)
        # a + f * (b - a) stays within [a, b] in floating point too, so the range [0, 1] is kept.
        upper = upper_left + right * (upper_right - upper_left)
        lower = lower_left + right * (lower_right - lower_left)
        sampled = upper + down * (lower - upper)
    sampled = sampled.reshape(height * width, -1, channels)
    return jnp.moveaxis(sampled, 1, 0).reshape(images.shape)


def _to_pixels(position: jax.Array, size: int) -> jax.Array:
    """Grid positions in [-1, 1] as coordinates in pixels, 0 to size - 1."""
    # Float32 grids miss whole pixels by up to 0.9e-7 * size; without rounding them off, the
    # identity would blur a little when interpolated and shift pixels when truncated.
    return _snap((position + 1.0) * ((size - 1) / 2), 1.5e-7 * size)


@jax.custom_jvp
def _snap(x: jax.Array, slack: ArrayLike) -> jax.Array:
    """x, or the nearest whole number where that is less than `slack` away; gradient 1."""
    nearest = jnp.round(x)
    return jnp.where(jnp.abs(x - nearest) < slack, nearest, x)


_snap.defjvps(lambda tangent, result, x, slack: tangent, None)


def _numbers(what: str, value: ArrayLike) -> jax.Array:
    """The value as float32; an error for what is no array of numbers."""
    try:
        return jnp.asarray(value, jnp.float32)
    except (TypeError, ValueError):
        raise PmoeError(f"{what} is {type(value).__name__}: use an array of numbers") from None


def _known_numbers(what: str, value: Any) -> np.ndarray:
    """The same outside jit, as numpy."""
    known = np.asarray(value)
    if known.dtype.kind not in "biuf" and not jnp.issubdtype(known.dtype, jnp.floating):
        raise PmoeError(f"{what} is {value!r}: use a number")
    return known


def _whole_number(what: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise PmoeError(f"{what} is {value!r}: use a whole number")
    return int(value)


def _as_key(key: jax.Array) -> jax.Array:
    try:
        jax.eval_shape(jax.random.bits, key)
    except TypeError:
        raise PmoeError(f"key is {type(key).__name__}: use jax.random.key(seed)") from None
    return key


def _as_images(images: ArrayLike) -> jax.Array:
    try:
        array = jnp.asarray(images)
    except (TypeError, ValueError):
        raise PmoeError(f"images are {type(images).__name__}: use an array of floats") from None
    if array.ndim < 3:
        raise PmoeError(f"images have shape {array.shape}: use [..., height, width, channels]")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise PmoeError(f"images are {array.dtype}: use float32 in [0, 1] (divide bytes by 255)")
    return array


def _as_pattern(pattern: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    array = _numbers("blend pattern", pattern)
    if array.shape != shape:
        raise PmoeError(f"blend pattern has shape {array.shape}: the images need {shape}")
    return _in_unit_range("blend pattern", array)


def _image_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) != 3 or min(shape) < 1:
        raise PmoeError(f"image shape is {tuple(shape)}: use (height, width, channels)")
    return shape[0], shape[1], shape[2]


def _size(size: int | tuple[int, int]) -> tuple[int, int]:
    sides = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if len(sides) != 2:
        raise PmoeError(f"size is {size!r}: use a positive number of pixels, or (height, width)")
    height, width = (_whole_number("size", side) for side in sides)
    if height < 1 or width < 1:
        raise PmoeError(f"size is {size}: use a positive number of pixels, or (height, width)")
    return int(height), int(width)


def _one_of(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise PmoeError(f"{what} is {value!r}: use one of {', '.join(allowed)}")


def _square_value(value: ArrayLike, channels: int) -> jax.Array:
    """The value, or one a channel, as float32."""
    known = _in_unit_range("square value", value)
    if known.shape not in ((), (channels,)):
        raise PmoeError(
            f"square value has shape {known.shape}: use a number, or {channels}, one a channel"
        )
    return known


def _in_unit_range(what: str, value: ArrayLike) -> jax.Array:
    """The value as float32; an error if it is known (not traced) and outside [0, 1]."""
    if not isinstance(value, jax.core.Tracer):
        known = _known_numbers(what, value)
        if not np.all((known >= 0) & (known <= 1)):
            shown = f"is {known}" if known.ndim == 0 else "has values outside the range"
            raise PmoeError(f"{what} {shown}: use 0 to 1")
    return jnp.asarray(value, jnp.float32)
