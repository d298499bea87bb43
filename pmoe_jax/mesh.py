"""Where members and their batches lie: a mesh of devices with the axes `seed` and `data`.

Axes: M member, B batch, S devices along `seed`, D devices along `data`.

A mesh of S x D devices trains M / S members on each row of D devices, which share every batch of
theirs, B / D images each. Members exchange nothing; the devices of a row exchange the sums of batch
norm, the loss and the gradients, so that figures do not depend on the mesh but for rounding. One
device is the mesh 1x1, and its programs are the functions as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pmoe_jax.config import mesh_shape
from pmoe_jax.errors import PmoeError

SEED, DATA = "seed", "data"
#: Arrays of members [M, ...]; of members and images [M, B, ...]; of images [B, ...]; of all.
MEMBERS, MEMBERS_IMAGES, IMAGES, SAME = P(SEED), P(SEED, DATA), P(DATA), P()


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one program's members and batches lie on devices.

    Attributes:
      mesh: None for a single device, the one JAX takes by default.
    """

    mesh: Mesh | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """S and D."""
        return (1, 1) if self.mesh is None else self.mesh.devices.shape

    @property
    def size(self) -> int:
        """Devices in use."""
        return self.shape[0] * self.shape[1]

    def parts(self, batch_size: int) -> int:
        """Into how many parts a batch is cut: D, or 1 if that leaves a rest.

        The last partial batch of an epoch may; then each device of a row trains on all of it, and
        they take the mean of their results, which are the same but for rounding.
        """
        return 1 if batch_size % self.shape[1] else self.shape[1]

    def spread(self, function: Callable[..., Any], inputs: Sequence[P], outputs: Any) -> Any:
        """`function` on every device, of the parts of its arguments that lie there.

        Args:
          function: of arrays; on a single device it is returned as it is.
          inputs, outputs: how arguments and results are cut: `MEMBERS`, `IMAGES`, ...
        """
        if self.mesh is None:
            return function
        # Without its check: custom derivatives do not say along which axes results vary. A psum's
        # transpose is then a psum, so that gradients are those of the sum of all devices' losses.
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=tuple(inputs), out_specs=outputs, check_vma=False
        )

    def put(self, tree: Any, cut: P) -> Any:
        """A tree that every process has in full, on the devices; each takes its parts only."""
        if self.mesh is None:
            # Said in so many words, as of what a checkpoint holds: to JAX it is another program
            # otherwise, and a resumed run would compile all of its programs again.
            return jax.device_put(tree, jax.local_devices()[0])
        sharding = NamedSharding(self.mesh, cut)
        if sharding.is_fully_addressable:
            return jax.device_put(tree, sharding)
        return jax.tree.map(lambda leaf: _put_parts(leaf, sharding), tree)

    def shapes(self, tree: Any, cut: P) -> Any:
        """Shapes and dtypes of a tree; on a mesh with the places where its arrays are to lie."""
        sharding = None if self.mesh is None else NamedSharding(self.mesh, cut)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
        )

    def describe(self) -> str:
        """ "", or what a line about a run says: " on 4x2 devices (seed x data)"."""
        return "" if self.mesh is None else " on {}x{} devices (seed x data)".format(*self.shape)

    def box(self, shape: tuple[int, ...], cut: P) -> tuple[slice, ...]:
        """The smallest box of an array that holds all parts of this process's devices."""
        if self.mesh is None:
            return tuple(slice(0, size) for size in shape)
        places = NamedSharding(self.mesh, cut).addressable_devices_indices_map(shape)
        parts = [part for part in places.values() if part is not None]
        bounds = [
            [part[axis].indices(size)[:2] for part in parts] for axis, size in enumerate(shape)
        ]
        return tuple(slice(min(a for a, _ in ab), max(b for _, b in ab)) for ab in bounds)

    def put_box(self, part: np.ndarray, shape: tuple[int, ...], cut: P) -> Any:
        """An array [shape] on the devices, of which this process knows `box(shape, cut)`."""
        if self.mesh is None:
            return part
        first = [place.start for place in self.box(shape, cut)]

        def own(index: Any) -> np.ndarray:
            ends = [place.indices(size)[:2] for place, size in zip(index, shape, strict=True)]
            return part[tuple(slice(a - f, b - f) for (a, b), f in zip(ends, first, strict=True))]

        return jax.make_array_from_callback(shape, NamedSharding(self.mesh, cut), own)


#: Without a mesh.
ONE_DEVICE = Layout()


def choose(asked: str, num_members: int, batch_size: int) -> Layout:
    """The layout of a run: the asked one, or one that uses as many devices as possible.

    Of layouts with equally many devices "auto" takes the one with most devices along `seed`, since
    members exchange nothing.

    Args:
      asked: "auto" or "SxD".
      num_members: M; S divides it.
      batch_size: B; D divides it.

    Raises:
      PmoeError: the asked mesh cannot be made; the message names those that can.
    """
    devices = jax.devices()
    possible = _possible(num_members, batch_size, len(devices))
    if asked == "auto":
        shape = max(possible, key=lambda shape: (shape[0] * shape[1], shape[0]))
    else:
        shape = mesh_shape(asked)
    # Every process must take part: programs run in all of them or not at all.
    several = jax.process_count() > 1
    if shape not in possible or (several and shape[0] * shape[1] < len(devices)):
        fitting = [s for s in possible if not several or s[0] * s[1] == len(devices)]
        raise PmoeError(
            f"train.mesh={asked} does not fit {num_members} members, batches of {batch_size} and "
            f"{len(devices)} devices{' of several processes, which must all be used' * several}; "
            f"possible: {', '.join('{}x{}'.format(*s) for s in fitting) or 'none'}"
        )
    if shape == (1, 1):
        return ONE_DEVICE
    used = devices[: shape[0] * shape[1]]
    return Layout(jax.make_mesh(shape, (SEED, DATA), (AxisType.Auto,) * 2, devices=used))


def check(asked: str, num_members: int, batch_size: int) -> None:
    """Refuses a mesh that no number of devices can make; arguments as of `choose`.

    Raises:
      PmoeError: it does not divide members or batches.
    """
    seeds, shards = (1, 1) if asked == "auto" else mesh_shape(asked)
    if num_members % seeds or batch_size % shards:
        raise PmoeError(
            f"train.mesh={asked} does not fit {num_members} members and batches of {batch_size}; "
            "it must divide both"
        )


def fetch(array: Any) -> np.ndarray:
    """The whole array on the host, also where parts of it lie on other processes' devices."""
    if getattr(array, "is_fully_addressable", True):
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def own_rows(array: Any) -> np.ndarray:
    """The rows of a `MEMBERS` array that lie on this process's devices, in order."""
    if getattr(array, "is_fully_addressable", True):
        return np.asarray(array)
    parts = {part.index[0].start or 0: part.data for part in array.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def _possible(num_members: int, batch_size: int, num_devices: int) -> list[tuple[int, int]]:
    return [
        (seeds, shards)
        for seeds in range(1, min(num_members, num_devices) + 1)
        if num_members % seeds == 0
        for shards in range(1, num_devices // seeds + 1)
        if batch_size % shards == 0
    ]


def _put_parts(leaf: Any, sharding: Any) -> jax.Array:
    if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
        data = _put_parts(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
