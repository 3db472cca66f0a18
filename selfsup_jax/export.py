"""Exports the encoder of a run to a small folder, for use in other projects.

    python -m selfsup_jax.export CHECKPOINT FOLDER

CHECKPOINT is a run's workdir (its newest checkpoint) or one of its checkpoints. The
command writes `encoder.json` (architecture, normalisation, origin) and `encoder.npz` (arrays) to
FOLDER. `selfsup_jax.evaluation.encoder.load` and the evaluation jobs' `config.checkpoint` read it.
"""

from __future__ import annotations

import sys

from selfsup_jax.command_line import Parser
from selfsup_jax.errors import UserError
from selfsup_jax.evaluation import encoder


def main() -> None:
    """Runs the command in this file's docstring."""
    parser = Parser(description="Writes a run's encoder as a small folder.")
    parser.add_argument("checkpoint")
    parser.add_argument("folder")
    args = parser.parse_args()
    try:
        frozen = encoder.load(args.checkpoint)
        encoder.export(frozen, args.folder)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {args.folder}: the encoder of {frozen.path}")


if __name__ == "__main__":
    main()
