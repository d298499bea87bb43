"""The patch-level mixture-of-experts WideResNet and its dense counterpart.

Axes: B batch, H W image, P patch (position of the feature grid, row-major), E expert,
K patches an expert selects, C channel of the features, F channel of an expert's output.

The network of Chowdhury et al. (2023) as used by Chan, te Lintelo and Picek (2025): a small
pre-activation WideResNet turns an image into a grid of patch features (8x8 for 32x32 images).
Every expert has a router that scores all patches; the expert works on the K patches it scores
highest, each multiplied with its gate value. All other positions of its map are zero.

Only the selected patches are computed. The unselected positions of an expert's map hold the same
vector everywhere (zero at first, a constant behind each layer), so a map is kept as a pair
`selected [B, E, K, C]` and `rest [E, C]` (`_FoldedMap`), and the P - K copies of `rest` enter batch
statistics and means by their count. That equals masking the full map and is several times faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from pmoe_jax import kernels
from pmoe_jax.errors import PmoeError

Variables = dict[str, Any]
SILENCE_MODES = ("zero", "mean")

_glorot = nn.initializers.glorot_uniform()
# Stacked [E, C, F] kernels: every expert gets the initialisation of a single one.
_glorot_stacked = nn.initializers.variance_scaling(
    1.0, "fan_avg", "uniform", in_axis=-2, out_axis=-1, batch_axis=0
)


@flax.struct.dataclass
class Routing:
    """Which patches the experts take from each image.

    Attributes:
      logits: float [B, E, P], the routers' scores, patches row-major.
      indices: int32 [B, E, K], the selected patches, best first.
      gates: float [B, E, K], softmax (over all P patches) of the selected patches' scores.
    """

    logits: jax.Array
    indices: jax.Array
    gates: jax.Array


class Conv(nn.Module):
    """A convolution with "SAME" padding; glorot-uniform kernel and zero bias, as in Keras."""

    features: int
    kernel_size: int = 3
    stride: int = 1
    dtype: Any = None
    kernels: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size = self.kernel_size
        kernel = self.param("kernel", _glorot, (size, size, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        dtype = self.dtype or x.dtype
        y = kernels.conv(
            x.astype(dtype),
            kernel.astype(dtype),
            stride=self.stride,
            implementation=self.kernels,
        )
        return kernels.add_bias(y, bias.astype(dtype))


class BatchNorm(nn.Module):
    """Batch norm over all axes but the last, optionally followed by ReLU.

    Running statistics as Keras keeps them: new = momentum * old + (1 - momentum) * batch, with the
    biased batch variance. Statistics are those of the whole batch, also where it is spread over the
    devices of a mesh axis (`axis_name`).
    """

    momentum: float = 0.99
    epsilon: float = 1e-3
    relu: bool = False
    kernels: str = "auto"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        scale, bias, running_mean, running_var = _norm_variables(self, x.shape[-1:])
        if train:
            y, mean, var = kernels.batch_norm(
                x, scale, bias, epsilon=self.epsilon, relu=self.relu,
                implementation=self.kernels, axis_name=self.axis_name,
            )  # fmt: skip
            _update_running(self, running_mean, running_var, mean, var)
            return y
        factor = scale * jax.lax.rsqrt(running_var.value + self.epsilon)
        offset = bias - running_mean.value * factor
        y = x * factor.astype(x.dtype) + offset.astype(x.dtype)
        return nn.relu(y) if self.relu else y


class _FoldedMap(NamedTuple):
    """The experts' feature maps: the selected positions, and what every other position holds."""

    selected: jax.Array  # [B, E, K, C]
    rest: jax.Array  # [E, C]


class _FoldedBatchNorm(nn.Module):
    """Batch norm of a folded map: statistics per expert and channel over all B * P positions."""

    num_patches: int
    momentum: float = 0.99
    epsilon: float = 1e-3
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: _FoldedMap, *, train: bool) -> _FoldedMap:
        experts, channels = x.rest.shape
        scale, bias, running_mean, running_var = _norm_variables(self, (experts, channels))
        if train:
            # Sums over the selected, plus a weight for the positions that all hold `rest`. The
            # variance is taken around the mean: E[x^2] - E[x]^2 loses 1e-4 to cancellation.
            selected = x.selected.astype(scale.dtype)
            rest = x.rest.astype(scale.dtype)
            batch, _, taken, _ = selected.shape
            count = batch * self.num_patches * kernels.devices_along(self.axis_name)
            share = (self.num_patches - taken) / self.num_patches
            mean = self._sums(selected) / count + share * rest
            centred = selected - mean[:, None, :]
            var = self._sums(jnp.square(centred)) / count
            var = var + share * jnp.square(rest - mean)
            _update_running(self, running_mean, running_var, mean, var)
        else:
            mean, var = running_mean.value, running_var.value
        factor = scale * jax.lax.rsqrt(var + self.epsilon)
        offset = bias - mean * factor
        dtype = x.selected.dtype
        return _FoldedMap(
            x.selected * factor[:, None, :].astype(dtype) + offset[:, None, :].astype(dtype),
            (x.rest * factor + offset).astype(x.rest.dtype),
        )

    def _sums(self, x: jax.Array) -> jax.Array:
        """[B, E, K, C] -> [E, C], over the whole batch."""
        return kernels.over_devices(x.sum((0, 2)), self.axis_name)


class _ExpertConv(nn.Module):
    """One 1x1 convolution per expert, kernels stacked on E: [E, C, F]."""

    features: int

    @nn.compact
    def __call__(self, x: _FoldedMap) -> _FoldedMap:
        experts, channels = x.rest.shape
        kernel = self.param("kernel", _glorot_stacked, (experts, channels, self.features))
        bias = self.param("bias", nn.initializers.zeros, (experts, self.features))
        kernel, bias = kernel.astype(x.selected.dtype), bias.astype(x.selected.dtype)
        selected = jnp.einsum("bekc,ecf->bekf", x.selected, kernel) + bias[:, None, :]
        rest = jnp.einsum("ec,ecf->ef", x.rest.astype(kernel.dtype), kernel) + bias
        return _FoldedMap(selected, rest)


class _Routers(nn.Module):
    """One linear score per expert and patch, without bias; kernels stacked on E: [E, C]."""

    num_experts: int

    @nn.compact
    def __call__(self, patches: jax.Array) -> jax.Array:
        kernel = self.param(
            "kernel", nn.initializers.normal(1e-4), (self.num_experts, patches.shape[-1])
        )
        patches = patches.astype(jnp.promote_types(patches.dtype, jnp.float32))
        return jnp.einsum("bpc,ec->bep", patches, kernel)


class _Experts(nn.Module):
    """The expert networks: (batch norm, ReLU, 1x1 convolution), once or `layers` times."""

    features: int
    num_patches: int
    layers: int = 1
    momentum: float = 0.99
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: _FoldedMap, *, train: bool) -> _FoldedMap:
        for layer in range(self.layers):
            suffix = "" if layer == 0 else str(layer + 1)
            norm = _FoldedBatchNorm(
                self.num_patches, self.momentum, axis_name=self.axis_name, name=f"norm{suffix}"
            )
            x = _ExpertConv(self.features, name=f"conv{suffix}")(_relu(norm(x, train=train)))
            # Raw outputs, for analyses that ask for the "intermediates" collection.
            self.sow("intermediates", f"conv{suffix}_output", x)
        return x


class ResidualGroup(nn.Module):
    """One pre-activation block whose 1x1 shortcut starts from the block's raw input."""

    features: int
    stride: int = 1
    momentum: float = 0.99
    dtype: Any = None
    kernels: str = "auto"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        common: dict[str, Any] = {"dtype": self.dtype, "kernels": self.kernels}
        norm: dict[str, Any] = {
            "momentum": self.momentum, "relu": True, "kernels": self.kernels,
            "axis_name": self.axis_name,
        }  # fmt: skip
        y = BatchNorm(**norm, name="norm1")(x, train=train)
        y = Conv(self.features, stride=self.stride, **common, name="conv1")(y)
        y = BatchNorm(**norm, name="norm2")(y, train=train)
        y = Conv(self.features, **common, name="conv2")(y)
        return y + Conv(self.features, 1, self.stride, **common, name="shortcut")(x)


class PMoEWideResNet(nn.Module):
    """Patch-level mixture-of-experts WideResNet.

    `model.apply(variables, images, train=False)` maps float images [B, H, W, C] in [0, 1] to logits
    [B, num_classes]. In training, pass `mutable=["batch_stats"]` to get the new running statistics.

    Attributes:
      num_classes: number of classes.
      width: widening factor w; the groups have 16w, 32w and 64w channels (the paper: 10).
      num_experts: experts E, each with its own router (the paper: 4).
      patches_per_expert: K, how many patches an expert takes (the paper: 16 of 64).
      expert_layers: layers of an expert. 1 follows the authors' code; the paper's text speaks of
        two (quirk A6).
      bn_momentum: momentum of all running statistics.
      dtype: compute dtype, e.g. `jnp.bfloat16`; parameters, statistics, scores and gates keep
        the parameters' precision. None computes in the images' dtype.
      kernels: implementation of convolution and batch norm, see `pmoe_jax.kernels`.
      axis_name: in training, the mesh axis over which each batch is spread in equal parts; batch
        statistics are then those of the whole batch.
    """

    num_classes: int
    width: int = 10
    num_experts: int = 4
    patches_per_expert: int = 16
    expert_layers: int = 1
    bn_momentum: float = 0.99
    dtype: Any = None
    kernels: str = "auto"
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool = False,
        return_routing: bool = False,
        routing: Routing | jax.Array | tuple[jax.Array, jax.Array] | None = None,
        expert_mask: jax.Array | None = None,
        silence: str = "zero",
    ) -> jax.Array | tuple[jax.Array, Routing]:
        """Classifies a batch of images.

        Args:
          images: float [B, H, W, C] in [0, 1]; H and W of at least 4.
          train: normalise by batch statistics and update the running ones.
          return_routing: also return the `Routing` that was used.
          routing: selection to use instead of the routers' own: indices [B, E, K] (gates are then
            the routers' own values there), a pair (indices, gates), or a `Routing`.
          expert_mask: [E]; 0 silences an expert: what it sends to the concatenation becomes zero
            or its running mean.
          silence: "zero" or "mean", what a silenced expert sends.

        Returns:
          Logits [B, num_classes], and the `Routing` if asked for.

        Raises:
          PmoeError: images of wrong rank or of an integer dtype, more selected patches than there
            are, an unknown `silence`, or a `routing` or `expert_mask` of wrong shape or range.
        """
        _check_images(images)
        if silence not in SILENCE_MODES:
            raise PmoeError(f"silence={silence!r} is unknown; choose one of {SILENCE_MODES}")
        common: dict[str, Any] = {"dtype": self.dtype, "kernels": self.kernels}
        group: dict[str, Any] = {
            "momentum": self.bn_momentum, "axis_name": self.axis_name, **common,
        }  # fmt: skip
        x = Conv(16, **common, name="stem")(images)
        x = ResidualGroup(16 * self.width, **group, name="group1")(x, train=train)
        x = ResidualGroup(32 * self.width, stride=2, **group, name="group2")(x, train=train)
        norm = BatchNorm(
            self.bn_momentum, relu=True, kernels=self.kernels, axis_name=self.axis_name, name="norm"
        )
        x = norm(x, train=train)
        features = Conv(64 * self.width, stride=2, **common, name="patch_conv")(x)
        self.sow("intermediates", "features", features)

        patches = features.reshape(features.shape[0], -1, features.shape[-1])
        num_patches = patches.shape[1]
        if self.patches_per_expert > num_patches:
            raise PmoeError(
                f"patches_per_expert={self.patches_per_expert} exceeds the {num_patches} patches "
                f"of {images.shape[1]}x{images.shape[2]} images; choose at most {num_patches}"
            )
        scores = _Routers(self.num_experts, name="routers")(patches)
        used = _route(scores, self.patches_per_expert, routing)
        if expert_mask is not None:
            expert_mask = jnp.asarray(expert_mask)
            if expert_mask.shape != (self.num_experts,):
                raise PmoeError(
                    f"expert_mask has shape {expert_mask.shape}; give one number for each of the "
                    f"{self.num_experts} experts"
                )
        maps = _FoldedMap(
            _gather(patches, used.indices) * used.gates[..., None].astype(patches.dtype),
            jnp.zeros((self.num_experts, patches.shape[-1]), patches.dtype),
        )
        folded: dict[str, Any] = {"momentum": self.bn_momentum, "axis_name": self.axis_name}
        experts = _Experts(
            16 * self.width, num_patches, self.expert_layers, **folded, name="experts"
        )
        maps = experts(maps, train=train)
        head_norm = _FoldedBatchNorm(num_patches, **folded, name="head_norm")
        if expert_mask is not None:
            maps = _silence(maps, expert_mask, self._expert_means(maps, silence))
        maps = _relu(head_norm(maps, train=train))
        unselected = num_patches - maps.selected.shape[2]
        pooled = (maps.selected.sum(2) + unselected * maps.rest) / num_patches
        pooled = pooled.reshape(pooled.shape[0], -1).astype(scores.dtype)
        logits = _classifier(self.num_classes, pooled.dtype)(pooled)
        return (logits, used) if return_routing else logits

    def _expert_means(self, maps: _FoldedMap, silence: str) -> jax.Array:
        if silence == "zero" or self.is_initializing():
            return jnp.zeros_like(maps.rest)
        return self.variables["batch_stats"]["head_norm"]["mean"].astype(maps.rest.dtype)


class WideResNet(nn.Module):
    """The dense counterpart: no routers and experts, a third residual group instead.

    Logits [B, num_classes] from float images [B, H, W, C] in [0, 1], as `PMoEWideResNet`; other
    images raise a PmoeError.
    """

    num_classes: int
    width: int = 10
    bn_momentum: float = 0.99
    dtype: Any = None
    kernels: str = "auto"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        _check_images(images)
        common: dict[str, Any] = {"dtype": self.dtype, "kernels": self.kernels}
        group: dict[str, Any] = {
            "momentum": self.bn_momentum, "axis_name": self.axis_name, **common,
        }  # fmt: skip
        x = Conv(16, **common, name="stem")(images)
        x = ResidualGroup(16 * self.width, **group, name="group1")(x, train=train)
        x = ResidualGroup(32 * self.width, stride=2, **group, name="group2")(x, train=train)
        x = ResidualGroup(64 * self.width, stride=2, **group, name="group3")(x, train=train)
        norm = BatchNorm(
            self.bn_momentum, relu=True, kernels=self.kernels, axis_name=self.axis_name, name="norm"
        )
        x = norm(x, train=train)
        pooled = x.mean((1, 2)).astype(jnp.promote_types(x.dtype, jnp.float32))
        return _classifier(self.num_classes, pooled.dtype)(pooled)


def variables_from_keras(weights: Sequence[np.ndarray]) -> Variables:
    """Variables of a `PMoEWideResNet` from the arrays of the public Keras model.

    Width, classes and experts are read off the shapes; one block a group and one-layer experts.

    Args:
      weights: all variables in layer order: stem; groups 1 and 2 (BN, conv, BN, shortcut, conv);
        BN; patch convolution; routers; BNs, then convolutions of the experts; BN; dense. A BN is
        gamma, beta, moving mean, moving variance; a convolution kernel, bias; a router a kernel.

    Returns:
      `{"params": ..., "batch_stats": ...}` for `PMoEWideResNet(...).apply`.

    Raises:
      PmoeError: the number of arrays or a shape does not belong to such a model.
    """
    arrays = [np.asarray(array) for array in weights]
    experts, odd = divmod(len(arrays) - 42, 7)
    if experts < 1 or odd:
        raise PmoeError(
            f"got {len(arrays)} Keras arrays; a model of n experts has 42 + 7n (70 for 4 experts)"
        )
    stem, conv1, dense = arrays[0], arrays[6], arrays[-1]
    if stem.ndim != 4 or conv1.ndim != 4 or dense.ndim != 1 or conv1.shape[-1] % 16:
        raise PmoeError(
            f"Keras arrays 0, 6 and {len(arrays) - 1} must be the stem's kernel, the first block's "
            f"kernel (16w channels) and the classifier's bias; got shapes {stem.shape}, "
            f"{conv1.shape}, {dense.shape}"
        )
    width, classes, channels = conv1.shape[-1] // 16, dense.shape[0], stem.shape[2]
    taken = iter(enumerate(arrays))

    def take(*shape: int) -> jax.Array:
        index, array = next(taken)
        if array.shape != shape:
            raise PmoeError(
                f"Keras array {index} has shape {array.shape}; a model of width {width} with "
                f"{experts} experts and {classes} classes has {shape} there"
            )
        return jnp.asarray(array)

    def norm(size: int) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        scale, bias, mean, var = (take(size) for _ in range(4))
        return {"scale": scale, "bias": bias}, {"mean": mean, "var": var}

    def conv(size: int, before: int, after: int) -> dict[str, jax.Array]:
        return {"kernel": take(size, size, before, after), "bias": take(after)}

    def group(before: int, after: int) -> tuple[dict[str, Any], dict[str, Any]]:
        params: dict[str, Any] = {}
        stats: dict[str, Any] = {}
        params["norm1"], stats["norm1"] = norm(before)
        params["conv1"] = conv(3, before, after)
        params["norm2"], stats["norm2"] = norm(after)
        params["shortcut"] = conv(1, before, after)
        params["conv2"] = conv(3, after, after)
        return params, stats

    def stack(trees: list[Any]) -> Any:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    features, out = 64 * width, 16 * width
    params: dict[str, Any] = {"stem": conv(3, channels, 16)}
    stats: dict[str, Any] = {}
    params["group1"], stats["group1"] = group(16, 16 * width)
    params["group2"], stats["group2"] = group(16 * width, 32 * width)
    params["norm"], stats["norm"] = norm(32 * width)
    params["patch_conv"] = conv(3, 32 * width, features)
    routers = [take(1, 1, features, 1)[0, 0, :, 0] for _ in range(experts)]
    params["routers"] = {"kernel": jnp.stack(routers)}
    norms, norm_stats = zip(*(norm(features) for _ in range(experts)), strict=True)
    convs = [conv(1, features, out) for _ in range(experts)]
    for expert_conv in convs:
        expert_conv["kernel"] = expert_conv["kernel"][0, 0]
    params["experts"] = {"norm": stack(list(norms)), "conv": stack(convs)}
    stats["experts"] = {"norm": stack(list(norm_stats))}
    head, head_stats = norm(experts * out)
    split = (experts, out)
    params["head_norm"] = jax.tree.map(lambda leaf: leaf.reshape(split), head)
    stats["head_norm"] = jax.tree.map(lambda leaf: leaf.reshape(split), head_stats)
    params["classifier"] = {"kernel": take(experts * out, classes), "bias": take(classes)}
    return {"params": params, "batch_stats": stats}


def _check_images(images: jax.Array) -> None:
    if images.ndim != 4:
        raise PmoeError(f"images must be [B, H, W, C], got shape {tuple(images.shape)}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        # Parameters are cast to the images' dtype, and would all become zero.
        raise PmoeError(
            f"images are {images.dtype}; give floats in [0, 1], for example images / 255"
        )


def _norm_variables(module: nn.Module, shape: tuple[int, ...]) -> tuple[Any, Any, Any, Any]:
    scale = module.param("scale", nn.initializers.ones, shape)
    bias = module.param("bias", nn.initializers.zeros, shape)
    mean = module.variable("batch_stats", "mean", jnp.zeros, shape)
    var = module.variable("batch_stats", "var", jnp.ones, shape)
    return scale, bias, mean, var


def _update_running(module: Any, running_mean: Any, running_var: Any, mean: Any, var: Any) -> None:
    # Initialisation runs the forward pass only to learn shapes: statistics stay at (0, 1).
    if module.is_initializing() or not module.is_mutable_collection("batch_stats"):
        return
    for running, value in ((running_mean, mean), (running_var, var)):
        kept = module.momentum * running.value
        running.value = kept + (1 - module.momentum) * value.astype(running.value.dtype)


def _classifier(num_classes: int, dtype: Any) -> nn.Dense:
    # Flax's own default is float32, also where JAX computes in float64.
    return nn.Dense(num_classes, kernel_init=_glorot, param_dtype=dtype, name="classifier")


def _relu(x: _FoldedMap) -> _FoldedMap:
    return _FoldedMap(nn.relu(x.selected), nn.relu(x.rest))


def _route(scores: jax.Array, k: int, routing: Any) -> Routing:
    """Top-k of the scores [B, E, P], or the given selection."""
    if routing is None:
        indices, gates = jax.lax.top_k(scores, k)[1], None
    elif isinstance(routing, Routing):
        indices, gates = routing.indices, routing.gates
    else:
        indices, gates = routing if isinstance(routing, tuple) else (routing, None)
    indices = jnp.asarray(indices)
    _check_indices(indices, gates, scores.shape)
    if gates is None:
        gates = jnp.take_along_axis(nn.softmax(scores), indices, axis=-1)
    return Routing(scores, indices, jnp.asarray(gates))


def _check_indices(indices: jax.Array, gates: Any, shape: tuple[int, ...]) -> None:
    batch, experts, patches = shape
    if indices.ndim != 3 or indices.shape[:2] != (batch, experts):
        raise PmoeError(
            f"routing has indices of shape {indices.shape}; give [{batch}, {experts}, K]"
        )
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise PmoeError(f"routing has indices of dtype {indices.dtype}; give integers")
    if gates is not None and jnp.shape(gates) != indices.shape:
        raise PmoeError(
            f"routing has gates of shape {jnp.shape(gates)} for indices of {indices.shape}; "
            "they must be equal"
        )
    if isinstance(indices, jax.core.Tracer) or not indices.size:
        return  # Inside jit values are not known.
    values = np.asarray(indices)
    least, most = int(values.min()), int(values.max())
    if least < 0 or most >= patches:
        raise PmoeError(
            f"routing names patch {least if least < 0 else most}; there are 0 to {patches - 1}"
        )
    ordered = np.sort(values, axis=-1)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise PmoeError("routing gives an expert the same patch twice; give K different ones")


def _gather(patches: jax.Array, indices: jax.Array) -> jax.Array:
    """Patches [B, P, C] at indices [B, E, K] -> [B, E, K, C]."""
    flat = indices.reshape(indices.shape[0], -1)
    taken = jnp.take_along_axis(patches, flat[..., None], axis=1)
    return taken.reshape(*indices.shape, patches.shape[-1])


def _silence(maps: _FoldedMap, expert_mask: jax.Array, substitute: jax.Array) -> _FoldedMap:
    """Replaces what experts of mask 0 send by `substitute` [E, F]."""
    keep = expert_mask.astype(maps.rest.dtype)[:, None]
    return _FoldedMap(
        jnp.where(keep[:, None, :] > 0, maps.selected, substitute[:, None, :]),
        jnp.where(keep > 0, maps.rest, substitute),
    )
