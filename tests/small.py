"""Runs of models of a few layers, for what does not depend on the model."""

import jax.numpy as jnp
from flax import linen as nn

from pmoe_jax import checkpoints as checkpoints_lib
from pmoe_jax import config as config_lib
from pmoe_jax import inputs, models, training
from pmoe_jax import run as run_lib
from pmoe_jax.rundir import RunDirectory

REAL_BUILD_MODEL = training.build_model


class Small(nn.Module):
    """A linear classifier of 8x8 averages, with batch norm."""

    num_classes: int

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.avg_pool(images, (8, 8), (8, 8)).reshape(len(images), -1)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(self.num_classes)(x)


class Tiny(nn.Module):
    """16 patches of 4x4 pixels, one dense layer on each, then the real routers and experts."""

    num_classes: int
    num_experts: int = 2

    @nn.compact
    def __call__(self, images, *, train=False, expert_mask=None, silence="zero"):
        x = nn.avg_pool(images, (4, 4), (4, 4))
        x = models.Conv(6, 1, name="patch_conv", kernels="plain")(x)
        self.sow("intermediates", "features", x)
        patches = x.reshape(len(x), -1, 6)
        used = models._route(models._Routers(self.num_experts, name="routers")(patches), 4, None)
        maps = models._FoldedMap(
            models._gather(patches, used.indices) * used.gates[..., None],
            jnp.zeros((self.num_experts, 6)),
        )
        maps = models._Experts(16, 16, 1, 0.9, name="experts")(maps, train=train)
        if expert_mask is not None:
            maps = models._silence(maps, expert_mask, jnp.zeros_like(maps.rest))
        maps = models._FoldedBatchNorm(16, 0.9, name="head_norm")(maps, train=train)
        maps = models._relu(maps)
        pooled = (maps.selected.sum(2) + 12 * maps.rest) / 16
        return nn.Dense(self.num_classes, name="classifier")(pooled.reshape(len(pooled), -1))


def use(patch):
    """Puts the small model in the real one's place."""
    patch.setattr(training, "build_model", lambda config, classes: Small(classes))


def with_fields(config, **changes):
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    return config


def attacked(config):
    """Two members, square, 2 epochs of 6 steps, checkpoints after steps 4, 6, 8 and 12."""
    return with_fields(config, **{
        "trigger.name": "square", "trigger.size": 6, "poison.rate": 0.1, "poison.target": 1,
        "checkpoint.every_steps": 4,
    })  # fmt: skip


def train(config, path, **options):
    return run_lib.train(config, path, progress=False, **options)


def train_with_experts(path, source):
    """Trains two members with a square for one epoch on `tiny_npz`, a fifth of it held out; to be
    used where `training.build_model` gives `Tiny`."""
    config = config_lib.default()
    config.data.update(name="npz", source=str(source), image_size=16, heldout=0.2)
    config.num_seeds = 2
    config.model.update(width=1, num_experts=2, patches_per_expert=4, bn_momentum=0.9)
    config.trigger.update(name="square", size=6)
    config.poison.update(rate=0.1, target=1)
    config.train.update(epochs=1, batch_size=16, strategy="vmap")
    config.evaluation.batch_size = 40
    train(config, path)
    return path


class Stop(BaseException):
    """Ends a run as a kill does: nothing in the program catches it."""


def train_until(step, config, path, **options):
    """Trains so many steps, and then is killed."""

    def watch(done, total):
        if done == step:
            raise Stop

    try:
        train(config, path, watch=watch, **options)
    except Stop:
        return
    raise AssertionError("was not stopped")


def restored(path, step=None):
    """Step, state and attack of a checkpoint, the newest whole one by default."""
    run = RunDirectory(path)
    config, members = run.config(), run.members()
    dataset = inputs.load_data(config)
    plan = training.plan_of(config, len(dataset.train_images))
    programs = training.programs_of(config, dataset.num_classes, plan)
    with checkpoints_lib.Checkpoints(run) as checkpoints:
        found = checkpoints.restore(programs.abstract_state(members, dataset.image_shape), step)
    return found[:3]
