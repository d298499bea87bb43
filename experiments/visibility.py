"""How visible the triggers are: PSNR and SSIM against the clean image, on whole test sets.

    python experiments/visibility.py --data=cifar10 --data=gtsrb --data_dir=~/tensorflow_datasets \
      --pattern=hello_kitty.jpg --seeds=3 --output=visibility.csv

The triggers are those of the paper (`pmoe_jax.paper.setting`), drawn for the seeds. One line
for each data set, trigger and seed:

- psnr: of the mean squared error over the whole set, in dB; the largest pixel value is 1.
- psnr_image: mean over images of each one's own PSNR; those that did not change are left out.
- ssim: mean over images; Gaussian window of sigma 1.5 (Wang et al. 2004), mean over channels and
  all positions: the library's own mean drops a border of 5 pixels, which would hide the square.
- changed: share of pixels that differ by more than half a step of 1/255, in percent.
- change: mean over these pixels of the largest difference of a channel, from 0 to 1.
"""

from __future__ import annotations

import argparse
import csv
import io
import pathlib
import sys

import jax
import numpy as np
from skimage.metrics import structural_similarity
from tqdm import tqdm

from pmoe_jax import data, grid, members, triggers
from pmoe_jax.data.dataset import Dataset
from pmoe_jax.errors import PmoeError
from pmoe_jax.files import write_atomically
from pmoe_jax.inputs import load_patterns
from pmoe_jax.paper import setting

BATCH = 500


def measure(images: np.ndarray, trigger: triggers.Trigger, title: str = "") -> dict[str, float]:
    """The figures of one trigger.

    Args:
      images: uint8 [N, H, W, 3].
      trigger: as `triggers.apply` takes it.
      title: of the progress bar.
    """
    apply = jax.jit(triggers.apply)
    errors, similar, changed, change = [], [], 0.0, 0.0
    for start in tqdm(range(0, len(images), BATCH), desc=title, leave=False):
        clean = images[start : start + BATCH].astype(np.float32) / 255
        shown = np.asarray(apply(clean, trigger))
        errors.append(((shown - clean) ** 2).mean(axis=(1, 2, 3)))
        moved = np.abs(shown - clean).max(-1)
        changed += float((moved > 0.5 / 255).sum())
        change += float(moved[moved > 0.5 / 255].sum())
        similar += [
            structural_similarity(
                one, other, channel_axis=-1, data_range=1.0, gaussian_weights=True, sigma=1.5,
                use_sample_covariance=False, full=True,
            )[1].mean()
            for one, other in zip(clean, shown, strict=True)
        ]  # fmt: skip
    error = np.concatenate(errors)
    own = -10 * np.log10(error[error > 0])
    pixels = len(images) * images.shape[1] * images.shape[2]
    return {
        "psnr": float(-10 * np.log10(error.mean())) if error.any() else float("inf"),
        "psnr_image": float(own.mean()) if len(own) else float("inf"),
        "ssim": float(np.mean(similar)),
        "changed": 100 * changed / pixels,
        "change": change / changed if changed else 0.0,
    }


def of_dataset(dataset: Dataset, pattern: str, seeds: int) -> list[dict[str, object]]:
    """The lines of one data set."""
    lines = []
    for name, fields in setting.TRIGGERS.items():
        blended = {"trigger.pattern_path": pattern} if pattern else {}
        config = grid.with_fields(setting.config(), {"num_seeds": seeds, **blended, **fields})
        before: triggers.Trigger | None = None
        for member in members.from_config(config):
            patterns = load_patterns([member], dataset.image_shape)
            trigger = members.make_trigger(member, dataset.image_shape, patterns)
            same = before is not None and jax.tree.all(
                jax.tree.map(lambda one, other: bool((one == other).all()), before, trigger)
            )
            if not same:  # Squares, and blends of a picture, are those of the seed before.
                figures = measure(dataset.test_images, trigger, f"{dataset.name}, {name}")
            before = trigger
            known = {"dataset": dataset.name, "trigger": name, "seed": member.seed}
            lines.append({**known, "images": len(dataset.test_images), **figures})
    return lines


def main(words: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", action="append", required=True, help="NAME or NAME=SOURCE")
    parser.add_argument("--data_dir", help="where prepared data sets lie")
    parser.add_argument("--pattern", default="", help="image of the blend trigger")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", required=True, help="CSV file")
    options = parser.parse_args(words)
    if options.seeds < 1:
        parser.error(f"--seeds={options.seeds} must be at least 1")
    lines: list[dict[str, object]] = []
    text = io.StringIO()
    try:
        for word in options.data:
            name, _, source = word.partition("=")
            dataset = data.load(name, source or None, data_dir=options.data_dir)
            lines += of_dataset(dataset, options.pattern, options.seeds)
        writer = csv.DictWriter(text, lines[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: round(v, 5) if isinstance(v, float) else v for k, v in line.items()}
            for line in lines
        )
        print(text.getvalue(), end="")  # First: the disk may refuse what took minutes.
        write_atomically(pathlib.Path(options.output), text.getvalue())
    except PmoeError as error:
        print(f"visibility.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
