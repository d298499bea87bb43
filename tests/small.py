"""Runs of a model of two layers, for what does not depend on the model."""

import functools
import json

from flax import linen as nn

from pmoe_jax import checkpoints as checkpoints_lib
from pmoe_jax import config as config_lib
from pmoe_jax import mesh, training
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


@functools.cache
def _cached_programs(text, num_classes, plan, num_members, layout):
    config = config_lib.default()
    config.update_from_flattened_dict(config_lib.flatten(json.loads(text)))
    return training.Programs(config, num_classes, plan, num_members, layout)


def cached_programs(config, num_classes, plan, num_members, layout=mesh.ONE_DEVICE):
    """Programs, compiled once for all runs of one config."""
    text = json.dumps({**config.to_dict(), "seed": 0}, sort_keys=True)
    return _cached_programs(text, num_classes, plan, num_members, layout)


def use(patch, cached=True):
    """Puts the small model in the real one's place."""
    patch.setattr(training, "build_model", lambda config, classes: Small(classes))
    if cached:
        patch.setattr(run_lib, "Programs", cached_programs)


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
    dataset = run_lib.load_data(config)
    plan = run_lib.plan_of(config, len(dataset.train_images))
    programs = cached_programs(config, dataset.num_classes, plan, len(members))
    with checkpoints_lib.Checkpoints(run) as checkpoints:
        found = checkpoints.restore(programs.abstract_state(members, dataset.image_shape), step)
    return found[:3]
