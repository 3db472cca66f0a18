"""The only entry point: `python run_experiment.py --config=configs/byol.py --workdir=DIR`.

Exit status:
    0    the job is finished;
    2    a problem that the user can correct, reported in one line: flags, config, data, workdir, a
         full disk, a loss that is not finite, hosts that differ or are missing at the start. Saved
         files stay;
    75   another host of the job has died, hangs or does not answer, reported in one line: a
         scheduler should run the same command again on all hosts, which resumes from the last
         checkpoint;
    130  Ctrl-C, 143  SIGTERM: stopped after a step and saved a checkpoint; the same command resumes
         from it. Before the first step and during the final evaluation there is nothing to save:
         SIGTERM then ends the process at once;
    any other status is a bug and shows a traceback.

If one of several hosts ends with an error or a signal, the others end with its status and line.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from selfsup_jax import command_line, presets
from selfsup_jax.devices import cluster
from selfsup_jax.errors import Stopped, UserError, first_line
from selfsup_jax.paths import BucketError

parsing = presets.parsing()
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
    "host_timeout", 60.0, "seconds without a sign of life, or of work, after which a host is lost"
)
_CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices", 0, "without an accelerator: devices to make of the CPU; 0 chooses one or two"
)
_PARALLEL = flags.DEFINE_string(
    "parallel", "pmap", "what maps a training step over the devices: pmap, or shard_map"
)
_CACHE = flags.DEFINE_string(
    "compilation_cache",
    "auto",
    "where compiled programs are kept for the next start; empty for nowhere; auto: in the workdir "
    "on several hosts and on TPUs, else in ~/.cache/selfsup_jax/compiled",
)
_COMPILE_ONLY = flags.DEFINE_bool(
    "compile_only", False, "train nothing: compile what the run needs, and keep it"
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
    from selfsup_jax import library
    from selfsup_jax.training import pretrain

    if not _COMPILE_ONLY.value:
        return library.run_job(config, workdir)
    if config.job != "pretrain":
        raise UserError(f"--compile_only: is for pretraining, not for config.job={config.job}")
    return pretrain.pretrain(config, workdir, compile_only=True)


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
        from selfsup_jax.config import check_fields

        check_fields(_CONFIG.value)  # before the slower imports
        workdir = os.path.expanduser(_WORKDIR.value)  # `--workdir=~/a`: shells leave it as it is
        if _PLAN.value:
            return _plan(_CONFIG.value, workdir)
        from selfsup_jax.devices import compiled, hosts, parallel, process

        process.start(
            *(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value),
            *(_START_TIMEOUT.value, _HOST_TIMEOUT.value),
        )
        if hosts.several():
            from selfsup_jax.run import same_job

            facts = same_job.facts(_CONFIG.value, parallel=_PARALLEL.value)
            hosts.check_same("the config", facts)
        process.use_cpu_devices(_CPU_DEVICES.value, *_cut_of_the_batch(_CONFIG.value))
        process.keep_freed_memory(_step_pixels(_CONFIG.value))
        compiled.keep(compiled.directory(_CACHE.value, _WORKDIR.value))
        parallel.use_engine(_PARALLEL.value)
        if hosts.several():
            hosts.check_same("the devices", process.local_devices())
        run_job(_CONFIG.value, workdir)
    except (UserError, BucketError) as e:
        line = f"{e.filename}: {e.strerror}" if isinstance(e, BucketError) else str(e)
        _tell_other_hosts(2, line, e)
        _fail(line)
    except Stopped as e:
        print(e, file=sys.stderr, flush=True)
        _hosts().finish()
        _exit(e.status)
    except KeyboardInterrupt:
        line, status = "stopped; nothing that was saved is lost", 128 + signal.SIGINT
        _tell_other_hosts(status, line)
        print(line, file=sys.stderr, flush=True)
        _exit(status)
    except Exception as e:
        _tell_other_hosts(1, f"{type(e).__name__}: {first_line(e)}", e)
        if not _hosts().several():
            raise
        traceback.print_exc()
        _exit(1)
    _hosts().finish()
    if _hosts().several():
        _exit(0)


def _tell_other_hosts(status: int, line: str, error: Exception | None = None) -> None:
    """Ends the other hosts of the job, if there are any, with this status and line."""
    if "selfsup_jax.devices.hosts" in sys.modules:
        _hosts().end(status, line, error)


def _hosts() -> Any:
    """The module, which imports JAX: that takes longer than to read the flags."""
    from selfsup_jax.devices import hosts

    return hosts


def _plan(config: ConfigDict, workdir: str) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"  # the compiler for another chip needs none
    from selfsup_jax.plan import command

    command.run(config, _PLAN.value, workdir, _PLAN_IMAGES.value, _PLAN_PRICE.value)


def _cut_of_the_batch(config: ConfigDict) -> tuple[int, int, int]:
    """Batch size, microbatches, batch-norm groups; for a sweep the gcd and the two maxima."""
    runs = _runs(config)
    batch_size = math.gcd(*(run.get("batch_size", 0) for run in runs))  # 0: no batch size
    accumulate, groups = (max(r.get(k, 1) for r in runs) for k in ("accumulate_steps", "bn_groups"))
    return batch_size, accumulate, groups


def _step_pixels(config: ConfigDict) -> int:
    """Of the images of a training step: the most in a sweep."""
    return max(run.get("batch_size", 0) * run.data.image_size**2 for run in _runs(config))


def _runs(config: ConfigDict) -> list[ConfigDict]:
    return list(config.variants.values()) if "variants" in config else [config]


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags with absl; reports every mistake in one line."""
    try:
        return read_flags(argv)
    except UserError as e:
        _fail(e)


def read_flags(argv: list[str]) -> list[str]:
    """Parses the flags with absl.

    Raises:
        UserError: a mistake in a flag, a word that is no flag, or an error in the config file.
    """
    # The library parses a field's name as Python, where `global` is a keyword.
    sys.argv = [command_line.with_brackets(arg) for arg in argv]
    if len(given := command_line.values(argv, "config")) > 1:
        raise UserError(f"--config is given {len(given)} times: {', '.join(given)}")
    flags.FLAGS["config"].parser = parser = _ConfigFile()
    try:
        rest = flags.FLAGS(sys.argv)
    except (Exception, SystemExit) as e:
        if isinstance(e.__context__, UserError):  # of `_ConfigFile`
            raise e.__context__ from e
        if parser.config is not None:
            _refuse_unknown(parser.config, argv)
            _refuse_sections(parser.fields, argv)
        if isinstance(e, SystemExit):  # --help
            raise
        if isinstance(e, flags.UnrecognizedFlagError) and "Did you mean" not in str(e):
            raise UserError(command_line.unknown(e.flagname, e.flagvalue, parser.fields)) from e
        message = command_line.in_plain_words(e).replace('["global"]', ".global")
        raise UserError(message) from e
    names = [f"config.{field}" for field in parser.fields] + list(flags.FLAGS)
    command_line.refuse_words(argv, rest[1:], names)
    _refuse_sections(parser.fields, argv)
    return rest


class _ConfigFile(flags.ArgumentParser):
    """Makes the config of `FILE:PRESET`; the library's own parser loses where an error was raised.

    Attributes:
        config: what the file has made, as soon as it has.
        fields: the dotted names of its fields.
    """

    config: ConfigDict | None = None
    fields: Sequence[str] = ()

    def parse(self, argument: str) -> ConfigDict:
        """As the library's; raises `UserError` in place of any error."""
        config = presets.load_config(argument)
        self.fields, self.config = parsing.field_names(config), config.lock()
        return self.config


def _refuse_unknown(config: ConfigDict, argv: list[str]) -> None:
    """Raises `UserError` if a field is overridden that the config doesn't have."""
    for arg in argv[1:]:
        key = arg.lstrip("-").partition("=")[0]
        if key.startswith("config."):
            try:
                parsing.check_field(config, key.removeprefix("config."))
            except parsing.ConfigError as e:
                raise UserError(e) from e


def _refuse_sections(fields: Sequence[str], argv: list[str]) -> None:
    """Raises `UserError` if a whole section is overridden: its other fields would be lost."""
    for arg in argv[1:]:
        name, equals, _ = arg.lstrip("-").replace('["global"]', ".global").partition("=")
        key = name.removeprefix("config.")
        if equals and key not in (name, *fields):
            raise UserError(f"--{name}: is a section; give its fields, as --{name}.NAME")


def _fail(message: object) -> NoReturn:
    joined = "selfsup_jax.devices.hosts" in sys.modules and _hosts().several()
    others = () if joined else cluster.still_to_join(sys.argv)
    note = "; the other hosts are told when they start" if others else ""
    print(f"error: {message}{note}", file=sys.stderr, flush=True)
    if others:
        from selfsup_jax.devices import process

        with contextlib.suppress(KeyboardInterrupt):
            process.end_the_others(str(message), *others)
    _exit(2)


def _exit(status: int) -> NoReturn:
    sys.stdout.flush()
    # Exit at once: with several hosts, a regular exit would wait for the other processes.
    os._exit(status)


def console() -> None:
    """The command `selfsup`: this program, and the commands of `selfsup_jax/console.py`."""
    from selfsup_jax import console

    try:
        status = console.run(sys.argv)
        sys.stdout.flush()
    except UserError as e:
        _fail(e)
    except BrokenPipeError:  # as by `selfsup list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE  # as of other programs: what was to be done may not be
    if status is not None:
        sys.exit(status)
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
