"""Meshes of devices: figures do not depend on them, nor do checkpoints.

JAX fixes the number of devices at its start, so everything here runs in processes of its own, on
eight simulated devices (`mesh_worker.py`) or through the command line.
"""

import json
import os
import pathlib
import shutil
import sys
import types

import bounded
import jax
import numpy as np
import pytest
from locations import ROOT
from orbax import checkpoint as ocp

from pmoe_jax import config as config_lib
from pmoe_jax import mesh
from pmoe_jax.errors import PmoeError
from pmoe_jax.rundir import RunDirectory

WORKER = pathlib.Path(__file__).with_name("mesh_worker.py")
MESHES = ("8x1", "4x2", "2x4", "1x8")
#: Five steps with the plain kernels, which compile fast.
IN_FLOAT64 = ("steps", "float64", "5", "unroll", "plain")


def environment(devices):
    """Of a process with so many devices, whose programs are unoptimised: they compile fast."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def worker():
    """worker(*words) -> what it prints; each is run once."""
    known = {}

    def run(*words):
        if words not in known:
            done = bounded.run([sys.executable, WORKER, *words], 300, env=environment(8))
            assert done.returncode == 0, done.stderr[-3000:]
            known[words] = json.loads(done.stdout)
        return known[words]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("shape", MESHES)
class TestAMeshEqualsOneDevice:
    def test_after_five_steps_in_float64(self, worker, shape):
        found = worker(*IN_FLOAT64, *MESHES)
        assert found["losses differ"] and found["dtypes"] == ["float64"]
        assert found[shape]["difference"] < 1e-10

    def test_data_order_and_poison_choice_are_the_same(self, worker, shape):
        assert worker(*IN_FLOAT64, *MESHES)[shape]["same draws"]

    def test_after_one_step_in_float32(self, worker, shape):
        found = worker("steps", "float32", "1", "unroll", "auto", *MESHES)
        assert found["losses differ"]
        assert found[shape]["difference"] < 1e-5


@pytest.mark.parametrize(("strategy", "implementation"), [("unroll", "plain"), ("vmap", "auto")])
def test_the_model_with_fewer_convolutions(worker, strategy, implementation):
    """All its kinds of layers, members and batches both spread; the slow tests take it whole."""
    found = worker("short", "float64", "5", strategy, implementation, "2x4")
    assert found["losses differ"] and found["dtypes"] == ["float64"]
    assert found["2x4"]["same draws"]
    assert found["2x4"]["difference"] < 1e-10


FAST = ("on the device", "odd partial batch, host")
SLOW = ("streamed", "partial batch", "odd partial batch, device")


@pytest.mark.parametrize("what", [*FAST, "batch norm auto", "batch norm plain"])
def test_a_mesh_equals_one_device_in_detail(worker, what):
    assert worker("small", *FAST)[what] < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("what", SLOW)
def test_a_mesh_equals_one_device_in_more_detail(worker, what):
    assert worker("small", *SLOW)[what] < 1e-10


def test_devices_of_a_row_stay_equal_where_they_compute_unlike(worker):
    assert worker("small", *FAST)["replicas"] == 0


def test_where_a_member_diverged_is_found_on_a_mesh(worker):
    where, nowhere = worker("small", *FAST)["diverged in"]
    assert where not in ("", "unknown") and nowhere == "unknown"


def test_auto_takes_most_devices_and_most_of_them_for_members(worker):
    assert worker("small", *FAST)["chosen"] == {
        "1 128": [1, 8], "2 128": [2, 4], "3 128": [1, 8], "5 128": [1, 8], "8 128": [8, 1],
        "12 128": [4, 2], "3 7": [1, 7],
    }  # fmt: skip


def test_one_device_is_no_mesh_at_all():
    layout = mesh.choose("auto", 3, 128)
    assert layout == mesh.ONE_DEVICE and layout.shape == (1, 1)

    def function(x):
        return x

    assert layout.spread(function, [mesh.MEMBERS], mesh.MEMBERS) is function


def test_a_mesh_that_does_not_fit_names_those_that_do():
    with pytest.raises(
        PmoeError, match=r"train\.mesh=2x1 does not fit 3 members, .* possible: 1x1"
    ):
        mesh.choose("2x1", 3, 128)


def test_a_mesh_of_other_machines_must_divide_members_and_batches():
    for fine in ("auto", "3x1", "1x64", "3x2"):
        mesh.check(fine, 3, 128)
    for value in ("2x1", "1x3"):
        with pytest.raises(PmoeError, match=rf"train\.mesh={value} does not fit 3 members"):
            mesh.check(value, 3, 128)


@pytest.mark.parametrize("value", ["4", "4x", "0x2", "2x2x2", "2 x 2", ""])
def test_a_mesh_is_written_as_two_numbers(value):
    config = config_lib.default()
    config.train.mesh = value
    with pytest.raises(PmoeError, match=r"train\.mesh=.* allowed: auto or SxD, such as 4x2"):
        config_lib.validate(config.to_dict())


def half_of(shape, which):
    """`addressable_devices_indices_map` of one of two processes with 4 of SxD devices each."""

    class Half:
        def __init__(self, _, cut):
            self._cut = cut

        def addressable_devices_indices_map(self, size):
            places = {}
            for device in range(4 * which, 4 * which + 4):
                at = dict(zip(("seed", "data"), np.unravel_index(device, shape), strict=True))
                count = dict(zip(("seed", "data"), shape, strict=True))
                parts = [slice(None)] * len(size)
                for axis, name in enumerate(self._cut):
                    if name:
                        part = size[axis] // count[name]
                        parts[axis] = slice(at[name] * part, (at[name] + 1) * part)
                places[device] = tuple(parts)
            return places

    return Half


@pytest.mark.parametrize(
    ("shape", "which", "box"),
    [
        # 4 members, batches of 8: members of its own rows, all of their images
        ((2, 4), 0, (slice(0, 2), slice(0, 8))),
        ((2, 4), 1, (slice(2, 4), slice(0, 8))),
        ((4, 2), 1, (slice(2, 4), slice(0, 8))),
        # all members, half of the images of each
        ((1, 8), 0, (slice(0, 4), slice(0, 4))),
        ((1, 8), 1, (slice(0, 4), slice(4, 8))),
    ],
)
def test_a_process_reads_its_own_members_and_its_part_of_their_batches(
    monkeypatch, shape, which, box
):
    monkeypatch.setattr(mesh, "NamedSharding", half_of(shape, which))
    layout = mesh.Layout(types.SimpleNamespace(devices=np.empty(shape)))
    assert layout.box((4, 8), mesh.MEMBERS_IMAGES) == box
    assert layout.box((4, 8), mesh.SAME) == (slice(0, 4), slice(0, 8))


def test_rows_of_a_process_are_those_of_its_devices_once_and_in_order():
    """Two rows of two devices each, which hold the same."""
    parts = [
        types.SimpleNamespace(index=(slice(start, start + 2), slice(None)), data=[[start], [start]])
        for start in (6, 6, 4, 4)
    ]
    array = types.SimpleNamespace(is_fully_addressable=False, addressable_shards=parts)
    assert mesh.own_rows(array).tolist() == [[4], [4], [6], [6]]


# --- checkpoints, through the command line ------------------------------------------------------


def command(config, workdir, *more):
    """`pmoe train` with the small model, as words."""
    fields = config_lib.flatten(config.to_dict())
    default = config_lib.flatten(config_lib.default().to_dict())
    flags = [f"--config.{n}={v}" for n, v in fields.items() if v != default[n]]
    start = [sys.executable, str(WORKER), "pmoe", "train", f"--workdir={workdir}", "--noprogress"]
    return [*start, *flags, *more]


def train(config, workdir, devices, *more):
    done = bounded.run(command(config, workdir, *more), 150, env=environment(devices))
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def state_of(path, step):
    """A checkpoint's arrays, read without this package."""
    with jax.enable_x64(True), ocp.StandardCheckpointer() as reader:
        item = (path / "checkpoints" / str(step) / "state").absolute()
        shapes = reader.metadata(item).item_metadata.tree
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), shapes
        )
        return jax.tree.map(np.asarray, reader.restore(item, abstract))


def back_to(path, step, copy):
    """A copy of a run as it was when it had only the checkpoint of this step."""
    shutil.copytree(path, copy)
    RunDirectory(copy).seal([step])
    for folder in (copy / "checkpoints").iterdir():
        if folder.name != str(step):
            shutil.rmtree(folder)
    return copy


@pytest.fixture(scope="module")
def small_npz(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("small") / "small.npz"
    np.savez(
        path,
        train_images=rng.integers(0, 256, (40, 16, 16, 3)).astype(np.uint8),
        train_labels=np.arange(40) % 4,
        test_images=rng.integers(0, 256, (18, 16, 16, 3)).astype(np.uint8),
        test_labels=np.arange(18) % 4,
    )
    return path


def test_a_run_goes_on_with_other_devices(tiny_config, small_npz, tmp_path):
    config = tiny_config
    config.data.source = str(small_npz)
    config.update_from_flattened_dict({
        "model.dtype": "float64", "train.batch_size": 8, "train.learning_rate": 0.01,
        "checkpoint.every_steps": 4, "checkpoint.keep_every_epochs": 1, "trigger.name": "square",
        "poison.rate": 0.25,
    })  # fmt: skip
    on_one = tmp_path / "one"
    train(config, on_one, 1)
    on_four = back_to(on_one, 5, tmp_path / "one_to_four")
    said = train(config, on_four, 4)
    assert "2 members on 2x2 devices (seed x data), unroll: a step needs" in said
    assert f"resuming {on_four} at step 5" in said
    again = back_to(on_four, 8, tmp_path / "four_to_one")
    assert f"resuming {again} at step 8" in train(config, again, 1, "--config.train.strategy=vmap")
    one = state_of(on_one, 10)
    assert one["params"]["Dense_0"]["kernel"].dtype == np.float64
    for other in (state_of(path, 10) for path in (on_four, again)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-8), one, other)
    figures = [RunDirectory(path).rows() for path in (on_one, on_four, again)]
    values = [[(row["member"], row["metric"], row["value"]) for row in rows] for rows in figures]
    assert values[0] == values[1] == values[2]
