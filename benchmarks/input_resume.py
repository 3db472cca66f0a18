"""Measures how soon a run in the middle of ImageNet's 1.28 million images has its next batch.

python -m benchmarks.input_resume --folder=FOLDER --json=resume.json

It writes as many tiny images, once, into FOLDER: in 1,024 TFRecord files as TFDS does, and with
`--files` as a folder of 1,000 classes too. Then it starts as a run does: a process of its own, with
and without the records' index of an earlier start.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
from PIL import Image

from benchmarks import report

IMAGES, FILES, CLASSES = 1_281_167, 1024, 1000
STEP, BATCH = 123_456, 4096  # in the 396th epoch


def png() -> bytes:
    """An image of 8 x 8 pixels."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (90, 80, 70)).save(stream, "png")
    return stream.getvalue()


def write_records(folder: str, image: bytes) -> None:
    """The data set `million`, as TFDS writes it."""
    import tensorflow_datasets as tfds

    class Million(tfds.core.GeneratorBasedBuilder):
        """Tiny images."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            names = [f"class_{i}" for i in range(CLASSES)]
            features = {"image": tfds.features.Image(shape=(None, None, 3))}
            features["label"] = tfds.features.ClassLabel(names=names)
            features["file_name"] = tfds.features.Text()
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": None}

        def _generate_examples(self):
            return

    builder = Million(data_dir=folder)
    info = builder.info
    where = pathlib.Path(builder.data_dir)
    where.mkdir(parents=True)
    counts = [len(part) for part in np.array_split(np.arange(IMAGES), FILES)]
    start = total = 0
    for shard, count in enumerate(counts):
        records = bytearray()
        for number in range(start, start + count):
            example = {"image": io.BytesIO(image), "label": number % CLASSES}
            example["file_name"] = f"{number}.png"
            record = info.features.serialize_example(info.features.encode_example(example))
            # Nothing looks at the checksums.
            records += len(record).to_bytes(8, "little") + bytes(4) + record + bytes(4)
        (where / f"million-train.tfrecord-{shard:05}-of-{FILES:05}").write_bytes(records)
        start, total = start + count, total + len(records)
    split = tfds.core.SplitInfo(
        name="train",
        shard_lengths=counts,
        num_bytes=total,
        filename_template=tfds.core.ShardedFileTemplate(
            data_dir=where, dataset_name="million", split="train", filetype_suffix="tfrecord"
        ),
    )
    info.set_splits(tfds.core.SplitDict([split]))
    info.write_to_directory(where)


def write_files(folder: str, image: bytes) -> None:
    """A folder with 1,000 sub-folders."""
    for label in range(CLASSES):
        os.makedirs(f"{folder}/class_{label:03}")
    for number in range(IMAGES):
        pathlib.Path(f"{folder}/class_{number % CLASSES:03}/{number}.png").write_bytes(image)


PROGRAM = """
import json, sys, time
start = time.perf_counter()
from configs import byol
from selfsup_jax.data import inputs
config = byol.get_config()
config.update_from_flattened_dict(json.loads(sys.argv[1]))
imported = time.perf_counter()
data = inputs.load_data(config)
loaded = time.perf_counter()
batch = next(inputs.train_batches(config, data, first_step=int(sys.argv[2])))
end = time.perf_counter()
print(json.dumps({"imported": imported - start, "loaded": loaded - imported, "first": end - loaded,
                  "images": data.train.num_examples, "names": batch["name"][:4].tolist()}))
"""


def started(fields: dict, cache: str) -> dict:
    """What a process that goes on at `STEP` reports."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(fields), str(STEP)],
        env=os.environ | {"XDG_CACHE_HOME": cache, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    wall = time.perf_counter() - begin
    return json.loads(done.stdout.splitlines()[-1]) | {"wall": wall}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", required=True, help="where the images are written")
    parser.add_argument("--files", action="store_true", help="also from a folder of images")
    parser.add_argument("--json", default="", help="where to write the same as flat JSON")
    args = parser.parse_args()
    shared = {"data.image_size": 8, "data.test_resize": 8, "batch_size": BATCH}
    shared |= {"data.placement": "host", "eval.enabled": False, "data.train_split": "train"}
    shared["data.test_split"] = "train"
    rows: list[report.Row] = []
    kinds = {"records": ("million", write_records)} | (
        {"files": ("folder", write_files)} if args.files else {}
    )
    for kind, (name, write) in kinds.items():
        folder, cache = f"{args.folder}/{kind}", f"{args.folder}/cache"
        if not os.path.exists(folder):
            write(folder, png())
        fields = shared | {"data.name": name, "data.dir": folder, "data.cache_gib": 0.0}
        for start in ("first start", "later start") if kind == "records" else ("start",):
            if start == "first start" and os.path.isdir(f"{cache}/selfsup_jax"):
                for path in pathlib.Path(f"{cache}/selfsup_jax").glob("records_*.npy"):
                    path.unlink()
            found = started(fields, cache)
            assert found["images"] == IMAGES
            for part, label in (
                ("wall", "in all"),
                ("imported", "Python's imports"),
                ("loaded", "the split found"),
                ("first", "then the first batch"),
            ):
                rows.append((f"{kind}, {start}: {label}", found[part], "s"))
    report.show(f"a run that goes on at step {STEP} of {IMAGES:,} images", rows, args.json)


if __name__ == "__main__":
    main()
