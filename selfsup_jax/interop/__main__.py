"""Imports a checkpoint of another project.

    python -m selfsup_jax.interop import SOURCE --out=DIR

SOURCE is a file of torchvision, timm, MoCo (v1, v2, v3) or DINO (ResNets and plain ViTs; `.pth`,
`.pth.tar`, `.safetensors`), of BYOL's authors (`.pkl`) or of SimCLR's (a TensorFlow checkpoint).
Nothing in it is run. DIR is then a checkpoint like a run's: every evaluation job takes it as
`config.checkpoint`, pretraining as `config.init_from`. How its images are prepared is recorded in
it.
"""

from __future__ import annotations

import sys

from selfsup_jax.command_line import Parser, returns_status
from selfsup_jax.data.views import RESIZE_METHODS


@returns_status
def main() -> None:
    """Runs the command in this file's docstring."""
    parser = Parser(prog="python -m selfsup_jax.interop", description="Imports a checkpoint.")
    commands = parser.add_subparsers(dest="command", required=True)
    options = commands.add_parser("import", description="Reads another project's checkpoint.")
    options.add_argument("source")
    options.add_argument("--out", required=True, metavar="DIR", help="the checkpoint to write")
    options.add_argument("--prefix", help="of the encoder's names, where there are several")
    options.add_argument("--image_size", type=int, help="of the test images, in pixels")
    options.add_argument("--resize", type=int, help="their shorter side before the centre crop")
    options.add_argument("--resize_method", choices=RESIZE_METHODS)
    for name in ("mean", "std"):
        options.add_argument(f"--{name}", type=float, nargs=3, help="of the normalisation")
    args = parser.parse_args()
    if not args.out:
        parser.error("--out: must name a folder")
    images = {k: getattr(args, k) for k in ("mean", "std", "image_size", "resize_method")}
    from selfsup_jax.interop import importing

    frozen, weights = importing.read(args.source, args.prefix, test_resize=args.resize, **images)
    importing.save(frozen, weights, args.out)
    print("\n".join(importing.described(frozen, weights)))
    print(f"wrote {args.out}: use it as --config.checkpoint, or --config.init_from")


if __name__ == "__main__":
    sys.exit(main())
