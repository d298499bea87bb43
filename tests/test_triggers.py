"""Triggers: golden figures of other people's code, values by hand, and what holds for any input."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmoe_jax import triggers
from pmoe_jax.errors import PmoeError

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
KEY = jax.random.key(3)


def golden(name: str) -> dict[str, np.ndarray]:
    path = GOLDEN / name
    if not path.exists():
        pytest.skip(f"golden figures are not here: {name}")
    with np.load(path) as file:
        return dict(file)


def some_images(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).random(shape, np.float32))


def assert_same(actual, expected, atol=0.0):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


# --- Golden figures -------------------------------------------------------------------------


def test_square_and_blend_are_the_authors():
    figures = golden("authors_triggers.npz")
    images = figures["images"] / np.float32(255)
    assert_same(triggers.square(images, value=1 / 255), figures["square"], 1e-7)
    assert_same(triggers.blend(images, figures["blend_image"]), figures["blend"], 1e-6)


def test_warp_is_the_authors():
    figures = golden("authors_triggers.npz")
    images = figures["images"] / np.float32(255)
    grid = triggers.warp_grid(figures["warp_control_grid"], upsampling="authors")
    displacement = (grid - triggers.identity_grid(32)) * 32 / 0.25
    inside = (np.abs(grid) < 1).all(-1)  # elsewhere the clamp has cut the displacement
    assert_same(displacement[inside], figures["warp_noise_grid"][inside][:, ::-1], 2e-5)
    assert_same(triggers.warp(images, grid, "truncate"), figures["warp"], 1e-7)


@pytest.mark.parametrize("name", ["wanet_k2_s0.25.npz", "wanet_k4_s0.5.npz"])
def test_warp_is_wanets(name):
    figures = golden(name)
    grid = triggers.warp_grid(figures["control_grid"], strength=figures["s"])
    assert_same(grid, figures["grid"], 1e-6)
    assert_same(triggers.warp(figures["images"], grid), figures["warped"], 1e-5)
    noisy = triggers.warp_noise(figures["images"], grid, figures["noise_offsets"])
    assert_same(noisy, figures["noise_mode"], 1e-5)


# --- By hand --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("corner", "rows", "columns"),
    [
        ("top_left", slice(0, 2), slice(0, 2)),
        ("top_right", slice(0, 2), slice(3, 5)),
        ("bottom_left", slice(1, 3), slice(0, 2)),
        ("bottom_right", slice(1, 3), slice(3, 5)),
    ],
)
def test_square_fills_its_corner_and_nothing_else(corner, rows, columns):
    images = some_images(2, 3, 5, 3)
    expected = np.array(images)
    expected[:, rows, columns] = np.float32(0.1)
    assert_same(triggers.square(images, size=2, corner=corner, value=0.1), expected)


def test_square_is_black_4x4_top_left_by_default():
    expected = np.ones((8, 8, 1))
    expected[:4, :4] = 0
    assert_same(triggers.square(jnp.ones((8, 8, 1))), expected)


def test_a_square_may_have_a_colour():
    images, colour = some_images(2, 5, 5, 3), np.float32([0.1, 0.2, 0.3])
    expected = np.array(images)
    expected[:, :4, :4] = colour
    assert_same(triggers.square(images, value=colour), expected)
    made = triggers.make("square", KEY, (5, 5, 3), value=colour)
    assert_same(triggers.apply(images, made), expected)


def test_blend_by_hand():
    image, pattern = jnp.array([[[0.2, 1.0]]]), jnp.array([[[0.6, 0.0]]])
    assert_same(triggers.blend(image, pattern, alpha=0.25), [[[0.3, 0.75]]], 1e-7)


def grid_of_pixels(rows, columns, height, width):
    """A sampling grid that reads at the given coordinates in pixels."""
    to_grid = [2 * np.asarray(columns) / (width - 1) - 1, 2 * np.asarray(rows) / (height - 1) - 1]
    return jnp.asarray(np.stack(to_grid, -1), jnp.float32)


def test_bilinear_and_truncated_sampling_by_hand():
    image = jnp.array([[0.0, 0.2, 0.4], [0.6, 0.8, 1.0]])[..., None]
    rows = [[0.5, 0.0, 0.0], [0.75, 1.0, 1.0]]
    columns = [[0.0, 0.75, 1.0], [1.25, 2.0, 3.0]]
    grid = grid_of_pixels(rows, columns, 2, 3)
    bilinear = [[0.3, 0.15, 0.2], [0.7, 1.0, 0.0]]  # the last one lies outside: zero padding
    assert_same(triggers.warp(image, grid)[..., 0], bilinear, 1e-6)
    truncated = np.float32([[0.0, 0.0, 0.2], [0.2, 1.0, 0.0]])
    assert_same(triggers.warp(image, grid, "truncate")[..., 0], truncated)


def test_half_a_pixel_outside_fades_to_zero():
    image = jnp.ones((3, 4, 2))
    rows, columns = np.meshgrid(np.arange(3), np.arange(4) + 0.5, indexing="ij")
    warped = triggers.warp(image, grid_of_pixels(rows, columns, 3, 4))
    assert_same(warped[..., 0], [[1, 1, 1, 0.5]] * 3, 1e-6)


def test_columns_come_first_in_grids():
    """A control grid that pushes right only, on an image that is not square."""
    control = np.zeros((2, 2, 2))
    control[..., 0] = 1.0
    grid = triggers.warp_grid(control, size=(4, 8), strength=0.5)
    identity = triggers.identity_grid((4, 8))
    assert grid.shape == (4, 8, 2)
    assert_same(grid[..., 1], identity[..., 1])
    assert_same(grid[..., 0], np.minimum(identity[..., 0] + 0.5 / 8, 1), 1e-7)
    # The authors' control grids hold rows first.
    assert_same(triggers.warp_grid(control[..., ::-1], (4, 8), 0.5, "authors"), grid, 1e-6)


def test_identity_grid():
    grid = triggers.identity_grid((2, 3))
    assert grid.tolist() == [[[-1, -1], [0, -1], [1, -1]], [[-1, 1], [0, 1], [1, 1]]]


def test_upsampled_corners_are_the_control_points():
    control = triggers.warp_control_grid(KEY, 4)
    grid = triggers.warp_grid(control, 32, strength=1.0)
    inward = jnp.clip(jnp.array([-1.0, -1.0]) + control[0, 0] / 32, -1, 1)
    assert_same(grid[0, 0], inward, 1e-6)


def test_upsampling_is_not_clamped_as_the_authors_do():
    # Nor is it in truth a matter of the corners: a control value of 3 moves a middle pixel by more.
    control = np.full((2, 2, 2), 3.0)
    wanet = triggers.warp_grid(control, 9, strength=0.1)[4, 4]
    authors = triggers.warp_grid(control, 9, strength=0.1, upsampling="authors")[4, 4]
    assert_same(wanet, [0.3 / 9] * 2, 1e-6)
    assert_same(authors, [0.1 / 9] * 2, 1e-6)


def test_control_grid_is_normalised_and_drawn_by_the_key():
    grids = [triggers.warp_control_grid(jax.random.key(i), k) for i in range(2) for k in (2, 4)]
    for grid, k in zip(grids, (2, 4, 2, 4), strict=True):
        assert grid.shape == (k, k, 2)
        assert jnp.abs(grid).mean() == pytest.approx(1.0)
        assert (grid > 0).any() and (grid < 0).any()
    assert (grids[0] != grids[2]).all()


def test_noise_offsets_are_in_pixels_halved_and_clamped():
    images = some_images(2, 5, 9, 3)
    grid = triggers.identity_grid((5, 9))
    assert_same(triggers.warp_noise(images, grid, jnp.zeros((2, 5, 9, 2))), images)
    offsets = some_images(2, 5, 9, 2, seed=1) * 2 - 1
    own = jnp.clip(grid + offsets / jnp.array([9, 5]), -1, 1)
    for i in range(2):
        expected = triggers.warp(images[i], own[i])
        assert_same(triggers.warp_noise(images, grid, offsets)[i], expected, 1e-6)


@pytest.mark.parametrize("sampling", triggers.SAMPLINGS)
@pytest.mark.parametrize("size", [(1, 1), (28, 31), (32, 225)])
def test_the_identity_changes_no_bit(size, sampling):
    images = some_images(2, *size, 3)
    assert_same(triggers.warp(images, triggers.identity_grid(size), sampling), images)
    unmoved = triggers.warp_grid(jnp.ones((2, 2, 2)), size, strength=0.0)
    assert_same(triggers.warp(images, unmoved, sampling), images)


# --- Properties -----------------------------------------------------------------------------

SHAPE = (6, 5, 3)
CONTROL = triggers.warp_control_grid(KEY, 3)
GRID = triggers.warp_grid(CONTROL, SHAPE[:2], 0.9)
AUTHORS_GRID = triggers.warp_grid(CONTROL, SHAPE[:2], 4.0, "authors")
PATTERN = triggers.default_pattern(jax.random.key(8), SHAPE)
OFFSETS = np.random.default_rng(1).uniform(-1, 1, (*SHAPE[:2], 2)).astype(np.float32)
FUNCTIONS = {
    "square": lambda x: triggers.square(x, size=2, value=0.3),
    "blend": lambda x: triggers.blend(x, PATTERN, 0.37),
    "warp": lambda x: triggers.warp(x, GRID),
    "truncated": lambda x: triggers.warp(x, AUTHORS_GRID, "truncate"),
    "noise": lambda x: triggers.warp_noise(x, GRID, jnp.broadcast_to(OFFSETS, (*x.shape[:-1], 2))),
}


def all_triggers(images):
    return {name: function(images) for name, function in FUNCTIONS.items()}


class TriggerVariants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_shape_dtype_and_range_are_kept(self):
        # Values of 0 and 1 too: the ends of the range are where rounding would show.
        images = jnp.clip(some_images(4, *SHAPE) * 3 - 1, 0, 1).at[0].set(1.0)
        for name, triggered in self.variant(all_triggers)(images).items():
            assert triggered.shape == images.shape and triggered.dtype == jnp.float32, name
            assert triggered.min() >= 0 and triggered.max() <= 1, name
            assert (triggered != images).any(), name

    @chex.variants(with_jit=True, without_jit=True)
    def test_leading_axes_and_vmap_equal_alone(self):
        images = some_images(1, 2, *SHAPE)
        alone = self.variant(all_triggers)
        expected = jax.tree.map(
            lambda *leaves: np.stack(leaves)[None], *[alone(image) for image in images[0]]
        )
        chex.assert_trees_all_close(alone(images), expected, atol=1e-6)
        mapped = self.variant(jax.vmap(jax.vmap(all_triggers)))(images)
        chex.assert_trees_all_close(mapped, expected, atol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_default_pattern(self):
        pattern = self.variant(lambda key: triggers.default_pattern(key, (32, 32, 3)))(KEY)
        assert pattern.shape == (32, 32, 3) and pattern.dtype == jnp.float32
        assert pattern.min() == 0 and pattern.max() == 1
        assert pattern.std() > 0.3  # high contrast: black and white halves have 0.5
        neighbours = jnp.abs(jnp.diff(pattern, axis=0)).mean()
        assert neighbours < 0.2  # smooth: of unrelated pixels it would be about 0.5
        assert_same(pattern, triggers.default_pattern(KEY, (32, 32, 3)), 1e-5)
        other = triggers.default_pattern(jax.random.key(4), (32, 32, 3))
        assert jnp.abs(pattern - other).mean() > 0.1


@settings(max_examples=4, deadline=None)
@given(
    size=st.tuples(st.integers(2, 9), st.integers(2, 9), st.integers(1, 4)),
    lead=st.lists(st.integers(1, 2), max_size=2),
    strength=st.floats(0, 3),
    seed=st.integers(0, 99),
)
def test_any_shape_keeps_shape_and_range(size, lead, strength, seed):
    @jax.jit
    def both_warps(images, key, strength):
        control = triggers.warp_control_grid(key)
        grids = [
            triggers.warp_grid(control, size[:2], strength, upsampling)
            for upsampling in triggers.UPSAMPLINGS
        ]
        warped = map(triggers.warp, [images] * 2, grids, triggers.SAMPLINGS)
        return grids, [triggers.square(x, size=1, value=0.5) for x in warped]

    images = np.random.default_rng(seed).random((*lead, *size), np.float32)
    grids, triggered = both_warps(images, jax.random.key(seed), strength)
    for grid, result in zip(np.asarray(grids), np.asarray(triggered), strict=True):
        assert grid.shape == (*size[:2], 2) and np.abs(grid).max() <= 1
        assert result.shape == images.shape
        assert result.min() >= 0 and result.max() <= 1


def test_gradients_reach_images_and_parameters():
    images = some_images(2, 6, 5, 3)
    weights = some_images(2, 6, 5, 3, seed=9)

    def total(images, alpha, strength, value, grid_offset):
        grid = triggers.warp_grid(CONTROL, (6, 5), strength) + grid_offset
        blended = triggers.blend(triggers.warp(images, grid), PATTERN, alpha)
        return jnp.sum(weights * triggers.square(blended, size=2, value=value))

    # Offset off the pixel grid: bilinear interpolation has kinks at whole pixels.
    arguments = (images, jnp.float32(0.4), jnp.float32(0.5), jnp.float32(0.2), jnp.float32(-0.013))
    gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3, 4)))(*arguments)
    # Small for the grid, whose kinks are near; large where the sum is linear.
    for i, step in ((1, 1e-2), (2, 1e-3), (3, 1e-2), (4, 1e-4)):
        up, down = list(arguments), list(arguments)
        up[i], down[i] = arguments[i] + step, arguments[i] - step
        numeric = (total(*up) - total(*down)) / (2 * step)
        assert gradients[i] == pytest.approx(float(numeric), rel=0.02), i
    direction = some_images(2, 6, 5, 3, seed=5)
    numeric = total(images + direction, *arguments[1:]) - total(*arguments)  # linear in the images
    assert jnp.vdot(gradients[0], direction) == pytest.approx(float(numeric), rel=1e-3)


def test_the_gradient_of_a_grid_at_whole_pixels_is_not_lost():
    ramp = jnp.broadcast_to(jnp.arange(5.0) / 5, (5, 5))[..., None]
    slope = jax.grad(lambda s: triggers.warp(ramp, triggers.identity_grid(5) + s)[2, 2, 0])(0.0)
    assert slope == pytest.approx(0.2 * 2)  # a grid unit is two pixels here


# --- The unified form -----------------------------------------------------------------------

MADE = {
    "none": ({}, lambda x: x),
    "square": (
        {"size": 3, "corner": "bottom_left", "value": 0.3},
        lambda x: triggers.square(x, 3, "bottom_left", 0.3),
    ),
    "blend": ({"alpha": 0.3, "pattern": PATTERN}, lambda x: triggers.blend(x, PATTERN, 0.3)),
    "warp": (
        {"k": 3, "strength": 0.7},
        lambda x: triggers.warp(x, triggers.warp_grid(CONTROL, SHAPE[:2], 0.7)),
    ),
}


class UnifiedVariants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_apply_of_make_is_the_function(self):
        images = some_images(4, *SHAPE)
        for name, (parameters, function) in MADE.items():
            trigger = triggers.make(name, KEY, SHAPE, **parameters)
            expected = self.variant(function)(images)
            np.testing.assert_array_equal(
                self.variant(triggers.apply)(images, trigger), expected, err_msg=name
            )

    @chex.variants(with_jit=True, without_jit=True)
    def test_stacked_members_equal_alone(self):
        images = some_images(4, *SHAPE)
        made = [triggers.make(name, KEY, SHAPE, **MADE[name][0]) for name in MADE]
        stacked = triggers.stack(made)
        assert stacked.grid.shape == (4, 6, 5, 2)
        together = self.variant(jax.vmap(triggers.apply, in_axes=(None, 0)))(images, stacked)
        for trigger, member in zip(made, together, strict=True):
            np.testing.assert_allclose(member, triggers.apply(images, trigger), rtol=0, atol=1e-6)
        np.testing.assert_array_equal(together[0], images)  # though it passed through a grid


def test_defaults_of_make_are_those_of_the_functions():
    images = some_images(2, *SHAPE)
    key = jax.random.key(11)
    pattern = triggers.default_pattern(key, SHAPE)
    grid = triggers.warp_grid(triggers.warp_control_grid(key), SHAPE[:2])
    for name, expected in {
        "square": triggers.square(images),
        "blend": triggers.blend(images, pattern),
        "warp": triggers.warp(images, grid),
    }.items():
        np.testing.assert_array_equal(
            triggers.apply(images, triggers.make(name, key, SHAPE)), expected, err_msg=name
        )


def test_the_authors_warp_as_a_trigger():
    images = some_images(2, *SHAPE)
    trigger = triggers.make("warp", KEY, SHAPE, k=3, upsampling="authors", sampling="truncate")
    grid = triggers.warp_grid(CONTROL, SHAPE[:2], upsampling="authors")
    np.testing.assert_array_equal(
        triggers.apply(images, trigger), triggers.warp(images, grid, "truncate")
    )


def test_overlays_alone_need_no_grid():
    stacked = triggers.stack([triggers.make(name, KEY, SHAPE) for name in ("square", "blend")])
    assert stacked.grid is None


def test_draws_do_not_depend_on_the_precision():
    made = {name: triggers.make(name, KEY, (8, 8, 3)) for name in triggers.NAMES}
    with jax.enable_x64(True):
        wide = {name: triggers.make(name, KEY, (8, 8, 3)) for name in triggers.NAMES}
    chex.assert_trees_all_equal_dtypes(made, wide)
    chex.assert_trees_all_close(made, wide, atol=1e-6)


# --- Errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("sticker", {}, "trigger is 'sticker': use one of none, square, blend, warp"),
        ("square", {"size": 6}, "square size is 6: use 1 to 5 on images of 6x5"),
        ("square", {"size": 0}, "square size is 0: use 1 to 5"),
        ("square", {"size": 2.0}, "square size is 2.0: use a whole number"),
        ("square", {"value": "black"}, "square value is 'black': use a number"),
        ("square", {"corner": "middle"}, "square corner is 'middle': use one of top_left"),
        ("square", {"value": 255}, "square value is 255: use 0 to 1"),
        ("square", {"value": np.zeros(2)}, r"square value has shape \(2,\): use a number, or 3"),
        ("square", {"colour": 0}, "'square' has no parameter 'colour': it takes size, corner"),
        ("none", {"size": 1}, "'none' has no parameter 'size': it takes none"),
        ("blend", {"alpha": 1.5}, "blend alpha is 1.5: use 0 to 1"),
        ("blend", {"alpha": float("nan")}, "blend alpha is nan: use 0 to 1"),
        ("blend", {"alpha": "half"}, "blend alpha is 'half': use a number"),
        ("blend", {"pattern": "kitty.png"}, "blend pattern is str: use an array of numbers"),
        ("blend", {"pattern": np.zeros((5, 6, 3))}, r"pattern has shape \(5, 6, 3\): the images"),
        ("blend", {"pattern": np.full(SHAPE, 2.0)}, "blend pattern has values outside the range"),
        ("warp", {"k": 1}, "warp k is 1: use 2 or more"),
        ("warp", {"k": 2.5}, "warp k is 2.5: use a whole number"),
        ("warp", {"k": "2"}, "warp k is '2': use a whole number"),
        ("warp", {"k": True}, "warp k is True: use a whole number"),
        ("warp", {"strength": "weak"}, "warp strength is 'weak': use a number"),
        ("warp", {"strength": float("inf")}, "warp strength is inf: use a finite number"),
        ("warp", {"upsampling": "cubic"}, "warp upsampling is 'cubic': use one of wanet, authors"),
        ("warp", {"sampling": "nearest"}, "warp sampling is 'nearest': use one of bilinear, trunc"),
    ],
)
def test_bad_parameters(name, parameters, message):
    with pytest.raises(PmoeError, match=message) as caught:
        triggers.make(name, KEY, SHAPE, **parameters)
    assert "\n" not in str(caught.value)


ZEROS = np.zeros((*SHAPE[:2], 2), np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: triggers.warp_control_grid("seed"), "key is str: use jax.random.key"),
        (lambda: triggers.make("blend", 0, SHAPE), "key is int: use jax.random.key"),
        (lambda: triggers.warp_control_grid(KEY, None), "warp k is None: use a whole number"),
        (lambda: triggers.warp_grid("grid"), "control grid is str: use an array of numbers"),
        (lambda: triggers.warp_grid(ZEROS[:2, :2], size="large"), "size is 'large': use a whole"),
        (lambda: triggers.warp_grid(ZEROS[:2, :2], size=(2, 3, 4)), "size is .*: use a positive"),
        (lambda: triggers.warp("image", ZEROS), "images are str: use an array of floats"),
        (lambda: triggers.warp(np.zeros(SHAPE, np.float32), None), "grid is NoneType: use"),
        (lambda: triggers.warp_noise(np.zeros(SHAPE, np.float32), ZEROS, "noise"),
         "offsets is str: use an array of numbers"),
        (lambda: triggers.warp_noise(np.zeros(SHAPE, np.float32), [[1]], ZEROS),
         r"grid has shape \(1, 1\): use \(6, 5, 2\)"),
        (lambda: triggers.warp_noise(np.zeros((4, *SHAPE), np.float32), ZEROS, ZEROS[:, :3]),
         r"offsets have shape \(6, 3, 2\): use \(4, 6, 5, 2\)"),
    ],
)  # fmt: skip
def test_wrong_types_and_shapes_are_one_clear_line(call, message):
    with pytest.raises(PmoeError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_bad_images_and_grids():
    with pytest.raises(PmoeError, match=r"images have shape \(6, 5\)"):
        triggers.square(jnp.zeros((6, 5)))
    with pytest.raises(PmoeError, match="images are uint8: use float32"):
        triggers.square(np.zeros(SHAPE, np.uint8))
    with pytest.raises(PmoeError, match=r"grid has shape \(5, 6, 2\): use \(6, 5, 2\)"):
        triggers.warp(jnp.zeros((2, *SHAPE)), triggers.identity_grid((5, 6)))
    with pytest.raises(PmoeError, match=r"control grid has shape \(2, 3, 2\)"):
        triggers.warp_grid(jnp.zeros((2, 3, 2)))
    with pytest.raises(PmoeError, match="size is 0"):
        triggers.warp_grid(CONTROL, 0)
    with pytest.raises(PmoeError, match=r"image shape is \(32, 32\)"):
        triggers.make("square", KEY, (32, 32))


def test_a_trigger_of_other_images_or_of_several_members_is_refused():
    """Without the check a stacked one would give image m the trigger of member m."""
    made = triggers.make("square", KEY, SHAPE)
    for trigger, images in (
        (triggers.stack([made, made]), jnp.zeros((2, *SHAPE))),
        (triggers.stack([triggers.make("warp", KEY, SHAPE)] * 2), jnp.zeros((2, *SHAPE))),
        (made, jnp.zeros((2, *SHAPE[:2], 1))),
        (made, jnp.zeros((2, 4, 4, 3))),
    ):
        with pytest.raises(PmoeError, match=r"the trigger is for images of shape \(.*one member's"):
            triggers.apply(images, trigger)


def test_warps_of_different_sampling_do_not_stack():
    made = [triggers.make("warp", KEY, SHAPE, sampling=name) for name in triggers.SAMPLINGS]
    with pytest.raises(PmoeError, match="bilinear and truncate cannot share one program"):
        triggers.stack(made)
