"""What a run says at its end, and when it is started again after it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from selfsup_jax import paths
from selfsup_jax.errors import UserError
from selfsup_jax.evaluation import closing
from selfsup_jax.run import checkpoint, checkpoint_files, identity, workdir
from selfsup_jax.run.files import read_json
from selfsup_jax.run.progress import log
from selfsup_jax.viz import verdict


def tell(
    results: Mapping[str, Any], history: verdict.History, directory: str, config: ConfigDict
) -> None:
    """Logs the probes if there are any, whether the run learned, and what to do next."""
    if "knn_top1" in results:
        log(f"top-1 on held-out images, encoder of step {results['steps']}:")
        log(closing.summary(dict(results)))
    log(f"the run {verdict.course(history, results)}")
    name = shlex.quote(directory)
    if paths.glob(directory, "plots/*.png"):
        log(f"pictures: {os.path.join(directory, 'plots')}")
    if "knn_top1" not in results:
        what = "to write the images' features to a file"
        log(f"{what}: {_job('embed', name)}")
        if config.data.name != "folder" or not config.eval.enabled:
            log(f"to measure the encoder with labels: {_job('linear_probe', name)}")
    else:
        log(f"to measure more carefully: {_job('linear_probe', name)}")
    report = "selfsup report" if _installed() else "python -m selfsup_jax.report"
    log(f"a page on it: {report} {name}")


def _installed() -> bool:
    """Whether the command is that of the package: there may be no clone."""
    return os.path.basename(sys.argv[0]) == "selfsup"


def _job(job: str, run: str) -> str:
    workdir_ = f"--workdir={run}_{job}" if not run.endswith("'") else "--workdir=DIR"
    program = "selfsup" if _installed() else "python run_experiment.py"
    return f"{program} --config=configs/{job}.py --config.checkpoint={run} {workdir_}"


def results_of_finished(
    run: Mapping[str, Any], directory: str, total_steps: int
) -> dict[str, Any] | None:
    """The results of a run that has ended with this config; None if anything is left to do.

    Args:
        run: see `workdir.describe_run`.
        directory: its workdir.
        total_steps: of the run.
    """
    config, results = (os.path.join(directory, f"{name}.json") for name in ("config", "results"))
    try:
        # A process that does anything in a workdir first writes its config there.
        if paths.getmtime(results) < paths.getmtime(config):
            return None
        values, before = read_json(results), identity.flat(read_json(config))
    except (OSError, UserError):
        return None
    if not values.get("steps") == checkpoint.newest_step(directory) == total_steps:
        return None
    now = identity.flat(workdir.config_json(dict(run)))
    free = (*identity.SAME_RESULTS, "data_info.init_from.*")
    # If a field differs that must not, resuming reports it.
    resumable = not identity.differences(now, before, identity.steps_free(now, before))
    if not resumable or identity.differences(now, before, free):
        return None
    try:  # a damaged one is made again
        checkpoint_files.read(os.path.join(directory, "checkpoints", str(total_steps)))
    except (OSError, UserError):
        return None
    return values


def tell_finished(results: Mapping[str, Any], directory: str, config: ConfigDict) -> None:
    """Logs that nothing is left to do, where the results are, and how to go on."""
    log(f"{directory}: this run is done, all {results['steps']:,} steps of it")
    if "knn_top1" in results:
        log(closing.summary(dict(results)))
    log(f"results: {os.path.join(directory, 'results.json')}; remove it to measure again")
    if paths.glob(directory, "plots/*.png"):
        log(f"pictures: {os.path.join(directory, 'plots')}")
    fields = identity.flat(config)
    if set(identity.LENGTHS) <= set(identity.steps_free(fields, fields)):
        log("to train it longer: the same command with more --config.epochs= or --config.steps=")
    else:
        log(
            "to train longer: its learning rate is over, so begin another run with its weights, "
            f"--config.init_from={shlex.quote(directory)} --workdir=ANOTHER"
        )
