"""Does a dark corner hide the square? ASR by how dark its pixels were before, and by capture.

    pmoe analyze --checkpoint=RUN --clean=CLEAN_RUN --output=out/routing.npz --nocauses
    python experiments/darkness.py --routing=out/routing.npz --data=cifar10 --output=darkness.csv

The paper (Section 5.1) gives two reasons why squares fail at 0.1 %: dark corners hide them, or no
expert takes their patch. Test images of other classes than the target are cut into tenths by the
mean luminance (ITU-R 601, 0 to 1) of the pixels that the square covers. For every seed and tenth:

- asr: share answered with the target when triggered; false_trigger_rate: the same by a clean model.
- accuracy: share of the images as they are that is classified rightly.
- captured: share in which at least one expert takes a patch that the square touches nominally.
- asr_captured, asr_not_captured: ASR among these, and among the others.

All in percent; empty where there is no such image. A figure of asr and captured is drawn beside it.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import pathlib
import sys
import zipfile

import matplotlib.pyplot as plt
import numpy as np

from pmoe_jax import config as config_lib
from pmoe_jax import data, figures
from pmoe_jax.errors import PmoeError
from pmoe_jax.files import write_atomically

TENTHS = 10


def table(stored: dict[str, np.ndarray], images: np.ndarray) -> list[dict[str, object]]:
    """Lines of the CSV.

    Args:
      stored: arrays of `pmoe analyze`.
      images: uint8 [N, H, W, 3], the test set.

    Raises:
      PmoeError: arrays without a trigger, of another test set, or of diverged members alone.
    """
    if "trigger_pixels" not in stored:
        raise PmoeError(
            "no trigger was analysed; give what 'pmoe analyze' wrote of an attacked run"
        )
    if "target" not in stored:
        raise PmoeError("an earlier version wrote these arrays; run 'pmoe analyze' again")
    if len(images) != len(stored["label"]):
        raise PmoeError(f"{len(images)} test images, but {len(stored['label'])} analysed ones")
    luminance = (images / 255) @ [0.299, 0.587, 0.114]
    lines: list[dict[str, object]] = []
    for m, seed in enumerate(stored["seed"]):
        if stored["diverged"][m]:
            continue
        target = stored["target"][m]
        others = stored["label"] != target
        dark = luminance[:, stored["trigger_pixels"][m]].mean(-1)
        # Ranks, so that the many equal (black) corners are shared out evenly.
        order = np.argsort(dark[others], kind="stable")
        tenth = np.empty(len(order), int)
        tenth[order] = np.arange(len(order)) * TENTHS // len(order)
        clean, triggered = (stored["predicted"][d, m] for d in (0, 1))
        touched = stored["nominal_patches"][m][stored["indices"][1, m].astype(int)]
        captured = touched.any((1, 2))
        other = stored.get("clean_model_predicted")
        # What is equal in both is not stored twice.
        if stored.get("clean_model_diverged", stored["diverged"])[m]:
            other = None
        for part in range(TENTHS):
            chosen = np.flatnonzero(others)[tenth == part]
            hit, taken = triggered[chosen] == target, captured[chosen]
            false = other[1, m][chosen] == target if other is not None else np.empty(0)
            lines.append({
                "seed": int(seed), "tenth": part + 1, "images": len(chosen),
                "luminance": round(float(dark[chosen].mean()), 4),
                "asr": _percent(hit), "false_trigger_rate": _percent(false),
                "accuracy": _percent(clean[chosen] == stored["label"][chosen]),
                "captured": _percent(taken),
                "asr_captured": _percent(hit[taken]), "asr_not_captured": _percent(hit[~taken]),
            })  # fmt: skip
    if not lines:
        raise PmoeError("training of all analysed members diverged; there is nothing to tabulate")
    return lines


def _percent(hits: np.ndarray) -> float | str:
    return round(100 * float(hits.mean()), 2) if len(hits) else ""


def draw(lines: list[dict[str, object]], path: pathlib.Path) -> None:
    """ASR and capture against luminance, a line a seed."""
    figure, axes = plt.subplots(figsize=(3.4, 2.4), layout="constrained")
    for seed in sorted({line["seed"] for line in lines}):
        own = [line for line in lines if line["seed"] == seed]
        x = [line["luminance"] for line in own]
        for name, colour, marker in (("asr", "#0072B2", "o"), ("captured", "#D55E00", "s")):
            label = {"asr": "ASR", "captured": "an expert takes the patch"}[name]
            axes.plot(x, [line[name] for line in own], color=colour, marker=marker, markersize=3,
                      linewidth=0.8, label=label if seed == lines[0]["seed"] else None)  # fmt: skip
    axes.set_xlabel("luminance of the corner (tenths of the test set)", fontsize=7)
    axes.set_ylabel("share of images [%]", fontsize=7)
    axes.set_ylim(0, 102)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=6, frameon=False)
    figures.save_as(figure, path, dpi=200)


def read(path: str) -> dict[str, np.ndarray]:
    """The arrays of a routing.npz.

    Raises:
      PmoeError: it is none.
    """
    try:
        with np.load(path) as archive:
            return {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise PmoeError(
            f"--routing={path} cannot be read ({error}); give that of pmoe analyze"
        ) from None


def check_data(path: pathlib.Path, dataset: data.Dataset) -> None:
    """Refuses other images than were analysed, by what stands beside a routing.npz.

    Raises:
      PmoeError: other images, or nothing that says which they were.
    """
    try:
        known = json.loads(config_lib.read_text(path))["made_from"]["data"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise PmoeError(
            f"{path}, which says what was analysed, cannot be read ({error!r}); it belongs beside "
            "the arrays: run 'pmoe analyze' again"
        ) from None
    if known != dataset.fingerprint():
        raise PmoeError(
            f"these are not the images that {path} is of; give --data=NAME=SOURCE, --crop_roi and "
            "--resize_filter as the run has them"
        )


def main(words: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--routing", required=True, help="routing.npz of pmoe analyze")
    parser.add_argument("--data", required=True, help="NAME or NAME=SOURCE of its data set")
    parser.add_argument("--data_dir", help="where prepared data sets lie")
    parser.add_argument("--crop_roi", action="store_true", help="if the run has data.crop_roi")
    parser.add_argument("--resize_filter", default="bilinear", help="the run's data.resize_filter")
    parser.add_argument("--output", required=True, help="CSV file")
    options = parser.parse_args(words)
    name, _, source = options.data.partition("=")
    try:
        stored = read(options.routing)
        size = stored["trigger_pixels"].shape[-1] if "trigger_pixels" in stored else 32
        dataset = data.load(
            name, source or None, data_dir=options.data_dir, image_size=size,
            crop_roi=options.crop_roi, resize_filter=options.resize_filter,
        )  # fmt: skip
        check_data(pathlib.Path(options.routing).with_suffix(".json"), dataset)
        lines = table(stored, dataset.test_images)
        text = io.StringIO()
        writer = csv.DictWriter(text, lines[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        print(text.getvalue(), end="")  # First: the disk may refuse.
        write_atomically(pathlib.Path(options.output), text.getvalue())
        draw(lines, pathlib.Path(options.output).with_suffix(".png"))
    except PmoeError as error:
        print(f"darkness.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
