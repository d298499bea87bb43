"""TFDS builder of GTSRB, for `tfds build` (TFDS's own decathlon version has no test labels).

    tfds build pmoe_jax/data/gtsrb_builder.py --manual_dir=FOLDER --file_format=array_record

FOLDER has the official release or the Kaggle layout, unpacked or zipped, as for
`pmoe data prepare gtsrb`, which writes the same data set and needs no TensorFlow. The command
`tfds` itself imports tensorflow, apache-beam and mlcroissant, which TFDS does not install.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from pmoe_jax.data import MAX_BYTES, gtsrb, prepared


class Gtsrb(tfds.core.GeneratorBasedBuilder):
    """German Traffic Sign Recognition Benchmark, with sign boxes and tracks."""

    VERSION = tfds.core.Version(prepared.VERSIONS["gtsrb"])
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Put GTSRB_Final_Training_Images.zip, GTSRB_Final_Test_Images.zip and "
        "GTSRB_Final_Test_GT.zip (or the Kaggle layout) into manual_dir."
    )

    def _info(self) -> Any:
        return self.dataset_info_from_configs(
            features=prepared.features("gtsrb"),
            supervised_keys=("image", "label"),
            description=self.__doc__,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        train, test, _ = gtsrb.read(str(dl_manager.manual_dir), MAX_BYTES)
        return {"train": self._generate_examples(train), "test": self._generate_examples(test)}

    def _generate_examples(self, records: list[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        for record in records:
            yield record.name, prepared.example("gtsrb", record, MAX_BYTES)
