"""Defences against backdoors, as pure functions on models, variables and arrays.

Axes: M member, B batch, P patch, E expert, K selected patches, C channel, R pruning rate (or any
other set of masks that one program tries), Y class, H W image.

- Fine-Pruning (Liu, Dolan-Gavitt and Garg, 2018; the paper, Sections 4 and 5.3): channels that
  clean images hardly activate are pruned, then the model is fine-tuned. `channel_activations`
  measures, `keep_channels` chooses, `prune_mask` makes the parameters' mask, `pruned_predictions`
  evaluates many masks in one program, and `fine_tune_step` trains with the mask held.
- What only a mixture of experts has: `expert_subset_predictions`; routers alone with
  `matching_mask`, drawn anew with `reinitialise`.
- Neural Cleanse (Wang et al., 2019): `invert_triggers`, `anomaly_indices`.
- STRIP (Gao et al., 2019): `strip_entropies`, `strip_rates`.

The last two take any `logits_of(variables, images)`. `pmoe_jax.defend` runs all of them on a
trained run.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from pmoe_jax import kernels, masks, metrics, poisoning, training, triggers
from pmoe_jax.errors import PmoeError, compiled, shown
from pmoe_jax.members import Attack
from pmoe_jax.training import TrainState

OUTPUTS = ("nonlinear", "raw")
POSITIONS = ("selected", "all")

PyTree = Any
LogitsOf = Callable[[Any, jax.Array], jax.Array]

# --- Which channels ---------------------------------------------------------------------------


def conv_layers(params: PyTree) -> list[str]:
    """Names of the prunable layers: everything with kernel and bias but the classifier."""
    names = {masks.leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    layers = [name.removesuffix("/kernel") for name in sorted(names) if name.endswith("/kernel")]
    return [name for name in layers if f"{name}/bias" in names and name != "classifier"]


def last_conv(params: PyTree) -> str:
    """The layer that the paper prunes: the last convolution of every expert.

    The dense counterpart has no experts; there it is the last convolution of the last group.
    """
    if "experts" in params:
        return "experts/conv2" if "conv2" in params["experts"] else "experts/conv"
    return "group3/conv2"


def match_layers(params: PyTree, pattern: str) -> list[str]:
    """Layers whose whole name matches a regular expression; "" means `last_conv`.

    Raises:
      PmoeError: none matches, or the pattern is no regular expression.
    """
    if not pattern:
        return [last_conv(params)]
    names, matches = conv_layers(params), compiled(pattern).fullmatch
    found = [name for name in names if matches(name)]
    if not found:
        raise PmoeError(f"no layer matches {shown(pattern)}; the layers are {', '.join(names)}")
    return found


def norm_behind(params: PyTree, layer: str) -> str:
    """The batch norm that a layer's output enters next (with others' where outputs are added)."""
    group, _, name = layer.rpartition("/")
    if layer == "stem":
        return "group1/norm1"
    if layer == "patch_conv":
        return "experts/norm"
    if group == "experts":
        return "experts/norm2" if name == "conv" and "conv2" in params[group] else "head_norm"
    if name == "conv1":
        return f"{group}/norm2"
    following = f"group{int(group.removeprefix('group')) + 1}"
    return f"{following}/norm1" if following in params else "norm"


def channel_activations(
    model: Any,
    variables: PyTree,
    images: jax.Array,
    layers: Sequence[str],
    *,
    output: str = "nonlinear",
    absolute: bool = False,
    positions: str = "selected",
) -> dict[str, jax.Array]:
    """Mean activation of every output channel of some layers, for each image.

    The mean over a data set is the mean over its images. The authors' code (quirk A5) is
    `output="raw", positions="all"`; the default is Fine-Pruning's own definition, the activation
    behind the nonlinearity.

    Args:
      model: `PMoEWideResNet` or `WideResNet`.
      variables: {"params", "batch_stats"} of one member.
      images: float [B, H, W, C] in [0, 1].
      layers: names as in `conv_layers`.
      output: "raw", what the convolution gives, or "nonlinear", behind the following batch norm
        (`norm_behind`) and ReLU.
      absolute: take absolute values before the means; of consequence for raw outputs.
      positions: of an expert's map, "selected" for the K patches it took, or "all" for all P: the
        P - K others hold a constant. Layers before the experts have their means over all.

    Returns:
      Layer -> float [B, E, C] for layers of the experts, [B, C] for others.
    """
    if output not in OUTPUTS or positions not in POSITIONS:
        raise PmoeError(f"output={output!r} is one of {OUTPUTS}, positions of {POSITIONS}")
    raw = output == "raw"
    wanted = {layer: layer if raw else norm_behind(variables["params"], layer) for layer in layers}

    def is_wanted(module: Any, method: str) -> bool:
        return method == "__call__" and "/".join(module.path) in wanted.values()

    _, state = model.apply(
        variables, images, capture_intermediates=is_wanted, mutable=["intermediates"]
    )
    captured = state["intermediates"]
    num_patches = int(np.prod(captured["features"][0].shape[1:3])) if "features" in captured else 0

    def means(layer: str) -> jax.Array:
        node = captured
        for part in wanted[layer].split("/"):
            node = node[part]
        found = node["__call__"][0]
        if not raw:
            found = jax.tree.map(jax.nn.relu, found)  # Of the experts, norms come without.
        mean = position_means(found, num_patches, absolute=absolute, positions=positions)
        # What the experts' first norm sees of the patch convolution counts for all of them.
        return mean.mean(1) if layer == "patch_conv" and mean.ndim == 3 else mean

    return {layer: means(layer) for layer in layers}


def position_means(
    output: Any, num_patches: int, *, absolute: bool = False, positions: str = "selected"
) -> jax.Array:
    """Means over positions of one layer's output.

    Args:
      output: [B, ..., C], or an expert map: `selected` [B, E, K, C] and `rest` [E, C], which is
        what each of the P - K other positions holds.
      num_patches: P.
      absolute, positions: see `channel_activations`.

    Returns:
      float [B, C] or [B, E, C].
    """
    if absolute:
        output = jax.tree.map(jnp.abs, output)
    if not hasattr(output, "rest"):
        return output.mean(tuple(range(1, output.ndim - 1)))
    if positions == "selected":
        return output.selected.mean(2)
    others = num_patches - output.selected.shape[2]
    return (output.selected.sum(2) + others * output.rest) / num_patches


def prune_count(rate: float, channels: int) -> int:
    """floor(rate * channels), the rate taken as the number that is meant by its digits."""
    if not 0 <= rate <= 1:
        raise PmoeError(f"pruning rate is {rate}; use a number from 0 to 1")
    return poisoning.rounded_down(rate, channels)


def keep_channels(
    activations: jax.Array, rates: Sequence[float], *, together: bool = False
) -> jax.Array:
    """Which channels stay when the least active fraction goes; of equals, the first go first.

    Works under vmap over members.

    Args:
      activations: float [E, C] (ranked within each expert) or [C].
      rates: R pruning rates, 0 to 1.
      together: rank all experts' channels together, so that experts may lose different numbers.

    Returns:
      bool [R, E, C] or [R, C].
    """
    ranked = activations.reshape(-1) if together else activations
    counts = jnp.asarray([prune_count(rate, ranked.shape[-1]) for rate in rates])
    rank = jnp.argsort(jnp.argsort(ranked, axis=-1, stable=True), axis=-1)
    keep = rank >= counts.reshape(-1, *(1,) * ranked.ndim)
    return keep.reshape(len(rates), *activations.shape)


def prune_mask(
    params: PyTree, keeps: Mapping[str, ArrayLike], *, silence_constant: bool = False
) -> PyTree:
    """The mask of the parameters that prunes weights and biases of channels.

    Args:
      params: parameters of one member.
      keeps: layer -> bool [C], or [E, C] for layers of the experts.
      silence_constant: also prune scale and bias of the following batch norm, through which a
        zeroed channel still sends a constant (bias - mean * scale / sd).

    Returns:
      A mask for `masks.apply` and `masks.hold`, of the parameters' shapes.

    Raises:
      PmoeError: a layer whose batch norm carries other channels, too, cannot be silenced.
    """
    mask = masks.ones_like(params)
    for layer, keep in keeps.items():
        parts = {f"{layer}/(kernel|bias)": keep}
        if silence_constant:
            if layer.rpartition("/")[2] == "shortcut" or re.fullmatch(r"group\d+/conv2", layer):
                raise PmoeError(
                    f"the constant of {layer} cannot be silenced: its output is added to another "
                    "layer's before the batch norm; leave the layer or silence_constant out"
                )
            parts[f"{norm_behind(params, layer)}/(scale|bias)"] = keep
        for pattern, kept in parts.items():
            mask = masks.combine(params, mask, masks.channel_mask(params, pattern, kept))
    return mask


def stopping_rate(rates: Sequence[float], accuracies: Sequence[float], drop: float) -> float:
    """Fine-Pruning's stopping rule: prune until held-out accuracy has dropped by a threshold.

    Args:
      rates: ascending pruning rates; the first is 0.
      accuracies: held-out accuracy at each, in percent.
      drop: percentage points that may be lost.

    Returns:
      The last rate before accuracy first falls more than `drop` below that of the first.
    """
    within = np.asarray(accuracies) >= accuracies[0] - drop
    first_bad = len(rates) if within.all() else int(np.argmin(within))
    return rates[max(first_bad - 1, 0)]


# --- Many masks in one program ----------------------------------------------------------------


def pruned_predictions(
    model: Any,
    variables: PyTree,
    keeps: Mapping[str, jax.Array],
    images: jax.Array,
    trigger: triggers.Trigger | None = None,
    *,
    silence_constant: bool = False,
) -> jax.Array:
    """Classes that one member sees under each of R masks: the inner part of a pruning curve.

    What lies before the pruned layers is computed once. Map over members with
    `training.over_members`.

    Args:
      model, variables: of one member.
      keeps: layer -> bool [R, ...], as `keep_channels` gives.
      images: float [B, H, W, C] in [0, 1].
      trigger: applied to the images first, if given.
      silence_constant: see `prune_mask`.

    Returns:
      int32 [R, B].
    """
    inputs = images if trigger is None else triggers.apply(images, trigger)

    def one(keep: Mapping[str, jax.Array]) -> jax.Array:
        mask = prune_mask(variables["params"], keep, silence_constant=silence_constant)
        pruned = {**variables, "params": masks.apply(variables["params"], mask)}
        return metrics.predicted_classes(model.apply(pruned, inputs))

    return jax.vmap(one)(keeps)


def expert_subsets(num_experts: int) -> np.ndarray:
    """All non-empty subsets of experts that can be kept: bool [2^E - 1, E], the largest first.

    The first one keeps all experts, and is the undefended model.

    Raises:
      PmoeError: more than 10 experts, or none.
    """
    if num_experts < 1:
        raise PmoeError(f"{num_experts} experts have no subsets; use 1 to 10")
    if num_experts > 10:
        raise PmoeError(f"{num_experts} experts have 2^{num_experts} subsets; at most 10 experts")
    subsets = sorted(itertools.product((True, False), repeat=num_experts), key=sum, reverse=True)
    return np.asarray(subsets[:-1])


def expert_subset_predictions(
    model: Any,
    variables: PyTree,
    subsets: jax.Array,
    images: jax.Array,
    trigger: triggers.Trigger | None = None,
    *,
    silence: str = "zero",
) -> jax.Array:
    """Classes int32 [R, B] that one member sees with only a subset of its experts.

    Args:
      model, variables: of one member, a `PMoEWideResNet`.
      subsets: bool [R, E], experts that stay.
      images: float [B, H, W, C] in [0, 1].
      trigger: applied to the images first, if given.
      silence: what pruned experts send, "zero" or (their running) "mean".
    """
    inputs = images if trigger is None else triggers.apply(images, trigger)

    def one(subset: jax.Array) -> jax.Array:
        logits = model.apply(variables, inputs, expert_mask=subset, silence=silence)
        return metrics.predicted_classes(logits)

    return jax.vmap(one)(subsets)


# --- Fine-tuning ------------------------------------------------------------------------------


def clean_set(attack: Attack, contaminated: ArrayLike = False) -> Attack:
    """The training set that a defender fine-tunes on: true labels, and no trigger.

    Args:
      attack: the member's attack.
      contaminated: quirk A2: triggered images stay triggered, with their true labels. The
        authors' code does so by accident with the square, and thereby unlearns the trigger.
    """
    return attack.replace(  # type: ignore[attr-defined]
        triggered=attack.triggered & jnp.asarray(contaminated),
        relabelled=jnp.zeros_like(attack.relabelled),
    )


def matching_mask(params: PyTree, pattern: str) -> PyTree:
    """The mask that leaves only parameters free whose whole name matches, to be held.

    Raises:
      PmoeError: none matches, or the pattern is no regular expression.
    """
    names = [masks.leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    matches = compiled(pattern).fullmatch
    if not any(map(matches, names)):
        near = difflib.get_close_matches(pattern, names, 1, 0.0)[0]
        raise PmoeError(f"no parameter matches {shown(pattern)}; they are named like {near}")
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.full(leaf.shape, bool(matches(masks.leaf_name(path)))),
        params,
    )


def reinitialise(params: PyTree, fresh: PyTree, pattern: str) -> PyTree:
    """The parameters, with those whose whole name matches taken from `fresh`."""
    chosen = matching_mask(params, pattern)
    return jax.tree.map(jnp.where, chosen, fresh, params)


def fine_tune_step(
    model: Any,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    mask: PyTree,
    images: jax.Array,
    labels: jax.Array,
) -> tuple[TrainState, jax.Array]:
    """One fine-tuning step of one member: pruned (or frozen) parameters stay exactly as they are.

    Running statistics go on following the batches, also where parameters are frozen.

    Args:
      model, optimizer: static; the optimiser without its mask.
      state: the member's state; parameters pruned already (`masks.apply`).
      mask: True for parameters that may move. The authors' code lets all move (quirk A5): pruned
        weights then grow again.
      images: float [B, H, W, C] in [0, 1].
      labels: int [B].

    Returns:
      The new state, and the mean cross-entropy before the update.
    """
    return training.member_step(model, masks.hold(optimizer, mask), state, images, labels)


# --- Neural Cleanse ---------------------------------------------------------------------------

#: Scales a median absolute deviation to the standard deviation of a normal distribution.
MAD_CONSISTENCY = 1.4826


@dataclasses.dataclass(frozen=True)
class CleanseSettings:
    """Settings of Neural Cleanse; the defaults are those of the authors' public code for GTSRB.

    Attributes:
      rounds: rounds of optimisation at most (their STEPS).
      batches_per_round, batch_size: a round sees 31 batches of 32 images.
      learning_rate: of Adam with betas (0.5, 0.9).
      initial_cost: weight of the mask's L1 norm, once it is first needed.
      cost_multiplier: the weight grows by it, and shrinks by its 1.5th power.
      success: share of images that must become the class.
      patience: rounds in a row before the weight changes; five times as many without a smaller
        mask end the search.
    """

    rounds: int = 1000
    batches_per_round: int = 31
    batch_size: int = 32
    learning_rate: float = 0.1
    initial_cost: float = 1e-3
    cost_multiplier: float = 2.0
    success: float = 0.99
    patience: int = 5


@flax.struct.dataclass
class Inversion:
    """The search for the smallest trigger of one class; with all classes, a leading Y axis.

    Attributes:
      raw: {"mask" [H, W, 1], "pattern" [H, W, C]}, before tanh.
      opt_state: of Adam.
      cost: weight of the mask's norm.
      good, bad: rounds in a row with and without success.
      raised, lowered: whether the weight was ever raised, lowered.
      settled: rounds in a row of success at weight 0.
      stale: rounds without a smaller mask.
      smallest: the stale count's reference norm.
      best: mask, pattern and norm of the smallest successful trigger; norm infinite before one.
      success: share of images that became the class in the last round.
      done: the search has ended.
    """

    raw: Any
    opt_state: Any
    cost: jax.Array
    good: jax.Array
    bad: jax.Array
    raised: jax.Array
    lowered: jax.Array
    settled: jax.Array
    stale: jax.Array
    smallest: jax.Array
    best: Any
    success: jax.Array
    done: jax.Array


def unwrap_trigger(raw: Any) -> tuple[jax.Array, jax.Array]:
    """Mask [H, W, 1] and pattern [H, W, C] in (0, 1) from the values before tanh."""
    return (jnp.tanh(raw["mask"]) + 1) / 2, (jnp.tanh(raw["pattern"]) + 1) / 2


def invert_triggers(
    logits_of: LogitsOf,
    variables: Any,
    images: np.ndarray,
    num_classes: int,
    *,
    settings: CleanseSettings | None = None,
    seed: int = 0,
    on_round: Callable[[int], None] = lambda number: None,
) -> Inversion:
    """Neural Cleanse's search: for every class the smallest trigger that leads to it.

    Source: Wang et al., "Neural Cleanse", IEEE S&P 2019, Section IV, with the schedule of the
    weight from their public code. All classes are searched for at once.

    Args:
      logits_of: (variables, float images [B, H, W, C] in [0, 1]) -> logits [B, Y]. Compiled once
        for equal functions.
      variables: its first argument.
      images: float [N, H, W, C] in [0, 1], or uint8, clean, of all classes.
      num_classes: Y.
      settings: `CleanseSettings()` by default.
      seed: of starting points and batches.
      on_round: called behind each round.

    Returns:
      The searches [Y, ...]; what was found is in `best`. A class for which no round succeeded has
      the last mask there.
    """
    settings = settings or CleanseSettings()
    programs = _cleanse_programs(logits_of, settings)
    rng = np.random.default_rng(seed)
    keys = jax.random.split(jax.random.key(seed), num_classes)
    state = programs.start(keys, images.shape[1:])
    classes = jnp.arange(num_classes)
    for number in range(settings.rounds):
        hits = norms = 0.0
        for _ in range(settings.batches_per_round):
            batch = images[rng.integers(0, len(images), settings.batch_size)]
            state, accuracy, norm = programs.step(variables, state, classes, batch)
            hits, norms = hits + accuracy, norms + norm
        share = 1 / settings.batches_per_round
        state = programs.adjust(state, hits * share, norms * share)
        on_round(number)
        if bool(state.done.all()):
            break
    return programs.finish(state)


@dataclasses.dataclass(frozen=True)
class _Cleanse:
    start: Any
    step: Any
    adjust: Any
    finish: Any


@functools.lru_cache(maxsize=8)
def _cleanse_programs(logits_of: LogitsOf, settings: CleanseSettings) -> _Cleanse:
    optimizer = optax.adam(settings.learning_rate, b1=0.5, b2=0.9)
    options = kernels.compiler_options(jax.default_backend())

    def start(key: jax.Array, shape: tuple[int, int, int]) -> Inversion:
        mask_key, pattern_key = jax.random.split(key)
        limit = 1 - 1e-6  # Uniform masks and patterns, as they come out of tanh.
        raw = {
            "mask": jax.random.uniform(mask_key, (*shape[:2], 1), minval=-limit, maxval=limit),
            "pattern": jax.random.uniform(pattern_key, shape, minval=-limit, maxval=limit),
        }
        raw = jax.tree.map(jnp.arctanh, raw)
        zero, no = jnp.zeros((), jnp.int32), jnp.zeros((), bool)
        mask, pattern = unwrap_trigger(raw)
        infinite = jnp.asarray(jnp.inf, mask.dtype)
        return Inversion(
            raw=raw, opt_state=optimizer.init(raw), cost=jnp.zeros_like(infinite), good=zero,
            bad=zero, raised=no, lowered=no, settled=zero, stale=zero, smallest=infinite,
            best={"mask": mask, "pattern": pattern, "norm": infinite},
            success=jnp.zeros_like(infinite), done=no,
        )  # fmt: skip

    def step(variables: Any, state: Inversion, target: jax.Array, images: jax.Array) -> Any:
        inputs = training.to_float(images) if images.dtype == jnp.uint8 else images

        def loss_of(raw: Any) -> Any:
            mask, pattern = unwrap_trigger(raw)
            logits = logits_of(variables, (1 - mask) * inputs + mask * pattern)
            labels = jnp.full(len(images), target)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            norm = jnp.abs(mask).sum()
            return losses.mean() + state.cost * norm, ((logits.argmax(-1) == target).mean(), norm)

        gradients, (accuracy, norm) = jax.grad(loss_of, has_aux=True)(state.raw)
        updates, opt_state = optimizer.update(gradients, state.opt_state)
        raw = optax.apply_updates(state.raw, updates)
        new = state.replace(raw=raw, opt_state=opt_state)  # type: ignore[attr-defined]
        return _unless(state.done, new, state), accuracy, norm

    def adjust(state: Inversion, success: jax.Array, norm: jax.Array) -> Inversion:
        return _unless(state.done, _adjusted(state, success, norm, settings), state)

    def finish(state: Inversion) -> Inversion:
        mask, pattern = unwrap_trigger(state.raw)
        last = {**state.best, "mask": mask, "pattern": pattern}
        best = _unless(jnp.isfinite(state.best["norm"]), last, state.best)
        # Rounds are compared by their mean norm; what counts from here on is the mask's own.
        best["norm"] = jnp.abs(best["mask"]).sum()
        return state.replace(best=best)  # type: ignore[attr-defined]

    jit = functools.partial(jax.jit, compiler_options=options)
    return _Cleanse(
        start=jax.jit(jax.vmap(start, in_axes=(0, None)), static_argnums=1),
        step=jit(jax.vmap(step, in_axes=(None, 0, 0, None))),
        adjust=jax.jit(jax.vmap(adjust)),
        finish=jax.jit(jax.vmap(finish)),
    )


def _unless(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda n, o: jnp.where(condition, o, n), new, old)


def _adjusted(
    state: Inversion, success: jax.Array, norm: jax.Array, settings: CleanseSettings
) -> Inversion:
    """What happens behind a round: remember the best trigger, move the weight, maybe end."""
    reached = success >= settings.success
    mask, pattern = unwrap_trigger(state.raw)
    better = reached & (norm < state.best["norm"])
    best = _unless(~better, {"mask": mask, "pattern": pattern, "norm": norm}, state.best)

    # The search ends once the weight has gone both ways and masks get no smaller.
    found = jnp.isfinite(best["norm"])
    stale = jnp.where(found & (best["norm"] >= state.smallest), state.stale + 1, 0)
    smallest = jnp.minimum(state.smallest, best["norm"])
    done = state.raised & state.lowered & (stale >= 5 * settings.patience)

    # The weight is 0 until the class is reached at all; then it follows success.
    settled = jnp.where((state.cost == 0) & reached, state.settled + 1, 0)
    begin = settled >= settings.patience
    # The round that sets it counts already.
    good = jnp.where(reached, jnp.where(begin, 0, state.good) + 1, 0)
    bad = jnp.where(reached, 0, state.bad + 1)
    up, down = good >= settings.patience, bad >= settings.patience
    cost = jnp.where(begin, settings.initial_cost, state.cost)
    cost = jnp.where(up, cost * settings.cost_multiplier, cost)
    cost = jnp.where(down, cost / settings.cost_multiplier**1.5, cost)
    return state.replace(  # type: ignore[attr-defined]
        cost=cost,
        good=jnp.where(up, 0, good),
        bad=jnp.where(down, 0, bad),
        raised=(state.raised & ~begin) | up,
        lowered=(state.lowered & ~begin) | down,
        settled=jnp.where(begin, 0, settled),
        stale=stale,
        smallest=smallest,
        best=best,
        success=success,
        done=done,
    )


def anomaly_indices(norms: ArrayLike) -> np.ndarray:
    """How far each class's mask lies below the median, in consistent deviations: float [Y].

    (median - norm) / (1.4826 MAD); positive for small masks. The largest one is the model's
    anomaly index (Wang et al., Section IV), above 2 suspicious. Where all deviations are 0, so is
    the index of norms that equal the median, and it is infinite for others. NaN throughout if a
    norm is not finite, as of a model whose outputs are not.
    """
    values = np.asarray(norms, np.float64)
    if not np.isfinite(values).all():
        return np.full(values.shape, np.nan)
    below = np.median(values) - values
    deviation = MAD_CONSISTENCY * np.median(np.abs(below))
    if deviation > 0:
        return below / deviation
    return np.where(below == 0, 0.0, np.copysign(np.inf, below))


# --- STRIP ------------------------------------------------------------------------------------


def strip_entropies(
    logits_of: LogitsOf,
    variables: Any,
    images: jax.Array,
    overlays: jax.Array,
    *,
    weight: float = 1.0,
    overlay_weight: float = 1.0,
) -> jax.Array:
    """Mean entropy, in bits, of predictions for an image blended with clean ones.

    Source: Gao et al., "STRIP", ACSAC 2019, equations 3 and 4. A trigger survives the blending, so
    that a triggered image's entropy is low. The default weights are those of the authors' public
    code, which adds the two images; 0.5 and 0.5 give their mean.

    Args:
      logits_of: (variables, float images [B, H, W, C] in [0, 1]) -> logits [B, Y].
      variables: its first argument.
      images: float [B, H, W, C] in [0, 1], under test.
      overlays: float [B, N, H, W, C], N clean images for each; theirs are 100.
      weight, overlay_weight: of the image and of the overlay; the sum is clipped to [0, 1].

    Returns:
      float [B].

    Raises:
      PmoeError: images that are not float, or shapes that do not fit.
    """
    if not all(jnp.issubdtype(each.dtype, jnp.floating) for each in (images, overlays)):
        raise PmoeError(
            f"images are {images.dtype} and overlays {overlays.dtype}; use float in [0, 1]"
        )
    if overlays.ndim != 5 or (overlays.shape[0], *overlays.shape[2:]) != images.shape:
        raise PmoeError(
            f"overlays of shape {overlays.shape} for images of {images.shape}; use [B, N, H, W, C] "
            "and [B, H, W, C]"
        )
    blended = jnp.clip(weight * images[:, None] + overlay_weight * overlays, 0, 1)
    logits = logits_of(variables, blended.reshape(-1, *images.shape[1:]))
    logs = jax.nn.log_softmax(logits)
    entropies = -(jnp.exp(logs) * logs).sum(-1) / jnp.log(2.0)
    return entropies.reshape(overlays.shape[:2]).mean(1)


def strip_rates(
    calibration: ArrayLike, clean: ArrayLike, triggered: ArrayLike, frr: float = 0.01
) -> dict[str, float]:
    """STRIP's threshold, and what it lets pass.

    Args:
      calibration: entropies of clean images that the defender holds.
      clean, triggered: entropies of images under test.
      frr: false rejection rate that the threshold is set for, as the `frr` quantile of a normal
        distribution with the calibration's mean and deviation (Gao et al., Section V; 0.01).

    Returns:
      "threshold" in bits; "frr", clean images at or below it, and "far", triggered images above
      it, in percent. A rate is NaN if an entropy that it is made of is not finite.

    Raises:
      PmoeError: `frr` out of range, or no entropies.
    """
    if not 0 < frr < 1:
        raise PmoeError(f"the false rejection rate is {frr}; use a number between 0 and 1")
    from scipy import stats  # imported here because it is slow to load

    held, clean, triggered = (
        np.asarray(each, np.float64) for each in (calibration, clean, triggered)
    )
    if not (held.size and clean.size and triggered.size):
        raise PmoeError("there are no entropies of one kind; give some of all three")
    threshold = float(stats.norm.ppf(frr, held.mean(), max(held.std(), 1e-12)))

    def share(below: np.ndarray, entropies: np.ndarray) -> float:
        known = np.isfinite(threshold) and np.isfinite(entropies).all()
        return 100.0 * float(np.mean(below)) if known else float("nan")

    return {
        "threshold": threshold,
        "frr": share(clean <= threshold, clean),
        "far": share(triggered > threshold, triggered),
    }
