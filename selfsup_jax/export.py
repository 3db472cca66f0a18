"""Exports the encoder of a run to a small folder, for use in other projects.

    python -m selfsup_jax.export CHECKPOINT FOLDER [--to=npz] [--measure=IMAGES]

CHECKPOINT is a run's workdir (its newest checkpoint), one of its checkpoints, or an exported or
imported encoder. The command writes to FOLDER a model card, `preprocessing.json` and

- `npz`: `encoder.json` (architecture, normalisation, origin) and `encoder.npz` (arrays), which
  `selfsup_jax.Encoder.load` and the jobs' `config.checkpoint` read;
- `safetensors`: the same arrays in one file;
- `torchvision`: `model.pth`, torchvision's names;
- `timm`: `model.safetensors` and `config.json`, as a model of the Hugging Face hub, also of ViTs;
- `detectron2`: `model.pth` for `MODEL.WEIGHTS`, see `docs/detection.md`;
- `onnx`: `model.onnx`, opset 17, any batch and image size (needs the package onnx).

PyTorch's convolutions pad symmetrically. An encoder that was trained with other padding is refused
there, unless --measure names a folder of images on which the difference is then measured.
"""

from __future__ import annotations

import os

from selfsup_jax import paths
from selfsup_jax.command_line import Parser
from selfsup_jax.errors import UserError
from selfsup_jax.evaluation import encoder
from selfsup_jax.interop import exporting, measuring
from selfsup_jax.models import encoders
from selfsup_jax.run.files import read_json


def main() -> None:
    """Runs the command in this file's docstring."""
    parser = Parser(description="Writes a run's encoder as a small folder.")
    parser.add_argument("checkpoint")
    parser.add_argument("folder")
    parser.add_argument("--to", choices=exporting.TARGETS, default="npz", help="(%(default)s)")
    parser.add_argument("--measure", metavar="IMAGES", help="a folder of images, see above")
    args = parser.parse_args()
    try:
        frozen = encoder.load(args.checkpoint)
        exporting.check(frozen.config, args.to, measured=bool(args.measure))
        measured = ""
        fields = frozen.config["encoder"]
        if args.measure and not encoders.is_vit(fields) and fields["padding"] != "torch":
            measured = measuring.padding(frozen, args.measure)
            print(measured)
        results = os.path.join(frozen.run or "", "results.json")
        known = read_json(results) if frozen.run and paths.exists(results) else {}
        known = known if known.get("steps") == frozen.step else {}  # of another checkpoint
        exporting.export(frozen, args.folder, args.to, known, measured)
    except UserError as e:
        parser.error(str(e))
    print(f"wrote {args.folder}: the encoder of {frozen.path}")


if __name__ == "__main__":
    main()
