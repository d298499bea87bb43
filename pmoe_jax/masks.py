"""Parameter masks: which weights are kept and which are pruned, as pytrees.

A mask is a pytree of the parameters' structure, or a prefix of it: a leaf of the mask may stand
for a whole subtree. Its leaves broadcast to the parameters they mask; nonzero (True) keeps, zero
(False) prunes. Everything works under jit and vmap, so that members (seeds, pruning rates) can
have masks of their own on a leading axis. Pruning by masks that are held in fine-tuning: Liu,
Dolan-Gavitt and Garg, "Fine-Pruning", 2018 (the paper, Sections 4 and 5.3).
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from pmoe_jax.errors import PmoeError, compiled, shown

PyTree = Any


def ones_like(params: PyTree) -> PyTree:
    """The mask that keeps everything: bool leaves of the parameters' shapes."""
    return jax.tree.map(lambda leaf: jnp.ones(jnp.shape(leaf), bool), params)


def apply(params: PyTree, mask: PyTree) -> PyTree:
    """The parameters with pruned entries exactly zero (also those that are not finite).

    Raises:
      PmoeError: the mask is no prefix of the parameters, or a leaf does not broadcast.
    """
    return jax.tree.map(
        lambda leaf, keep: jnp.where(keep != 0, leaf, jnp.zeros_like(leaf)),
        params,
        expand(params, mask),
    )


def expand(params: PyTree, mask: PyTree) -> PyTree:
    """The mask with one bool leaf for every leaf of the parameters, of the same shape.

    Raises:
      PmoeError: as `apply`.
    """

    def broadcast(path: Any, keep: ArrayLike, subtree: PyTree) -> PyTree:
        def to_leaf(leaf: jax.Array) -> jax.Array:
            try:
                return jnp.broadcast_to(jnp.asarray(keep) != 0, leaf.shape)
            except ValueError:
                raise PmoeError(
                    f"mask of shape {jnp.shape(keep)} does not fit parameter "
                    f"{leaf_name(path) or 'tree'} of shape {leaf.shape}"
                ) from None

        return jax.tree.map(to_leaf, subtree)

    try:
        return jax.tree_util.tree_map_with_path(broadcast, mask, params)
    except (ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise PmoeError(f"mask does not have the parameters' structure: {reason}") from None


def combine(params: PyTree, *masks: PyTree) -> PyTree:
    """The mask that keeps what all the given masks keep, expanded to the parameters."""
    combined = ones_like(params)
    for mask in masks:
        combined = jax.tree.map(jnp.logical_and, combined, expand(params, mask))
    return combined


def channel_mask(params: PyTree, pattern: str, keep: ArrayLike) -> PyTree:
    """A mask that prunes output channels of the layers whose names match.

    Args:
      params: parameter pytree; a leaf's name is its path, for example "experts/conv/kernel".
      pattern: regular expression that must match the whole name, for example
        ".*experts/conv/(kernel|bias)" for the weights and biases of one layer.
      keep: nonzero for channels that stay, [C], or with the leading axes of the leaf: [E, C] for
        layers stacked over experts. The last axis of every matching leaf must be C.

    Returns:
      A mask with bool leaves that broadcast to the parameters; leaves that do not match are kept.

    Raises:
      PmoeError: no regular expression, no parameter that matches, or `keep` does not fit one.
    """
    keep = jnp.asarray(keep) != 0
    matches = compiled(pattern).fullmatch
    matched = []

    def leaf_mask(path: Any, leaf: jax.Array) -> jax.Array:
        name = leaf_name(path)
        if not matches(name):
            return jnp.ones(leaf.shape, bool)
        matched.append(name)
        lead = keep.ndim - 1
        if keep.ndim > leaf.ndim or leaf.shape[:lead] + leaf.shape[-1:] != keep.shape:
            raise PmoeError(
                f"channel mask of shape {keep.shape} does not fit {name} of shape {leaf.shape}: "
                "its axes must be the first ones and the last one of the parameter"
            )
        shape = keep.shape[:lead] + (1,) * (leaf.ndim - keep.ndim) + keep.shape[-1:]
        return jnp.broadcast_to(keep.reshape(shape), leaf.shape)

    mask = jax.tree_util.tree_map_with_path(leaf_mask, params)
    if not matched:
        names = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        raise PmoeError(
            f"no parameter matches {shown(pattern)}: names are like {', '.join(names[:3])}"
        )
    return mask


def fraction_pruned(params: PyTree, mask: PyTree, pattern: str = ".*") -> jax.Array:
    """Share of parameters that the mask prunes, float32 in [0, 1].

    Args:
      params: parameter pytree.
      mask: its mask.
      pattern: regular expression for the names of the parameters that count, as in `channel_mask`.

    Raises:
      PmoeError: no regular expression, no parameter that matches, or as `apply`.
    """
    matches = compiled(pattern).fullmatch
    leaves = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(expand(params, mask))
        if matches(leaf_name(path))
    ]
    if not leaves:
        raise PmoeError(f"no parameter matches {shown(pattern)}")
    pruned = sum(jnp.sum(~leaf, dtype=jnp.float32) for leaf in leaves)
    return pruned / sum(leaf.size for leaf in leaves)


def hold(
    transformation: optax.GradientTransformation, mask: PyTree
) -> optax.GradientTransformationExtraArgs:
    """An optimiser that leaves pruned parameters where they are.

    Gradients are masked before the inner transformation, so that pruned entries gather no momentum
    and do not count in a global norm; updates are masked after it, so that weight decay or noise
    cannot move them either. Parameters that start at zero (`apply`) therefore stay exactly zero.

    Args:
      transformation: the optimiser without masks.
      mask: of the parameters; its leaves broadcast to them.

    Returns:
      An optimiser whose state is that of `transformation`; `update` raises a `PmoeError` where the
      mask does not fit.

    For a mask of each member, build the optimiser inside vmap:
    `jax.vmap(lambda g, s, p, m: hold(tx, m).update(g, s, p))`.
    """
    inner = optax.with_extra_args_support(transformation)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        new_updates, new_state = inner.update(apply(updates, mask), state, params, **extra_args)
        return apply(new_updates, mask), new_state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def leaf_name(path: Any) -> str:
    """A parameter's name from its path in the pytree, such as experts/conv/kernel."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
