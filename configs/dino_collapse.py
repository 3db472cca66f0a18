"""How DINO collapses without centring, and without sharpening: the paper's section 5.3.

    python run_experiment.py --config=configs/dino_collapse.py --workdir=DIR

Three runs of `configs/dino.py:demo` with fewer epochs: as it is; without centring (the centre stays
0): one prototype gets all images; without sharpening (the teacher has the student's temperature):
the teacher's output becomes uniform. docs/dino.md has our results and the paper's.

Any field after the comma is set in each variant. Finished runs are not repeated.
"""

from __future__ import annotations

import copy

from ml_collections import ConfigDict

from configs import common, dino, parsing


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of `preset,field=value,...`."""
    return parsing.parse(arg, demo)


def demo() -> ConfigDict:
    """Embedded digits, 6 epochs per run."""
    base = dino.get_config("demo")
    base.epochs = 6.0
    base.eval.random_init = base.eval.pixels = False
    base.monitor.update(knn_every_steps=0, plots_every_steps=0)
    variants = {
        name: copy.deepcopy(base)
        for name in ("centring_and_sharpening", "no_centring", "no_sharpening")
    }
    variants["no_centring"].centre_momentum = 1.0
    variants["no_sharpening"].teacher_temperature = base.student_temperature
    variants["no_sharpening"].teacher_warmup_epochs = 0.0
    sweep = common.sweep("Centring and sharpening on the embedded digits", variants, seeds=(0,))
    sweep.columns = ("centre_momentum", "teacher_temperature")
    sweep.metrics = (
        *("linear_probe_top1", "knn_top1", "teacher_entropy", "teacher_uniform_kl"),
        "effective_rank",
    )
    return sweep
