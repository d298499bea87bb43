"""Which patches the experts take, whether they take the trigger, and what that causes.

Axes: M member, N or B image, D condition (clean, triggered), E expert, K selected patches, P patch
(position of the h x w feature grid, row-major), Y class, S subset of experts, V forcing, H W pixel,
Q quantity of a patch.

All functions are pure; those on arrays work under jit, and under vmap over members. A patch has two
extents (`PatchView`): nominally the block of pixels it stands for, really its receptive field. Both
are derived from the model, not typed in.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pmoe_jax import metrics, models, triggers
from pmoe_jax.errors import PmoeError
from pmoe_jax.models import PMoEWideResNet, Routing

#: The conditions D of an image.
CONDITIONS = ("clean", "triggered")
#: What `observe` forces on an image, in the order of its V axis. The other routing is that of the
#: same image in the other condition; "patches" swaps positions alone and keeps the image's gates.
FORCINGS = (
    "other_routing",
    "other_patches",
    "nominal_in",
    "nominal_out",
    "field_in",
    "field_out",
)
#: All 2^E subsets of experts are silenced up to this number of experts.
MOST_EXPERTS = 6
#: Width of the images that probe the height: the least that the model takes.
_THIN = 4


# --- Where patches lie ----------------------------------------------------------------------


class PatchView(NamedTuple):
    """Which pixels belong to a patch: patch (i, j) has pixel (y, x) if rows[i, y] and cols[j, x].

    Attributes:
      rows: bool [h, H].
      cols: bool [w, W].
    """

    rows: np.ndarray
    cols: np.ndarray

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w), the size of the feature grid."""
        return self.rows.shape[0], self.cols.shape[0]

    @property
    def num_patches(self) -> int:
        """P."""
        return self.rows.shape[0] * self.cols.shape[0]

    def touched(self, pixels: ArrayLike) -> jax.Array:
        """Patches that have at least one of these pixels: bool [..., H, W] -> bool [..., P]."""
        counts = self.sums(jnp.asarray(pixels, jnp.float32)[..., None])
        return counts[..., 0] > 0

    def sums(self, values: jax.Array) -> jax.Array:
        """Sums over each patch's pixels: float [..., H, W, C] -> float [..., P, C]."""
        rows, cols = (jnp.asarray(axis, values.dtype) for axis in self)
        precision = jax.lax.Precision.HIGHEST
        sums = jnp.einsum("iy,...yxc,jx->...ijc", rows, values, cols, precision=precision)
        return sums.reshape(*sums.shape[:-3], self.num_patches, sums.shape[-1])


def nominal(model: PMoEWideResNet, image_shape: tuple[int, int, int]) -> PatchView:
    """The block of pixels that each patch stands for: 4x4 pixels in the paper (Section 5.1).

    Args:
      model: the model; its stride is the side of a block.
      image_shape: (H, W, C).
    """
    probe = _probe(model)
    stride = 256 // _grid_size(probe, 256)
    axes = []
    for size in image_shape[:2]:
        patches = np.arange(_grid_size(probe, size))
        axes.append(np.arange(size) // stride == patches[:, None])
    return PatchView(*axes)


def receptive_field(model: PMoEWideResNet, image_shape: tuple[int, int, int]) -> PatchView:
    """All pixels that can influence each patch's features: 17x17 in the paper's model.

    Args:
      model: the model.
      image_shape: (H, W, C).
    """
    probe = _probe(model)
    return PatchView(*(_seen_pixels(probe, size) for size in image_shape[:2]))


def changed_pixels(trigger: triggers.Trigger) -> jax.Array:
    """Pixels that a trigger can change, bool [H, W]: those it changes in images of noise."""
    noise = jax.random.uniform(jax.random.key(0), (4, *trigger.pattern.shape))
    return (triggers.apply(noise, trigger) != noise).any((0, -1))


# --- What is selected -----------------------------------------------------------------------


def selection_mask(indices: ArrayLike, num_patches: int) -> jax.Array:
    """Selected patches as a mask: int [..., K] -> bool [..., P]."""
    return jax.nn.one_hot(indices, num_patches, dtype=bool).any(-2)


def frequency(
    indices: ArrayLike, labels: ArrayLike, num_patches: int, num_classes: int
) -> tuple[jax.Array, jax.Array]:
    """How often each expert takes each patch, over all images and by class.

    Args:
      indices: int [N, E, K].
      labels: int [N].
      num_patches, num_classes: P and Y.

    Returns:
      float32 [E, P] and [Y, E, P], shares of the images in [0, 1]; nan for a class without images.
    """
    mask = selection_mask(indices, num_patches).astype(jnp.float32)
    of_class = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    by_class = jnp.einsum("nl,nep->lep", of_class, mask, precision=jax.lax.Precision.HIGHEST)
    return mask.mean(0), by_class / of_class.sum(0)[:, None, None]


def entropy_bits(shares: ArrayLike) -> jax.Array:
    """Entropy of the patches an expert takes, in bits: at most log2(P), which is "all alike".

    An expert that takes the same K patches of every image has log2(K): no expert has less.

    Args:
      shares: float [..., P], selection frequencies.
    """
    shares = jnp.asarray(shares)
    p = shares / shares.sum(-1, keepdims=True)
    return -(p * jnp.log2(jnp.where(p > 0, p, 1.0))).sum(-1)


def iou(a: ArrayLike, b: ArrayLike, num_patches: int) -> jax.Array:
    """Patches that two selections share, divided by those in at least one of them.

    Args:
      a, b: int [..., K].
      num_patches: P.

    Returns:
      float32 [...] in [0, 1].
    """
    first, second = selection_mask(a, num_patches), selection_mask(b, num_patches)
    return (first & second).sum(-1) / (first | second).sum(-1)


def overlap(indices: ArrayLike, num_patches: int) -> jax.Array:
    """Mean IoU between the selections of each two experts: int [N, E, K] -> float32 [E, E]."""
    indices = jnp.asarray(indices)
    return iou(indices[:, :, None], indices[:, None], num_patches).mean(0)


def unused(indices: ArrayLike, num_patches: int) -> jax.Array:
    """Share of an image's patches that no expert takes, mean over images: [N, E, K] -> [].

    A patch that nobody takes does not reach the classifier, whatever is in it.
    """
    taken = selection_mask(indices, num_patches).any(-2)
    return 1.0 - taken.mean()


class Capture(NamedTuple):
    """How often a set T of patches is selected, as shares of the images in [0, 1].

    Attributes:
      share: float [E], mean share of T's patches that the expert takes.
      expert: float [E], images in which the expert takes at least one of T.
      any_expert: float [], images in which at least one expert does.
      all_experts: float [], images in which all experts do.
    """

    share: Any
    expert: Any
    any_expert: Any
    all_experts: Any


def capture(indices: ArrayLike, patches: ArrayLike) -> Capture:
    """How often patches are selected. Of an empty set, `share` is nan and the rest is 0.

    Args:
      indices: int [N, E, K].
      patches: bool [P], the set T.
    """
    patches = jnp.asarray(patches, bool)
    taken = selection_mask(indices, patches.size) & patches
    hit = taken.any(-1)
    return Capture(
        share=taken.sum(-1).mean(0) / patches.sum(),
        expert=hit.mean(0),
        any_expert=hit.any(-1).mean(),
        all_experts=hit.all(-1).mean(),
    )


def chance_capture(size: int, num_patches: int, k: int, experts: int) -> Capture:
    """`capture` of `size` patches by experts that draw k of all patches at random, independently.

    At least one of them is drawn with probability 1 - C(P - size, k) / C(P, k).
    """
    p = 1 - math.comb(num_patches - size, k) / math.comb(num_patches, k)
    share = k / num_patches if size else math.nan
    return Capture(
        share=np.full(experts, share),
        expert=np.full(experts, p),
        any_expert=1 - (1 - p) ** experts,
        all_experts=p**experts,
    )


def captured_change(indices: ArrayLike, change: ArrayLike) -> jax.Array:
    """Share of what the trigger changes that lies in the patches an expert takes.

    For triggers that touch all patches, where `capture` says little; chance is K / P.

    Args:
      indices: int [N, E, K].
      change: float [N, P], summed absolute change of each patch's pixels.

    Returns:
      float [N, E] in [0, 1]; nan where the trigger changes nothing.
    """
    indices, change = jnp.asarray(indices), jnp.asarray(change)
    taken = jnp.take_along_axis(change[:, None], indices, axis=-1).sum(-1)
    return taken / change.sum(-1)[:, None]


# --- What is in a patch ---------------------------------------------------------------------


def quantities(channels: int, block: int) -> dict[str, float]:
    """Name -> largest value of what `patch_values` measures, in its order; the smallest is 0.

    Args:
      channels: of the images, 3 (red, green, blue) or 1.
      block: pixels of a nominal patch.
    """
    colours = ("red", "green", "blue") if channels == 3 else ()
    means = dict.fromkeys((*colours, "luminance"), 1.0)
    return {"sum": float(block * channels), **means, "contrast": 0.5, "edges": math.sqrt(2)}


def patch_values(images: jax.Array, view: PatchView) -> jax.Array:
    """What the pixels of each patch are like.

    - sum: over pixels and channels (what the paper's Figure 5 must show; quirk A4);
    - red, green, blue, luminance (ITU-R 601 weights): means;
    - contrast: standard deviation of the luminance;
    - edges: mean size of the luminance's gradient (central differences, one-sided at the border of
      the image).

    Args:
      images: float [B, H, W, C] in [0, 1].
      view: the nominal patches.

    Returns:
      float [B, P, Q], quantities in the order of `quantities`.
    """
    channels = images.shape[-1]
    weights = jnp.asarray([0.299, 0.587, 0.114] if channels == 3 else [1.0 / channels] * channels)
    grey = (images * weights).sum(-1)
    vertical, horizontal = jnp.gradient(grey, axis=(1, 2))
    edges = jnp.sqrt(vertical**2 + horizontal**2)
    count = view.sums(jnp.ones((*images.shape[1:3], 1)))
    mean_grey = view.sums(grey[..., None]) / count
    # Around each patch's own mean: the mean square minus the squared mean loses digits.
    patch_mean = _spread(mean_grey[..., 0], view)
    variance = view.sums(((grey - patch_mean) ** 2)[..., None]) / count
    sums = view.sums(images)
    colours = sums / count if channels == 3 else sums[..., :0]
    parts = [
        sums.sum(-1, keepdims=True),
        colours,
        mean_grey,
        jnp.sqrt(variance),
        view.sums(edges[..., None]) / count,
    ]
    return jnp.concatenate(parts, axis=-1)


def inside_boxes(boxes: ArrayLike, view: PatchView) -> jax.Array:
    """Share of each patch's area inside the image's box.

    Args:
      boxes: float [B, 4], (x1, y1, x2, y2) in pixels; pixel i covers i to i + 1.
      view: the nominal patches.

    Returns:
      float [B, P] in [0, 1]; nan for images whose box is empty, which stands for "unknown".
    """
    x1, y1, x2, y2 = jnp.moveaxis(jnp.asarray(boxes, jnp.float32), -1, 0)[..., None]

    def covered(low: jax.Array, high: jax.Array, size: int) -> jax.Array:
        pixel = jnp.arange(size, dtype=jnp.float32)
        return jnp.clip(jnp.minimum(high, pixel + 1) - jnp.maximum(low, pixel), 0, 1)

    rows = covered(y1, y2, view.rows.shape[1])[:, :, None]
    cols = covered(x1, x2, view.cols.shape[1])[:, None, :]
    area = view.sums(jnp.ones((view.rows.shape[1], view.cols.shape[1], 1)))[..., 0]
    inside = view.sums((rows * cols)[..., None])[..., 0] / area
    known = (x2 > x1) & (y2 > y1)
    return jnp.where(known, inside, jnp.nan)


def mean_over_selected(indices: ArrayLike, values: ArrayLike) -> jax.Array:
    """Mean of a patch value over the selected patches: [N, E, K] and [N, P] -> [N, E]."""
    values = jnp.asarray(values)
    return jnp.take_along_axis(values[:, None], jnp.asarray(indices), axis=-1).mean(-1)


# --- Causes ---------------------------------------------------------------------------------


def gates_at(logits: jax.Array, indices: jax.Array) -> jax.Array:
    """The routers' own gates at other positions: [B, E, P] and [B, E, K] -> [B, E, K]."""
    return jnp.take_along_axis(jax.nn.softmax(logits), indices, axis=-1)


def force(routing: Routing, patches: ArrayLike, take: bool) -> tuple[jax.Array, jax.Array]:
    """The routing with patches forced into, or kept out of, every expert's selection.

    The other places go to the patches of the highest scores, so that of K or more forced patches
    the best K are taken. Fewer than K allowed patches cannot keep the others out: they fill up.

    Args:
      routing: the model's own.
      patches: bool [P].
      take: force in (True) or keep out (False).

    Returns:
      Indices int32 [B, E, K], and the routers' own gates there.
    """
    patches = jnp.asarray(patches, bool)
    order = jnp.argsort(-routing.logits, axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    # Whole numbers, so that no score is rounded; without forced patches this is the routers' order.
    preference = jnp.where(patches == take, patches.size, 0) - rank
    indices = jax.lax.top_k(preference, routing.indices.shape[-1])[1]
    return indices, gates_at(routing.logits, indices)


def subsets(experts: int) -> np.ndarray:
    """All subsets of experts, bool [S, E] with S = 2^E: subset s has expert e if bit e of s is set.

    Raises:
      PmoeError: more than `MOST_EXPERTS` experts.
    """
    if experts > MOST_EXPERTS:
        raise PmoeError(
            f"{experts} experts have 2^{experts} subsets; silencing works up to {MOST_EXPERTS} "
            "experts: analyse without causes (--nocauses)"
        )
    members = [[bool(s >> e & 1) for e in range(experts)] for s in range(2**experts)]
    return np.asarray(members)


def shapley(values: ArrayLike) -> np.ndarray:
    """Each expert's Shapley share of a figure that is known for every subset of kept experts.

    An expert's share is what it adds to the experts before it, averaged over all orders in which
    they can be added. The shares sum to the figure with all experts minus the one with none.

    Args:
      values: float [..., S], the figure with only the experts of `subsets` kept.

    Returns:
      float64 [..., E].
    """
    values = np.asarray(values, np.float64)
    experts = values.shape[-1].bit_length() - 1
    kept = subsets(experts)
    if len(kept) != values.shape[-1]:
        raise PmoeError(f"{values.shape[-1]} values are not one for each subset; give 2^E of them")
    size = kept.sum(1)[:, None]
    factorial = np.array([math.factorial(i) for i in range(experts + 1)])
    joining = factorial[np.maximum(size - 1, 0)] * factorial[experts - size]
    staying = factorial[size] * factorial[np.maximum(experts - size - 1, 0)]
    return values @ (np.where(kept, joining, -staying) / factorial[experts])


class SwapShares(NamedTuple):
    """The rise of the target rate by the trigger, split in two: `routing + computation`."""

    routing: np.ndarray
    computation: np.ndarray


def swap_shares(
    clean: ArrayLike,
    triggered: ArrayLike,
    triggered_with_clean_routing: ArrayLike,
    clean_with_triggered_routing: ArrayLike,
) -> SwapShares:
    """How much of the ASR comes by which patches are taken, and how much by what is in them.

    The Shapley shares of two players, the triggered image's routing and its features; they sum to
    `triggered - clean`. All arguments are rates of predicting the target, of any shape.
    """
    neither, both = np.asarray(clean), np.asarray(triggered)
    features = np.asarray(triggered_with_clean_routing)
    routing = np.asarray(clean_with_triggered_routing)
    return SwapShares(
        routing=((routing - neither) + (both - features)) / 2,
        computation=((features - neither) + (both - routing)) / 2,
    )


def observe(
    model: PMoEWideResNet,
    variables: Any,
    images: jax.Array,
    trigger: triggers.Trigger | None = None,
    nominal_patches: Any = None,
    field_patches: Any = None,
    causes: bool = True,
) -> dict[str, jax.Array]:
    """One member's routing and predictions on images as they are, with the trigger, and forced.

    D is 2, or 1 without a trigger. The forms of an image (V forcings, S silenced subsets) are
    vmapped over what differs between them, so that the features are computed once.

    Args:
      model: the model (static).
      variables: {"params", "batch_stats"} of one member.
      images: float [B, H, W, C] in [0, 1].
      trigger: the member's trigger.
      nominal_patches, field_patches: bool [P], the trigger's patches; needed with a trigger.
      causes: force and silence, too.

    Returns:
      "indices" int32 [D, B, E, K], "gates" float [D, B, E, K], "predicted" int32 [D, B];
      with causes "silenced" int32 [D, len(SILENCE_MODES), S, B], the classes seen when only the
      experts of `subsets` are kept; with causes and a trigger "forced" int32 [D, V, B], the classes
      seen under `FORCINGS`.
    """
    apply: Any = model.apply
    batch = images.shape[0]
    inputs = images
    if trigger is not None:
        inputs = jnp.concatenate([images, triggers.apply(images, trigger)])

    def by_condition(array: jax.Array, axis: int) -> jax.Array:
        split = array.reshape(*array.shape[:axis], -1, batch, *array.shape[axis + 1 :])
        return jnp.moveaxis(split, axis, 0)

    def classes(**options: Any) -> jax.Array:
        return metrics.predicted_classes(apply(variables, inputs, **options))

    logits, routing = apply(variables, inputs, return_routing=True)
    seen = {
        "indices": by_condition(routing.indices, 0),
        "gates": by_condition(routing.gates, 0),
        "predicted": by_condition(metrics.predicted_classes(logits), 0),
    }
    if not causes:
        return seen
    kept = jnp.asarray(subsets(model.num_experts))
    silenced = [
        jax.vmap(lambda mask: classes(expert_mask=mask, silence=mode))(kept)  # noqa: B023
        for mode in models.SILENCE_MODES
    ]
    seen["silenced"] = by_condition(jnp.stack(silenced), 2)
    if trigger is not None:
        # Clean and triggered images lie one behind the other: half a turn swaps them.
        other = jax.tree.map(lambda leaf: jnp.roll(leaf, batch, axis=0), routing)
        choices = [
            (other.indices, other.gates),
            (other.indices, gates_at(routing.logits, other.indices)),
            *(
                force(routing, patches, take)
                for patches, take in itertools.product(
                    (nominal_patches, field_patches), (True, False)
                )
            ),
        ]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *choices)
        forced = jax.vmap(lambda chosen: classes(routing=chosen))(stacked)
        seen["forced"] = by_condition(forced, 1)
    return seen


# --- Helpers --------------------------------------------------------------------------------


def _features(model: PMoEWideResNet, variables: Any, images: jax.Array) -> jax.Array:
    """The feature grid float [B, h, w, C]."""
    _, state = model.apply(variables, images, mutable=["intermediates"])
    return state["intermediates"]["features"][0]


def _probe(model: PMoEWideResNet) -> PMoEWideResNet:
    """The same architecture, as small as it goes: extents do not depend on widths."""
    return model.clone(
        num_classes=1, width=1, num_experts=1, patches_per_expert=1, dtype=None, kernels="plain"
    )


@functools.lru_cache(maxsize=64)
def _grid_size(probe: PMoEWideResNet, size: int) -> int:
    """Positions of the feature grid along an axis of `size` pixels."""
    images = jnp.zeros((1, size, _THIN, 1))
    made = jax.eval_shape(lambda: probe.init(jax.random.key(0), images, mutable=True))
    return made["intermediates"]["features"][0].shape[1]


@functools.lru_cache(maxsize=64)
def _seen_pixels(probe: PMoEWideResNet, size: int) -> np.ndarray:
    """Which of `size` pixels along an axis each grid position sees, bool [positions, size].

    One line of a dark image after the other is lit, in a network with kernels of ones, where no
    influence can cancel out. Kernels and strides are square, so both axes are alike, and what
    happens along one does not depend on the other.
    """
    images = np.broadcast_to(
        np.eye(size, dtype=np.float32)[:, :, None, None], (size, size, _THIN, 1)
    )
    abstract = jax.eval_shape(lambda: probe.init(jax.random.key(0), images[:1]))
    ones = ("kernel", "scale", "var")
    variables = jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.full(leaf.shape, float(path[-1].key in ones), leaf.dtype), abstract
    )
    features = jax.jit(lambda v, x: _features(probe, v, x))(variables, images)
    return np.any(np.asarray(features) > 0, axis=(2, 3)).T


def _spread(values: jax.Array, view: PatchView) -> jax.Array:
    """Gives every pixel its nominal patch's value: [B, P] -> [B, H, W]."""
    grid = values.reshape(-1, *view.grid)
    return grid[:, view.rows.argmax(0)][:, :, view.cols.argmax(0)]
