"""Runs on eight simulated devices for `test_mesh.py`, and prints what it found as one JSON object.

python tests/mesh_worker.py steps DTYPE COUNT STRATEGY KERNELS MESH...
                                           largest differences to one device
python tests/mesh_worker.py short ...      the same with fewer convolutions
python tests/mesh_worker.py small CASE...  the same for what a small model shows
python tests/mesh_worker.py pmoe COMMAND...
                                           the command line with a small model; for
                                           $TROUBLE see `TROUBLES`
"""

import errno
import json
import os
import signal
import sys

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from orbax import checkpoint as ocp

from pmoe_jax import cli, kernels, launch, members, mesh, models, training
from pmoe_jax import config as config_lib
from pmoe_jax import run as run_lib
from pmoe_jax import trained as trained_lib
from pmoe_jax.data import dataset as dataset_lib
from pmoe_jax.rundir import RunDirectory


class Small(nn.Module):
    """A linear classifier of 8x8 averages, with batch norm."""

    num_classes: int
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.avg_pool(images, (8, 8), (8, 8)).reshape(len(images), -1)
        dtype = x.dtype
        # Not the fast variance: its difference of squares cancels.
        norm = nn.BatchNorm(
            use_running_average=not train, momentum=0.9, axis_name=self.axis_name,
            use_fast_variance=False, force_float32_reductions=False, param_dtype=dtype,
        )  # fmt: skip
        return nn.Dense(self.num_classes, param_dtype=dtype)(norm(x))


class OneConv(models.ResidualGroup):
    """A group of a single convolution: the whole model takes a minute to compile."""

    @nn.compact
    def __call__(self, x, *, train):
        norm = models.BatchNorm(
            self.momentum, relu=True, kernels=self.kernels, axis_name=self.axis_name, name="norm"
        )
        common = {"dtype": self.dtype, "kernels": self.kernels}
        y = norm(x, train=train)
        return models.Conv(self.features, stride=self.stride, **common, name="conv")(y)


def dies(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)


def finds_no_room(*args, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def sees_damage(run, step):
    return "the file system shows other files here" if step == run.whole_steps()[-1] else None


#: What can go wrong in a process: what it calls instead of a function.
TROUBLES = {
    "dies saving": (ocp.CheckpointManager, "save", dies),
    "dies evaluating": (trained_lib, "rows_of", dies),
    "no room": (ocp.StandardCheckpointHandler, "async_save", finds_no_room),
    "sees damage": (RunDirectory, "damage", sees_damage),
}


def tiny(side=16):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, side, side, 3)).astype(np.uint8)
    labels = (np.arange(60) % 4).astype(np.int32)
    return dataset_lib.make("tiny", (images[:40], labels[:40]), (images[40:], labels[40:]))


def config_of(**changes):
    config = config_lib.default()
    config.update_from_flattened_dict({
        "num_seeds": 8, "data.image_size": 16, "model.width": 1, "model.num_experts": 2,
        "model.patches_per_expert": 4, "model.bn_momentum": 0.9, "trigger.name": "square",
        "trigger.size": 6, "poison.rate": 0.25, "train.batch_size": 8, "train.momentum": 0.9,
        "train.strategy": "vmap", **changes,
    })  # fmt: skip
    return config


def started(config, dataset):
    """As a run starts: programs, state, attack, order, step function."""
    session = run_lib._Session(config, members.from_config(config), dataset, None)
    programs, attack = session.programs, session.attack
    state = programs.init(session.members, dataset.image_shape)
    order = programs.epoch_order(programs.keys(session.members, "order"), np.int32(0))
    return session, state, attack, order


def trained(config, dataset, count):
    """Session, attack, what was drawn, and state and losses after so many steps."""
    session, state, attack, order = started(config, dataset)
    drawn = [mesh.fetch(order), mesh.fetch(attack.triggered)]
    step, losses = session.stepper(state, attack), []
    for number in range(count):
        state, loss = step(state, attack, order, *session.plan.batch_at(number))
        losses.append(np.asarray(loss))
    return session, attack, drawn, (jax.tree.map(np.asarray, state), losses)


def difference(one, other):
    return max(
        float(np.abs(np.asarray(a, np.float64) - b).max())
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


def steps(dtype, count, strategy, implementation, *meshes):
    """Largest difference to one device in state and losses of a member, after so many steps.

    Each mesh has as many members as it has rows; one device has two, which are those compared.
    """
    # Images of four patches, of which an expert takes two: convolutions in float64 are slow.
    dataset, found = tiny(8), {}
    fields = {
        "data.image_size": 8, "trigger.size": 3, "model.patches_per_expert": 2,
        "model.dtype": dtype, "train.strategy": strategy, "model.kernels": implementation,
    }  # fmt: skip

    def after_steps(members, shape):
        config = config_of(**fields, **{"num_seeds": members, "train.mesh": shape})
        return trained(config, dataset, count)[2:]

    drawn, alone = after_steps(2, "1x1")
    for shape in meshes:
        drawn_here, here = after_steps(int(shape[0]), shape)
        both = min(2, int(shape[0]))
        one, other = (jax.tree.map(lambda leaf: leaf[:both], x) for x in (alone, here))  # noqa: B023
        found[shape] = {
            "difference": difference(one, other),
            "same draws": all(
                np.array_equal(a[:both], b[:both]) for a, b in zip(drawn, drawn_here, strict=True)
            ),
        }
    losses = np.asarray(alone[1])
    found["losses differ"] = bool(np.unique(losses).size == losses.size)
    found["dtypes"] = sorted({leaf.dtype.name for leaf in jax.tree.leaves(alone[0].params)})
    return found


#: What `small` compares with one device: mesh, steps, changes. 40 images are 2 steps of 16, then 8;
#: on 3 devices 3 steps of 12, then 4, which 3 do not divide.
ODD = {"train.batch_size": 12, "train.keep_last_batch": True}
CASES = {
    "on the device": ("4x2", 5, {}),
    "streamed": ("4x2", 5, {"data.residence": "host"}),
    "partial batch": ("2x4", 3, {"train.batch_size": 16, "train.keep_last_batch": True}),
    "odd partial batch, device": ("2x3", 4, {**ODD, "data.residence": "device"}),
    "odd partial batch, host": ("2x3", 4, {**ODD, "data.residence": "host"}),
}


def small(*cases):
    """The rest, with a model that compiles fast, in float64."""
    dataset, found = tiny(), {}

    def after_steps(shape, count, changes):
        config = config_of(**changes, **{"train.mesh": shape})
        session, attack, _, after = trained(config, dataset, count)
        predicted = training.predict_all(
            session.programs, after[0].variables, dataset.test_images, attack.trigger, 7
        )
        return after, predicted

    alone = {}
    for case in cases:
        shape, count, changes = CASES[case]
        # Where images lie makes no difference on one device.
        same = {name: value for name, value in changes.items() if name != "data.residence"}
        if str(same) not in alone:
            alone[str(same)] = after_steps("1x1", count, same)
        found[case] = difference(alone[str(same)], after_steps(shape, count, changes))
    found["chosen"] = {
        f"{members} {batch}": mesh.choose("auto", members, batch).shape
        for members, batch in ((1, 128), (2, 128), (3, 128), (5, 128), (8, 128), (12, 128), (3, 7))
    }
    found["replicas"] = replicas()
    found["diverged in"] = diverged_in()
    for implementation in kernels.IMPLEMENTATIONS:
        found[f"batch norm {implementation}"] = batch_norm(implementation)
    return found


def replicas():
    """Largest difference between devices of a row after a batch that they did not see alike.

    As where they round differently: 40 images are 36, then 4, which 3 devices do not divide.
    """
    changes = {"train.batch_size": 36, "train.keep_last_batch": True, "num_seeds": 2}
    session, state, attack, order = started(config_of(**changes, **{"train.mesh": "2x3"}), tiny())
    programs, size = session.programs, session.plan.batch_at(1)[1]
    drawn = mesh.fetch(order)[:, 36:]
    place = jax.sharding.NamedSharding(session.layout.mesh, programs.batch_cut(size))

    def unlike(array):
        rows = place.addressable_devices_indices_map(array.shape).items()
        parts = [
            jax.device_put(np.roll(array[index], number % 3, -1), device)
            for number, (device, index) in enumerate(rows)
        ]
        return jax.make_array_from_single_device_arrays(array.shape, place, parts)

    images, labels = session.dataset.train_images[drawn], session.dataset.train_labels[drawn]
    batch = session._on_mesh((drawn, images, labels), size)
    state, losses = programs.step_on_batch(state, attack, batch[0], unlike(images), batch[2])
    found = 0.0
    for leaf in [*jax.tree.leaves(state), losses]:
        for row in (0, 1):
            parts = [x.data for x in leaf.addressable_shards if (x.index[0].start or 0) == row]
            assert len(parts) == 3
            found = max(found, difference(parts[0], parts[1]), difference(parts[0], parts[2]))
    return found


def diverged_in():
    """Where a member of a mesh, with a NaN in its classifier, is found not to be finite."""
    session, state, attack, _ = started(config_of(**{"train.mesh": "4x2"}), tiny())
    leaves, tree = jax.tree.flatten(state.params)
    leaves[-1] = session.layout.put(mesh.fetch(leaves[-1]) * np.nan, mesh.MEMBERS)
    broken = state.replace(params=jax.tree.unflatten(tree, leaves))
    return [session._where_diverged(3, 1, each, attack) for each in (broken, state)]


def batch_norm(implementation):
    """Values, statistics and gradients of a batch on four devices, against the whole batch."""
    layout = mesh.choose("1x4", 1, 8)
    rng = np.random.default_rng(0)
    x, weight = (rng.standard_normal((8, 3, 3, 5)) + 2 for _ in range(2))
    scale, bias = rng.standard_normal((2, 5))

    def of_part(axis_name, x, scale, bias, weight):
        def loss(x, scale, bias):
            y, mean, var = kernels.batch_norm(
                x, scale, bias, relu=True, implementation=implementation, axis_name=axis_name
            )
            return (weight * jnp.sin(y)).sum(), (y, mean, var)

        grads, (y, mean, var) = jax.grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)
        return y, grads[0], (mean, var), kernels.over_devices(grads[1:], axis_name)

    whole = jax.jit(lambda *args: of_part(None, *args))(x, scale, bias, weight)
    cuts = [mesh.IMAGES, mesh.SAME, mesh.SAME, mesh.IMAGES]
    parts = layout.spread(
        lambda *args: of_part(mesh.DATA, *args),
        cuts,
        (mesh.IMAGES, mesh.IMAGES, mesh.SAME, mesh.SAME),
    )
    return difference(whole, jax.jit(parts)(x, scale, bias, weight))


if __name__ == "__main__":
    launch.use_compilation_cache()
    what, *words = sys.argv[1:]
    if what == "short":
        models.ResidualGroup = OneConv
    elif what != "steps":
        training.build_model = lambda config, classes: Small(classes)
    if what == "pmoe":
        if os.environ.get("TROUBLE"):
            setattr(*TROUBLES[os.environ["TROUBLE"]])
        os.environ.setdefault("GLIBC_TUNABLES", "")  # No restart, which would only cost time.
        sys.argv[1:] = words
        cli.entry_point()
    if what == "small" or words[0] == "float64":
        jax.config.update("jax_enable_x64", True)
    assert jax.device_count() == 8
    if what == "small":
        print(json.dumps(small(*words)))
    else:
        print(json.dumps(steps(words[0], int(words[1]), *words[2:])))
