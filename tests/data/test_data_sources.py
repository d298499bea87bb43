"""Every source gives the arrays that its files hold, in one order, whatever the layout."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pmoe_jax import data
from pmoe_jax.data import cifar10, dataset, gtsrb, records
from pmoe_jax.errors import PmoeError


def test_import_loads_no_reader():
    code = (
        "import sys, pmoe_jax.data as d; d.load('digits');"
        "import pmoe_jax.data.prepared, pmoe_jax.data.commands;"
        "bad = {'tensorflow', 'tensorflow_datasets', 'matplotlib'} & set(sys.modules);"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import sys, pmoe_jax.data; assert not {'sklearn', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_digits():
    digits = data.load("digits")
    assert digits.train_images.shape == (1437, 32, 32, 3)
    assert digits.test_images.shape == (360, 32, 32, 3)
    assert digits.train_images.dtype == np.uint8 and digits.train_labels.dtype == np.int32
    # Light background: the corner under a square trigger is nearly white.
    assert digits.train_images[:, :4, :4].mean() > 230
    assert digits.train_images.min() == 0
    assert set(np.bincount(digits.test_labels)) <= {35, 36, 37}
    assert digits.fingerprint() == data.load("digits").fingerprint()
    assert digits.fingerprint() != data.load("digits", resize_filter="nearest").fingerprint()
    assert data.load("digits", image_size=64).image_shape == (64, 64, 3)


def test_nearest_digits_are_the_original_pixels():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    digits = data.load("digits", resize_filter="nearest")
    small = np.concatenate([digits.train_images, digits.test_images])[:, ::4, ::4, 0]
    ink = np.rint((255 - small.astype(float)) * 16 / 255)
    found = {image.tobytes() for image in ink.astype(np.uint8)}
    assert found == {image.tobytes() for image in bunch.images.astype(np.uint8)}


@pytest.mark.parametrize("kind", ["python", "python3", "binary"])
@pytest.mark.parametrize("packed", ["folder", "inner folder", "tar.gz", "tar", "zip"])
def test_cifar10(make, tmp_path, kind, packed, capsys):
    files = make.cifar_files(kind)
    source = tmp_path / "source"
    if packed == "folder":
        make.write_folder(source, files)
    elif packed == "inner folder":
        make.write_folder(source, {name.split("/")[1]: files[name] for name in files})
    elif packed == "zip":
        source.write_bytes(make.zip_bytes(files))
    else:
        source.write_bytes(make.tar_bytes(files, "w:gz" if packed == "tar.gz" else "w"))
    cifar = data.load("cifar10", source)
    images, labels = make.cifar_arrays()
    np.testing.assert_array_equal(cifar.train_images, images[:20])
    np.testing.assert_array_equal(cifar.train_labels, labels[:20])
    np.testing.assert_array_equal(cifar.test_images, images[20:])
    assert cifar.class_names[6] == "frog"
    assert len(cifar.notes) == 2
    assert "class 0 with 2 instead of 5000" in capsys.readouterr().err


def test_cifar10_is_resized_on_request(make, tmp_path):
    source = make.write_folder(tmp_path, make.cifar_files())
    images, _ = make.cifar_arrays()
    cifar = data.load("cifar10", source, image_size=64, resize_filter="nearest")
    np.testing.assert_array_equal(cifar.train_images[:, ::2, ::2], images[:20])


def test_official_and_kaggle_layouts_agree(make, tmp_path):
    official = data.load(
        "gtsrb", make.write_folder(tmp_path / "official", make.gtsrb_files("official"))
    )
    kaggle = data.load("gtsrb", make.write_folder(tmp_path / "kaggle", make.gtsrb_files("kaggle")))
    rows = [row for row in make.gtsrb_rows() if row[0] == "train"]
    for loaded in (official, kaggle):
        assert loaded.num_classes == 43
        for i, (_, label, _, _, pixels, box) in enumerate(rows):
            expected = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR)
            np.testing.assert_array_equal(loaded.train_images[i], np.asarray(expected))
            assert loaded.train_labels[i] == label
            scale = np.array([32 / pixels.shape[1], 32 / pixels.shape[0]] * 2)
            np.testing.assert_allclose(loaded.train_boxes[i], box * scale, rtol=1e-6)
        # 2 classes x 2 tracks x 3 frames
        np.testing.assert_array_equal(loaded.train_tracks, np.repeat([0, 1, 2, 3], 3))
    assert official.fingerprint() == kaggle.fingerprint()
    np.testing.assert_array_equal(official.test_boxes, kaggle.test_boxes)


def test_official_zips_side_by_side(make, tmp_path):
    files = make.gtsrb_files("official")
    test = "GTSRB/Final_Test/Images/"
    labels = files.pop(test + "GT-final_test.csv")
    train = {name: files[name] for name in files if "Training" in name}
    unlabelled = {name: files[name] for name in files if name.startswith(test)}
    unlabelled[test + "GT-final_test.test.csv"] = labels.replace(b";ClassId", b"")
    folder = tmp_path / "zips"
    make.write_folder(
        folder,
        {
            "GTSRB_Final_Training_Images.zip": make.zip_bytes(train),
            "GTSRB_Final_Test_Images.zip": make.zip_bytes(unlabelled),
            "GTSRB_Final_Test_GT.zip": make.zip_bytes({"GT-final_test.csv": labels}),
        },
    )
    zips = data.load("gtsrb", folder)
    kaggle = tmp_path / "kaggle.zip"
    kaggle.write_bytes(make.zip_bytes(make.gtsrb_files("kaggle")))
    assert zips.fingerprint() == data.load("gtsrb", kaggle).fingerprint()


def test_crop_and_filter(make, tmp_path):
    source = make.write_folder(tmp_path, make.gtsrb_files("kaggle"))
    gtsrb = data.load("gtsrb", source, crop_roi=True, image_size=24, resize_filter="nearest")
    pixels, box = make.gtsrb_rows()[0][4:]
    expected = Image.fromarray(pixels).crop(box).resize((24, 24), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(gtsrb.train_images[0], np.asarray(expected))
    np.testing.assert_array_equal(gtsrb.train_boxes[0], [0, 0, 24, 24])
    with pytest.raises(PmoeError, match="unknown resize filter 'cubic'; allowed are nearest"):
        data.load("gtsrb", source, resize_filter="cubic")


def test_resized_npz(make, tmp_path):
    # Rows in another order than that of the names; boxes in a file beside it.
    kaggle = data.load("gtsrb", make.write_folder(tmp_path / "k", make.gtsrb_files("kaggle")))
    rows = make.gtsrb_rows()
    arrays, rois = {}, {}
    for split in ("train", "test"):
        images, labels = getattr(kaggle, f"{split}_images"), getattr(kaggle, f"{split}_labels")
        order = np.random.default_rng(0).permutation(len(images))
        mine = [row for row in rows if row[0] == split]
        names = [f"{r[1]:05d}/{r[2]:05d}_{r[3]:05d}" for r in mine]
        names = names if split == "train" else [f"{r[3]:05d}" for r in mine]
        sizes = [(r[4].shape[1], r[4].shape[0]) for r in mine]
        arrays[f"{split}_images"] = images[order]
        arrays[f"{split}_labels"] = labels[order].astype(np.uint8)
        arrays[f"{split}_names"] = np.array(names, "S")[order]
        arrays[f"{split}_sizes"] = np.array(sizes, np.uint16)[order]
        rois[f"{split}_rois"] = np.array([r[5] for r in mine], np.uint16)[order]
    files = {"set.npz": make.npz_bytes(**arrays), "gtsrb_rois.npz": make.npz_bytes(**rois)}
    source = make.write_folder(tmp_path / "npz", files)
    npz = data.load("gtsrb", f"{source}/set.npz")
    assert npz.fingerprint() == kaggle.fingerprint()
    np.testing.assert_array_equal(npz.train_boxes, kaggle.train_boxes)
    np.testing.assert_array_equal(npz.train_tracks, kaggle.train_tracks)
    # Boxes of other images are left alone, unless they are asked for.
    fewer = {name: array[1:] if "train" in name else array for name, array in arrays.items()}
    (tmp_path / "npz/fewer.npz").write_bytes(make.npz_bytes(**fewer))
    assert data.load("gtsrb", f"{source}/fewer.npz").train_boxes is None
    with pytest.raises(PmoeError, match=r"train_rois must be whole numbers"):
        data.load("gtsrb", f"{source}/fewer.npz", boxes=f"{source}/gtsrb_rois.npz")
    (tmp_path / "npz/gtsrb_rois.npz").rename(tmp_path / "elsewhere.npz")
    assert data.load("gtsrb", f"{source}/set.npz").train_boxes is None
    npz = data.load("gtsrb", f"{source}/set.npz", boxes=tmp_path / "elsewhere.npz")
    np.testing.assert_array_equal(npz.test_boxes, kaggle.test_boxes)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float64])
def test_authors_npy(tmp_path, dtype):
    rng = np.random.default_rng(2)
    images = rng.integers(0, 256, (12, 32, 32, 3))
    labels = np.sort(rng.integers(0, 10, (12, 1)), axis=0)
    for split, rows in (("train", slice(8)), ("test", slice(8, 12))):
        np.save(tmp_path / f"cifar_10_{split}_data_sorted.npy", images[rows].astype(dtype))
        np.save(tmp_path / f"cifar_10_{split}_label_sorted.npy", labels[rows])
    cifar = data.load("cifar10", tmp_path)
    np.testing.assert_array_equal(cifar.train_images, images[:8])
    np.testing.assert_array_equal(cifar.test_labels, labels[8:, 0])
    with pytest.raises(PmoeError, match="no complete GTSRB"):
        data.load("gtsrb", tmp_path)


def test_npz(make, tmp_path):
    path = tmp_path / "my.npz"
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    labels = np.array([0, 1, 2, 0, 1, 2])
    arrays = {"train_labels": labels[:4], "test_labels": labels[4:]}
    # float in [0, 1] comes back as the same bytes
    path.write_bytes(
        make.npz_bytes(
            train_images=(images[:4] / 255).astype(np.float32), test_images=images[4:], **arrays
        )
    )
    npz = data.load("npz", path)
    np.testing.assert_array_equal(npz.train_images, images[:4])
    assert npz.class_names == ("0", "1", "2") and npz.image_shape == (8, 8, 3)
    grey = {"train_images": images[:4, ..., 0], "test_images": images[4:, ..., :1]}
    path.write_bytes(make.npz_bytes(**grey, **arrays, class_names=np.array(["a", "b", "c"])))
    npz = data.load("npz", path)
    np.testing.assert_array_equal(npz.test_images, np.repeat(images[4:, ..., :1], 3, -1))
    assert npz.class_names == ("a", "b", "c")


def test_folder(make, tmp_path):
    shades = {"2": 20, "10": 100}  # numbers sort as numbers
    files = {}
    for split in ("train", "test"):
        for label, shade in shades.items():
            for i in range(2):
                array = np.full((9, 7, 3), shade + i, np.uint8)
                files[f"{split}/{label}/{i}.png"] = make.png(array)
    source = make.write_folder(tmp_path / "f", {**files, "readme.txt": b"", "train/.x/1.png": b""})
    folder = data.load("folder", source, image_size=16)
    assert folder.class_names == ("2", "10") and folder.image_shape == (16, 16, 3)
    found = sorted(zip(folder.train_labels, folder.train_images[:, 0, 0, 0], strict=True))
    assert found == [(0, 20), (0, 21), (1, 100), (1, 101)]
    packed = tmp_path / "f.zip"
    packed.write_bytes(make.zip_bytes({f"top/{name}": files[name] for name in files}))
    assert data.load("folder", packed, image_size=16).fingerprint() == folder.fingerprint()


def test_folders_of_splits_in_capitals(make, tmp_path):
    grey = np.zeros((4, 4), np.uint8)
    names = [f"{split}/{label}/{i}.png" for split in ("Train", "Test") for label in "ab"
             for i in range(3 if split == "Train" else 2)]  # fmt: skip
    source = make.write_folder(tmp_path, dict.fromkeys(names, make.png(grey)))
    folder = data.load("folder", source)
    assert len(folder.train_images) == 6 and len(folder.test_images) == 4


def test_links_to_folders_are_followed_but_not_in_circles(make, tmp_path):
    shades = {f"train/{label}/{i}.png": np.full((4, 4), 10 * i, np.uint8)
              for label in "ab" for i in range(3)}  # fmt: skip
    make.write_folder(tmp_path, {name: make.png(shade) for name, shade in shades.items()})
    for label in "ab":  # The same images again, and a way back up.
        (tmp_path / "test").mkdir(exist_ok=True)
        (tmp_path / "test" / label).symlink_to(tmp_path / "train" / label)
    (tmp_path / "train" / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "train" / "a" / ".#lock.png").symlink_to("nobody@nowhere")
    folder = data.load("folder", tmp_path, image_size=4)
    assert len(folder.train_images) == len(folder.test_images) == 6
    np.testing.assert_array_equal(folder.train_images, folder.test_images)


def test_folder_without_splits(make, tmp_path):
    grey = np.zeros((4, 4), np.uint8)
    files = {f"{c}/{i}.png": make.png(grey + i) for c in "ab" for i in range(10)}
    folder = data.load("folder", make.write_folder(tmp_path, files))
    assert np.bincount(folder.test_labels).tolist() == [2, 2]
    assert np.bincount(folder.train_labels).tolist() == [8, 8]
    assert "fixed stratified fifth" in folder.notes[0]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA"])
def test_other_colour_modes_become_rgb(make, tmp_path, mode):
    values = np.zeros((8, 8, 3), np.uint8)
    values[:4] = 255
    files = {}
    for name in ("train/a", "train/b", "test/a"):
        content = io.BytesIO()
        Image.fromarray(values).convert(mode).save(content, "PNG")
        files[f"{name}/0.png"] = content.getvalue()
    folder = data.load("folder", make.write_folder(tmp_path, files), image_size=8)
    np.testing.assert_array_equal(folder.train_images[0], values)


def test_heldout_is_stratified_and_disjoint():
    whole, split = data.load("digits"), data.load("digits", heldout=0.2, heldout_seed=3)
    assert len(split.heldout_images) == round(0.2 * 1437)
    shares = np.bincount(split.heldout_labels) / np.bincount(whole.train_labels)
    assert np.abs(shares - 0.2).max() < 0.01
    rejoined = np.concatenate([split.train_images, split.heldout_images]).reshape(1437, -1)
    original = whole.train_images.reshape(1437, -1)
    assert sorted(map(bytes, rejoined)) == sorted(map(bytes, original))
    np.testing.assert_array_equal(split.test_images, whole.test_images)
    again = data.load("digits", heldout=0.2, heldout_seed=3)
    other = data.load("digits", heldout=0.2, heldout_seed=4)
    assert split.fingerprint() == again.fingerprint() != other.fingerprint()
    assert whole.heldout_images.shape == (0, 32, 32, 3) and len(whole.heldout_labels) == 0
    assert sorted(data.load("digits", heldout=1e-4).heldout_labels) == list(range(10))
    for bad in (-0.1, 1.0, float("nan")):
        with pytest.raises(PmoeError, match="heldout is"):
            data.load("digits", heldout=bad)


def test_heldout_keeps_tracks_whole(make, tmp_path):
    source = make.write_folder(tmp_path, make.gtsrb_files("kaggle", train_tracks=5))
    whole, split = data.load("gtsrb", source), data.load("gtsrb", source, heldout=0.4)
    # 2 of the 5 tracks of each class, 3 frames each
    assert np.bincount(split.heldout_labels, minlength=8)[[0, 7]].tolist() == [6, 6]
    assert np.bincount(split.train_tracks)[np.unique(split.train_tracks)].tolist() == [3] * 6
    held = {image.tobytes() for image in split.heldout_images}
    tracks = {
        t
        for t, i in zip(whole.train_tracks, whole.train_images, strict=True)
        if i.tobytes() in held
    }
    assert len(tracks) == 4 and not tracks & set(split.train_tracks.tolist())
    assert len(split.train_boxes) == 18 and len(split.heldout_boxes) == 12
    one = make.write_folder(tmp_path / "one", make.gtsrb_files("kaggle", train_tracks=1))
    with pytest.raises(PmoeError, match="class 0 has a single track"):
        data.load("gtsrb", one, heldout=0.1)


def test_describe():
    images = np.zeros((4, 2, 2, 3), np.uint8)
    images[2:, ..., 0] = 255  # red: half 0, half 1, so mean 1/2, deviation 1/2
    images[..., 1] = 51
    pair = (images, np.array([0, 0, 0, 2]))
    figures = data.describe(dataset.make("npz", pair, (images[:2], np.array([1, 1]))))
    assert figures["name"] == "npz" and list(figures["splits"]) == ["train", "test"]
    train = figures["splits"]["train"]
    assert train["images"] == 4 and train["per_class"] == [3, 0, 1]
    np.testing.assert_allclose(train["mean"], [0.5, 0.2, 0], atol=1e-12)
    np.testing.assert_allclose(train["std"], [0.5, 0, 0], atol=1e-12)
    assert figures["splits"]["test"]["per_class"] == [0, 2, 0]


def test_real_samples_of_both_layouts_agree(shared):
    official = data.load("gtsrb", shared / "gtsrb/sample/official")
    kaggle = data.load("gtsrb", shared / "gtsrb/sample/kaggle")
    assert len(official.train_images) == 129 and len(official.test_images) == 100
    assert official.fingerprint() == kaggle.fingerprint()
    np.testing.assert_array_equal(official.train_boxes, kaggle.train_boxes)
    assert "39209" in official.notes[0] and "12630" in official.notes[1]


def test_real_test_images_equal_the_resized_set(shared):
    """Image by image: the sample's files, resized by us, and those of the set of the same name."""
    sample, _ = gtsrb.read(str(shared / "gtsrb/sample/official"), 2**30)[1:]
    recipe = records.Recipe(32)
    with np.load(shared / "gtsrb/gtsrb32.npz") as resized:  # members are read when asked for
        names = [name.decode() for name in resized["test_names"]]
        labels, images = resized["test_labels"], resized["test_images"]
    assert len(sample) == 100
    for record in sample:
        row = names.index(record.name)
        assert labels[row] == record.label
        np.testing.assert_array_equal(recipe(record), images[row])


@pytest.mark.slow  # unpacks 100 MB
def test_the_full_sets(shared):
    gtsrb = data.load("gtsrb", shared / "gtsrb/gtsrb32.npz")
    assert gtsrb.notes == () and len(np.unique(gtsrb.train_tracks)) == 1307
    sample = data.load("gtsrb", shared / "gtsrb/sample/kaggle")
    for split in ("train", "test"):
        whole = {image.tobytes() for image in getattr(gtsrb, f"{split}_images")}
        assert all(image.tobytes() in whole for image in getattr(sample, f"{split}_images"))
    mean = data.describe(gtsrb)["splits"]["test"]["mean"]
    np.testing.assert_allclose(mean, (0.3374, 0.3096, 0.3208), atol=5e-5)
    held = data.load("gtsrb", shared / "gtsrb/gtsrb32.npz", heldout=0.1)
    assert set(np.bincount(held.train_tracks)) <= {0, 29, 30}


def test_known_counts():
    # Totals as published; every training track but one has 30 frames.
    assert sum(gtsrb.TRAIN_COUNTS) == 39209 and sum(gtsrb.TEST_COUNTS) == 12630
    assert [count for count in gtsrb.TRAIN_COUNTS if count % 30] == [689]
    train = np.repeat(np.arange(43), gtsrb.TRAIN_COUNTS)
    test = np.repeat(np.arange(43), gtsrb.TEST_COUNTS)
    assert dataset.count_notes("gtsrb", gtsrb.OFFICIAL_COUNTS, train, test) == []
    (note,) = dataset.count_notes("gtsrb", gtsrb.OFFICIAL_COUNTS, train, test[:-1])
    assert "12629" in note and "class 42 with 89 instead of 90" in note
    train, test = np.arange(50000) % 10, np.arange(10000) % 10
    assert dataset.count_notes("cifar10", cifar10.OFFICIAL_COUNTS, train, test) == []
    (note,) = dataset.count_notes("cifar10", cifar10.OFFICIAL_COUNTS, train[1:], test)
    assert "cifar10" in note and "1 classes differ" in note and "4999 instead of 5000" in note
