"""The only entry point: `python run_experiment.py --config=configs/byol.py --workdir=DIR`.

Exit status:
    0    the job is finished;
    2    a problem that the user can correct, reported in one line: flags, config, data, workdir, a
         full disk, a loss that is not finite, hosts that differ or are missing at the start. Saved
         files stay;
    75   another host of the job has died or does not answer, reported in one line: a scheduler
         should run the same command again on all hosts, which resumes from the last checkpoint;
    130  Ctrl-C, 143  SIGTERM: stopped after a step and saved a checkpoint; the same command resumes
         from it. Before the first step and during the final evaluation there is nothing to save:
         SIGTERM then ends the process at once;
    any other status is a bug and shows a traceback.

If one of several hosts ends with an error or a signal, the others end with its status and line.
"""

from __future__ import annotations

import glob
import math
import os
import runpy
import signal
import sys
import traceback
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from configs import parsing
from selfsup_jax.errors import Stopped, UserError

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    help_string="configs/METHOD.py, or configs/METHOD.py:preset,field=value",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string("workdir", None, "where everything of this run is written")
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0, where the environment doesn't tell"
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "how many hosts take part")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "which of them this is, from 0")
_START_TIMEOUT = flags.DEFINE_float(
    "start_timeout", 300.0, "seconds within which all hosts must have started"
)
_HOST_TIMEOUT = flags.DEFINE_float(
    "host_timeout", 60.0, "seconds without a sign of life after which a host counts as lost"
)
_CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices", 0, "without an accelerator: devices to make of the CPU; 0 chooses one or two"
)
_PARALLEL = flags.DEFINE_string(
    "parallel", "pmap", "what maps a training step over the devices: pmap, or shard_map"
)
_CACHE = flags.DEFINE_string(
    "compilation_cache",
    os.path.join("~", ".cache", "selfsup_jax", "compiled"),
    "where compiled programs are kept from run to run; empty for nowhere",
)
_PLAN = flags.DEFINE_string(
    "plan",
    None,
    "train nothing: what a run needs on such as v5e:4x4, v5e:8x8:batch, gpu:h100x8",
)
_PLAN_IMAGES = flags.DEFINE_integer("plan_images", None, "training images, for --plan's hours")
_PLAN_PRICE = flags.DEFINE_float("plan_price", None, "of a chip for an hour, for --plan's cost")


def run_job(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Runs the job `config.job`."""
    from selfsup_jax import jobs
    from selfsup_jax.training import pretrain, sweep

    all_jobs = dict.fromkeys(jobs.NAMES, jobs.run)
    all_jobs |= {"pretrain": pretrain.pretrain, "sweep": sweep.run}
    if config.job not in all_jobs:
        raise UserError(f"config.job={config.job!r}: must be one of {', '.join(sorted(all_jobs))}")
    return all_jobs[config.job](config, workdir)


def main(argv: list[str]) -> None:
    """Starts JAX, then the job."""
    del argv
    if not flags.FLAGS["verbosity"].present:
        # The default of absl's app.run is INFO: long logs of the libraries.
        logging.set_verbosity(logging.WARNING)
    try:
        if _CONFIG.value is None or not _WORKDIR.value:
            raise UserError(
                "--config and --workdir are needed, such as "
                "--config=configs/byol.py:demo --workdir=runs/demo"
            )
        if not isinstance(_CONFIG.value, ConfigDict):
            raise UserError(_unreadable(flags.FLAGS["config"].config_filename))
        if _PLAN.value:
            return _plan(_CONFIG.value, _WORKDIR.value)
        from selfsup_jax.devices import hosts, parallel, process

        process.start(
            *(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value),
            *(_START_TIMEOUT.value, _HOST_TIMEOUT.value),
        )
        if hosts.several():
            from selfsup_jax.run import same_job

            facts = same_job.facts(_CONFIG.value, parallel=_PARALLEL.value)
            hosts.check_same("the config", facts)
        process.use_cpu_devices(_CPU_DEVICES.value, *_cut_of_the_batch(_CONFIG.value))
        process.keep_freed_memory()
        process.keep_compiled(_CACHE.value)
        parallel.use_engine(_PARALLEL.value)
        if hosts.several():
            hosts.check_same("the devices", process.local_devices())
        run_job(_CONFIG.value, _WORKDIR.value)
    except UserError as e:
        _tell_other_hosts(2, str(e), e)
        _fail(e)
    except Stopped as e:
        print(e, file=sys.stderr, flush=True)
        _finish()
        _exit(e.status)
    except KeyboardInterrupt:
        line, status = "stopped; nothing that was saved is lost", 128 + signal.SIGINT
        _tell_other_hosts(status, line)
        print(line, file=sys.stderr, flush=True)
        _exit(status)
    except Exception as e:
        _tell_other_hosts(1, f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}", e)
        if not _several_hosts():
            raise
        traceback.print_exc()
        _exit(1)
    _finish()
    if _several_hosts():
        _exit(0)


def _tell_other_hosts(status: int, line: str, error: Exception | None = None) -> None:
    """Ends the other hosts of the job, if there are any, with this status and line."""
    if "selfsup_jax.devices.hosts" in sys.modules:
        from selfsup_jax.devices import hosts

        hosts.end(status, line, error)


def _finish() -> None:
    """Waits for the other hosts of the job, if there are any."""
    from selfsup_jax.devices import hosts

    hosts.finish()


def _several_hosts() -> bool:
    from selfsup_jax.devices import hosts

    return hosts.several()


def _plan(config: ConfigDict, workdir: str) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"  # the compiler for another chip needs none
    from selfsup_jax.plan import command

    command.run(config, _PLAN.value, workdir, _PLAN_IMAGES.value, _PLAN_PRICE.value)


def _cut_of_the_batch(config: ConfigDict) -> tuple[int, int, int]:
    """Batch size, microbatches, batch-norm groups; for a sweep the gcd and the two maxima."""
    runs = list(config.variants.values()) if "variants" in config else [config]
    batch_size = math.gcd(*(run.get("batch_size", 0) for run in runs))  # 0: no batch size
    accumulate, groups = (max(r.get(k, 1) for r in runs) for k in ("accumulate_steps", "bn_groups"))
    return batch_size, accumulate, groups


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags with absl; reports every mistake in one line."""
    # The library parses a field's name as Python, where `global` is a keyword.
    sys.argv = [_with_brackets(arg) for arg in argv]
    try:
        return flags.FLAGS(sys.argv)
    except flags.Error as e:
        # An exception in a config file is the last line of a traceback.
        message = str(e).strip().splitlines()[-1].removeprefix("ValueError: ")
        _fail(message.replace('["global"].', ".global."))
    except OSError:  # the config file is missing
        _fail(_unreadable(_given_config(argv)))
    except (AttributeError, KeyError, ValueError) as e:  # an unknown field, section or name
        _fail(_unknown_field(argv) or " ".join(str(e).split()))


def _with_brackets(arg: str) -> str:
    """`--config.views.global.area=...` -> `--config.views["global"].area=...`."""
    name, equals, value = arg.partition("=")
    if name.lstrip("-").startswith("config."):
        name = name.replace(".global.", '["global"].')
    return name + equals + value


def _given_config(argv: list[str]) -> str:
    given = [arg.partition("=")[2] for arg in argv if arg.lstrip("-").startswith("config=")]
    return given[-1] if given else ""


def _unreadable(config: str) -> str:
    shared = {f"configs/{name}.py" for name in ("common", "datasets", "evaluation", "parsing")}
    there = sorted(set(glob.glob("configs/[a-z]*.py")) - shared)
    return f"--config={config}: cannot be read; there are {', '.join(there) or 'none in configs/'}"


def _unknown_field(argv: list[str]) -> str | None:
    """The message for the first override of a field that the config doesn't have."""
    path, _, preset = _given_config(argv).partition(":")
    if not os.path.isfile(path):
        return None
    config = runpy.run_path(path)["get_config"](preset)
    for arg in argv[1:]:
        key = arg.lstrip("-").partition("=")[0]
        if key.startswith("config."):
            try:
                parsing.check_field(config, key.removeprefix("config."))
            except ValueError as e:
                return str(e)
    return None


def _fail(message: object) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    _exit(2)


def _exit(status: int) -> NoReturn:
    sys.stdout.flush()
    # Exit at once: with several hosts, a regular exit would wait for the other processes.
    os._exit(status)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
