"""Training programs: one jitted step trains M members at once.

Axes: M member, B batch, N training images, H W image, C channel.

Everything here is a pure function of arrays. A step is written for a single member
(`member_step`); `over_members` adds the M axis, and is the only place that knows how; a
`pmoe_jax.mesh.Layout` spreads members and batches over devices. The loop over steps, with progress,
evaluation and checkpoints, is in `pmoe_jax.run`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from pmoe_jax import kernels, mesh, metrics, models, poisoning, triggers
from pmoe_jax.errors import PmoeError
from pmoe_jax.members import Attack, Member

STRATEGIES = ("vmap", "unroll")


@flax.struct.dataclass
class TrainState:
    """State of training; with M members, every leaf has a leading M axis.

    Attributes:
      params, batch_stats: the model's variables.
      opt_state: optax state.
      step: int32 [], steps taken.
      diverged_at: int32 [], the step whose loss, gradient, new parameters or running statistics
        were not finite, or -1. From then on the member's variables stay as they were.
    """

    params: Any
    batch_stats: Any
    opt_state: Any
    step: jax.Array
    diverged_at: jax.Array

    @property
    def variables(self) -> dict[str, Any]:
        """What `model.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


@dataclasses.dataclass(frozen=True)
class Plan:
    """How an epoch of N images is cut into steps."""

    num_images: int
    batch_size: int
    keep_last_batch: bool
    epochs: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch, the partial one included if it is kept."""
        partial = self.keep_last_batch and self.num_images % self.batch_size > 0
        return self.num_images // self.batch_size + partial

    @property
    def total_steps(self) -> int:
        """Steps of the whole training."""
        return self.epochs * self.steps_per_epoch

    def batch_at(self, step: int) -> tuple[int, int]:
        """Start in the epoch's order, and size, of the batch of a step."""
        start = step % self.steps_per_epoch * self.batch_size
        return start, min(self.batch_size, self.num_images - start)


def plan_of(config: Any, num_images: int) -> Plan:
    """How the configured training cuts N images into steps."""
    train = config.train
    return Plan(num_images, train.batch_size, train.keep_last_batch, train.epochs)


def build_model(config: Any, num_classes: int) -> models.PMoEWideResNet | models.WideResNet:
    """The configured model.

    Raises:
      PmoeError: float64 is asked for, but JAX is not set to it.
    """
    if config.model.dtype == "float64" and input_dtype() != jnp.float64:
        raise PmoeError(
            "model.dtype=float64 needs jax.config.update('jax_enable_x64', True) at the start of "
            "the program"
        )
    common: dict[str, Any] = {
        "num_classes": num_classes,
        "width": config.model.width,
        "bn_momentum": config.model.bn_momentum,
        "dtype": jnp.bfloat16 if config.model.dtype == "bfloat16" else None,
        "kernels": config.model.kernels,
    }
    if config.model.name == "wide_resnet":
        return models.WideResNet(**common)
    return models.PMoEWideResNet(
        **common,
        num_experts=config.model.num_experts,
        patches_per_expert=config.model.patches_per_expert,
        expert_layers=2 if config.quirks.a6_two_layer_experts else 1,
    )


def build_optimizer(train: Any, plan: Plan) -> optax.GradientTransformation:
    """The optimiser and learning rate schedule of the section `train` of a config.

    Raises:
      PmoeError: warm-up takes the whole training.
    """
    rate: Any = train.learning_rate
    warmup = round(train.warmup_epochs * plan.steps_per_epoch)
    rest = plan.total_steps - warmup
    if rest < 1:
        raise PmoeError(
            f"train.warmup_epochs={train.warmup_epochs} takes all {plan.total_steps} steps of the "
            f"training; choose less than train.epochs={train.epochs}"
        )
    if train.schedule == "cosine":
        rate = optax.cosine_decay_schedule(train.learning_rate, rest)
    elif train.schedule == "linear":
        rate = optax.linear_schedule(train.learning_rate, 0.0, rest)
    if warmup:
        after = rate if callable(rate) else optax.constant_schedule(rate)
        ramp = optax.linear_schedule(0.0, train.learning_rate, warmup)
        rate = optax.join_schedules([ramp, after], [warmup])
    if train.optimizer == "adam":
        inner = optax.adam(rate)
    elif train.optimizer == "adamw":
        return optax.adamw(rate, weight_decay=train.weight_decay)
    else:
        inner = optax.sgd(rate, momentum=train.momentum or None)
    if train.weight_decay:
        return optax.chain(optax.add_decayed_weights(train.weight_decay), inner)
    return inner


def over_members(function: Callable[..., Any], strategy: str, shared: Sequence[int] = ()) -> Any:
    """Maps a function of one member over the leading M axis of its arguments and results.

    Args:
      function: of one member's pytrees.
      strategy: "vmap", or "unroll" (the members' programs one after another in one program, which
        XLA:CPU runs faster than the grouped convolutions that vmap makes).
      shared: positions of arguments that all members share and that have no M axis.
    """
    if strategy == "vmap":

        def mapped(*args: Any) -> Any:
            axes = [None if i in shared else 0 for i in range(len(args))]
            return jax.vmap(function, in_axes=axes)(*args)

        return mapped

    def unrolled(*args: Any) -> Any:
        members = next(
            leaf.shape[0]
            for i, arg in enumerate(args)
            if i not in shared
            for leaf in jax.tree.leaves(arg)
        )
        results = []
        for m in range(members):
            own = (
                arg if i in shared else jax.tree.map(lambda leaf: leaf[m], arg)  # noqa: B023
                for i, arg in enumerate(args)
            )
            results.append(function(*own))
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)

    return unrolled


def choose_strategy(config: Any) -> str:
    """The configured strategy; "auto" is vmap, on CPUs unroll (see docs/performance.md)."""
    if config.train.strategy != "auto":
        return config.train.strategy
    return "unroll" if jax.default_backend() == "cpu" else "vmap"


def init_member(model: Any, optimizer: Any, image_shape: Any, key: jax.Array) -> TrainState:
    """A single member's state before training."""
    variables = model.init(key, jnp.zeros((1, *image_shape), input_dtype()))
    params = variables["params"]
    return TrainState(
        params=params,
        batch_stats=variables["batch_stats"],
        opt_state=optimizer.init(params),
        step=jnp.zeros((), jnp.int32),
        diverged_at=jnp.full((), -1, jnp.int32),
    )


def input_dtype() -> Any:
    """float32, or float64 where x64 is enabled."""
    return jnp.zeros(()).dtype


def to_float(images: jax.Array) -> jax.Array:
    """uint8 images in 0 to 255 -> float images in [0, 1]."""
    return images.astype(input_dtype()) / 255


def member_step(
    model: Any,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    images: jax.Array,
    labels: jax.Array,
    axis_name: str | None = None,
) -> tuple[TrainState, jax.Array]:
    """One step of one member.

    Args:
      model, optimizer: static.
      state: the member's state.
      images: float [B, H, W, C] in [0, 1], already poisoned.
      labels: int [B].
      axis_name: mesh axis over which the batch is spread in equal parts; images and labels are then
        one part, `model` has the same `axis_name`, and the result is that of the whole batch. With
        a model that has none every device has the whole batch, and they agree on their mean.

    Returns:
      The new state, and the mean cross-entropy before the update.
    """

    def loss_of(params: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        loss = losses.mean()
        if axis_name is not None:  # So that the parts of all devices add up to the mean.
            loss = loss / jax.lax.axis_size(axis_name)
        return loss, updated["batch_stats"]

    (loss, batch_stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    if axis_name is not None:
        loss, gradients = jax.lax.psum((loss, gradients), axis_name)
        if model.axis_name is None:
            batch_stats = jax.lax.pmean(batch_stats, axis_name)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    new_params = optax.apply_updates(state.params, updates)
    # A step too far shows in the parameters before it shows in a loss.
    size = sum(optax.tree.norm(tree) for tree in (gradients, new_params, batch_stats))
    finite = jnp.isfinite(loss) & jnp.isfinite(size)
    going = finite & (state.diverged_at < 0)

    def keep_if_diverged(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(going, new, old)

    new_state = TrainState(
        params=jax.tree.map(keep_if_diverged, new_params, state.params),
        batch_stats=jax.tree.map(keep_if_diverged, batch_stats, state.batch_stats),
        opt_state=jax.tree.map(keep_if_diverged, opt_state, state.opt_state),
        step=state.step + 1,
        diverged_at=jnp.where(finite | (state.diverged_at >= 0), state.diverged_at, state.step),
    )
    return new_state, loss


def not_finite(
    model: Any,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    images: jax.Array,
    labels: jax.Array,
) -> list[tuple[str, jax.Array]]:
    """Where a step (arguments as of `member_step`) has NaN or infinity, in the order of computing.

    Returns:
      Names and flags bool []: layers by their output ("group1/conv1"), "loss", gradients from the
      last layer back, new values of parameters and of running statistics.
    """

    def bad(tree: Any) -> jax.Array:
        leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        return ~jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()

    layers: list[str] = []

    def loss_of(params: Any) -> tuple[jax.Array, Any]:
        logits, updated = model.apply(
            {"params": params, "batch_stats": state.batch_stats}, images, train=True,
            mutable=["batch_stats", "intermediates"], capture_intermediates=True,
        )  # fmt: skip
        outputs = flax.traverse_util.flatten_dict(updated["intermediates"], sep="/")
        calls = {name: out for name, out in outputs.items() if name.endswith("/__call__")}
        layers.extend(name.removesuffix("/__call__") for name in calls)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), ([bad(out) for out in calls.values()], updated["batch_stats"])

    value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
    (loss, (flags, batch_stats)), gradients = value_and_grad(state.params)
    updates, _ = optimizer.update(gradients, state.opt_state, state.params)
    found = [*zip(layers, flags, strict=True), ("loss", bad(loss))]

    def place(name: str) -> int:
        above = [layer for layer in layers if name.startswith(f"{layer}/")]
        return max(map(layers.index, above), default=-1)

    named = flax.traverse_util.flatten_dict(gradients, sep="/")
    for name in sorted(named, key=place, reverse=True):
        found.append((f"gradient of {name}", bad(jnp.square(named[name]).sum())))
    new = flax.traverse_util.flatten_dict(optax.apply_updates(state.params, updates), sep="/")
    new |= flax.traverse_util.flatten_dict(batch_stats, sep="/")
    # Finite values may still be too large for their norm, which `member_step` looks at.
    found += [(f"new value of {name}", bad(jnp.square(leaf).sum())) for name, leaf in new.items()]
    return found


def attacked_batch(
    attack: Attack, index: jax.Array, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A batch as the member sees it: converted, triggered and relabelled.

    Args:
      attack: the member's attack.
      index: int [B], the batch's positions in the training set.
      images: uint8 [B, H, W, C].
      labels: int [B].
    """
    return poisoning.poison_batch(
        to_float(images),
        labels,
        attack.triggered[index],
        attack.relabelled[index],
        attack.trigger,
        attack.target,
    )


class Programs:
    """The jitted programs of runs that train alike (`programs_of` makes them).

    `images` and `labels` below are the training set on the device, shared by all members: uint8
    [N, H, W, C] and int32 [N]. On a mesh, states, attacks and orders lie as `mesh.MEMBERS`, images
    and labels of the training set as `mesh.SAME`.
    """

    def __init__(
        self,
        model: Any,
        optimizer: optax.GradientTransformation,
        plan: Plan,
        strategy: str,
        layout: mesh.Layout,
    ):
        self.model = model
        self.optimizer = optimizer
        self.plan = plan
        self.layout = layout
        self.strategy = strategy
        options = kernels.compiler_options(jax.default_backend())
        jit = functools.partial(jax.jit, compiler_options=options)
        of_init = kernels.options_of_init(jax.default_backend())
        self._init = jax.jit(self._all_init, static_argnums=1, compiler_options=of_init)
        self.epoch_order = jit(self._all_orders)
        self.step = jit(self._all_step, static_argnums=6, donate_argnums=0)
        self.step_on_batch = jit(self._all_step_on_batch, donate_argnums=0)
        self.predict = jit(self._all_predict)
        self._not_finite = jit(self._one_not_finite)
        self._places: list[str] = []  # Known once the program above is traced.

    def init(self, members: Sequence[Member], image_shape: tuple[int, int, int]) -> TrainState:
        """States [M, ...] before training."""
        return self._init(self.keys(members, "init"), image_shape)

    def keys(self, members: Sequence[Member], stream: str) -> jax.Array:
        """The members' keys [M] of a stream, where the members are."""
        return self.layout.put(jnp.stack([m.key(stream) for m in members]), mesh.MEMBERS)

    def abstract_state(self, members: Sequence[Member], image_shape: Any) -> TrainState:
        """Shapes, dtypes and places of `init`'s result, without computing it."""
        keys = self.keys(members, "init")
        return self.layout.shapes(self._init.eval_shape(keys, image_shape), mesh.MEMBERS)

    def _all_init(self, keys: jax.Array, image_shape: tuple[int, int, int]) -> TrainState:
        # Initialisation is cheap, and vmapped it draws the same numbers as alone.
        function = functools.partial(init_member, self.model, self.optimizer, image_shape)
        spread = self.layout.spread(jax.vmap(function), [mesh.MEMBERS], mesh.MEMBERS)
        return spread(keys)

    def _all_orders(self, keys: jax.Array, epoch: jax.Array) -> jax.Array:
        """int32 [M, N]: the order in which each member sees the images in this epoch."""

        def one(key: jax.Array, epoch: jax.Array) -> jax.Array:
            return jax.random.permutation(
                jax.random.fold_in(key, epoch), jnp.arange(self.plan.num_images, dtype=jnp.int32)
            )

        own = jax.vmap(one, in_axes=(0, None))
        return self.layout.spread(own, [mesh.MEMBERS, mesh.SAME], mesh.MEMBERS)(keys, epoch)

    def _all_step(
        self,
        state: TrainState,
        attack: Attack,
        order: jax.Array,
        start: jax.Array,
        images: jax.Array,
        labels: jax.Array,
        size: int,
    ) -> tuple[TrainState, jax.Array]:
        """One step of every member on its own batch: `size` images from `start` in its order."""

        parts = self.layout.parts(size)
        train = self._member_step(parts)

        def own(state: Any, attack: Any, order: Any, start: Any, images: Any, labels: Any) -> Any:
            if parts > 1:
                start = start + jax.lax.axis_index(mesh.DATA) * (size // parts)

            def one(state: TrainState, attack: Attack, order: jax.Array) -> Any:
                index = jax.lax.dynamic_slice(order, (start,), (size // parts,))
                return train(state, *attacked_batch(attack, index, images[index], labels[index]))

            return over_members(one, self.strategy)(state, attack, order)

        cuts = [mesh.MEMBERS] * 3 + [mesh.SAME] * 3
        spread = self.layout.spread(own, cuts, mesh.MEMBERS)
        return spread(state, attack, order, start, images, labels)

    def _member_step(self, parts: int) -> Callable[..., tuple[TrainState, jax.Array]]:
        """`member_step` for batches in so many parts."""
        if self.layout.shape[1] == 1:
            return functools.partial(member_step, self.model, self.optimizer)
        # Devices may round the same batch differently, and their states would drift apart.
        model = self.model.clone(axis_name=mesh.DATA) if parts > 1 else self.model
        return functools.partial(member_step, model, self.optimizer, axis_name=mesh.DATA)

    def batch_cut(self, size: int) -> Any:
        """How `step_on_batch` wants a batch [M, B, ...] cut."""
        return mesh.MEMBERS_IMAGES if self.layout.parts(size) > 1 else mesh.MEMBERS

    def _all_step_on_batch(
        self,
        state: TrainState,
        attack: Attack,
        index: jax.Array,
        images: jax.Array,
        labels: jax.Array,
    ) -> tuple[TrainState, jax.Array]:
        """As `step`, with batches from the host: index [M, B], images [M, B, H, W, C] uint8."""
        train = self._member_step(self.layout.parts(index.shape[1]))

        def one(state: TrainState, attack: Attack, *batch: jax.Array) -> Any:
            return train(state, *attacked_batch(attack, *batch))

        cuts = [mesh.MEMBERS] * 2 + [self.batch_cut(index.shape[1])] * 3
        spread = self.layout.spread(over_members(one, self.strategy), cuts, mesh.MEMBERS)
        return spread(state, attack, index, images, labels)

    def first_not_finite(
        self,
        state: TrainState,
        attack: Attack,
        index: np.ndarray,
        images: np.ndarray,
        labels: np.ndarray,
    ) -> str:
        """Where a step of one member (no M axis) first has NaN or infinity; "" if nowhere.

        Args as of `step_on_batch`; see `not_finite`.
        """
        flags = self._not_finite(state, attack, index, images, labels)
        return next((n for n, bad in zip(self._places, flags, strict=True) if bad), "")

    def _one_not_finite(
        self, state: TrainState, attack: Attack, *batch: jax.Array
    ) -> list[jax.Array]:
        found = not_finite(self.model, self.optimizer, state, *attacked_batch(attack, *batch))
        self._places = [name for name, _ in found]
        return [flag for _, flag in found]

    def _all_predict(
        self, variables: Any, images: jax.Array, trigger: triggers.Trigger | None
    ) -> jax.Array:
        """Classes int32 [M, B] of uint8 images [B, H, W, C]; with a trigger, of triggered ones.

        -1 where logits are not finite.
        """

        def one(variables: Any, trigger: Any, images: jax.Array) -> jax.Array:
            inputs = to_float(images)
            if trigger is not None:
                inputs = triggers.apply(inputs, trigger)
            logits: Any = self.model.apply(variables, inputs)
            return metrics.predicted_classes(logits)

        own = over_members(one, self.strategy, shared=(2,))
        cuts = [mesh.MEMBERS, mesh.MEMBERS, mesh.IMAGES]
        return self.layout.spread(own, cuts, mesh.MEMBERS_IMAGES)(variables, trigger, images)


def programs_of(
    config: Any, num_classes: int, plan: Plan, layout: mesh.Layout = mesh.ONE_DEVICE
) -> Programs:
    """The configured programs; runs of this process that train alike share what is compiled.

    Raises:
      PmoeError: as of `build_model` and `build_optimizer`.
    """
    model, train = build_model(config, num_classes), ml_collections.FrozenConfigDict(config.train)
    return _shared_programs(model, train, plan, choose_strategy(config), layout)


@functools.lru_cache(maxsize=16)
def _shared_programs(
    model: Any, train: Any, plan: Plan, strategy: str, layout: mesh.Layout
) -> Programs:
    return Programs(model, build_optimizer(train, plan), plan, strategy, layout)


def predict_all(
    programs: Programs,
    variables: Any,
    images: np.ndarray,
    trigger: triggers.Trigger | None,
    batch_size: int,
) -> np.ndarray:
    """Predicted classes int32 [M, N] of a whole split, in batches.

    Args:
      programs: the run's programs.
      variables: {"params", "batch_stats"} with a leading M axis.
      images: uint8 [N, H, W, C].
      trigger: the members' triggers [M, ...], or None for clean images.
      batch_size: images a call; the last batch is filled up and cut again.
    """
    size = min(batch_size, len(images))
    size += -size % programs.layout.shape[1]
    pending: list[Any] = []
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        filling = np.zeros((size - len(batch), *batch.shape[1:]), batch.dtype)
        filled = programs.layout.put(np.concatenate([batch, filling]), mesh.IMAGES)
        pending.append(programs.predict(variables, filled, trigger))
        if len(pending) > 1:  # No longer queue, so that a signal can end the evaluation soon.
            pending[-2] = mesh.fetch(pending[-2])
    return np.concatenate([mesh.fetch(part) for part in pending], axis=1)[:, : len(images)]
