"""Mistakes on the command line and in config files: one line that says what is wrong."""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import sys
import time

import pytest
from command_lines import check, config_of, presets
from conftest import REPOSITORY, process_env
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs import parsing
from selfsup_jax.command_line import Parser
from selfsup_jax.errors import UserError

DEMO = "--config=configs/byol.py:demo"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["config.steps=20"], "--config.steps=20"),
        (["steps=20"], "--config.steps=20"),
        (["config.optimizer.learning_rate=1"], "--config.optimizer.learning_rate=1"),
        (["learning_rate=0.1"], "--config.optimizer.learning_rate=0.1"),
        (["config.bach_size=8"], "--config.batch_size=8"),
        (["bach_size=8"], "--config.batch_size=8"),
        (["workdir=runs/a"], "--workdir=runs/a"),
        (["\u2014config.steps=20"], "--config.steps=20"),  # a dash of a word processor
        (["configs/moco.py:demo"], "--config=configs/moco.py:demo"),
        (["--config.eval.enabled", "False"], "--config.eval.enabled=False"),
        (["--config.data.download", "True", "--config.steps=3"], "--config.data.download=True"),
        (["--", "--config.steps=20"], "--config.steps=20"),
        (["zzz"], "--config"),
    ],
)
def test_a_word_without_dashes_is_refused(words, meant):
    with pytest.raises(UserError) as error:
        check(DEMO, *words)
    word = next(w for w in words if not w.startswith("--") or words[0] == "--" != w)
    assert str(error.value).startswith(f"{word!r}: is no flag; did you mean {meant}")


def test_words_are_refused_where_no_flag_follows_them_too():
    check(DEMO, "--config.steps", "20", "--config.data.download", "--noconfig.eval.enabled")
    with pytest.raises(UserError, match=r"^'config.steps=20': "):
        check("config.steps=20", DEMO)
    with pytest.raises(UserError, match=r"^'config.steps=20': "):
        check(DEMO, "config.steps=20", "--config.optimizer.learning_rate=-1")


def test_other_command_lines_miss_dashes_too(tmp_path, monkeypatch, capsys):
    parser = Parser()
    parser.add_argument("workdirs", nargs="+")
    parser.add_argument("--output")
    for argv, told in (
        (["a", "output=x.html"], "error: 'output=x.html': did you mean --output=x.html?\n"),
        ([], "error: the following arguments are required: workdirs\n"),
    ):
        with pytest.raises(SystemExit) as ended:
            parser.parse_args(argv)
        assert ended.value.code == 2 and capsys.readouterr().err == told
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output=1").mkdir()  # a workdir may have such a name
    assert parser.parse_args(["output=1"]).workdirs == ["output=1"]


BY_BYOL = (
    "from configs import byol\ndef get_config(arg=None):\n    config = byol.get_config('demo')\n"
)
FILES = {
    "1 / 0": (":1: ZeroDivisionError: division by zero", ""),
    "import no_such": (":1: ModuleNotFoundError: No module named 'no_such'", ""),
    "x = (": (":1: SyntaxError: '(' was never closed", ""),
    "raise SystemExit(3)": (":1: exits, with status 3", ""),
    "import sys\nsys.exit()": (":2: exits, with status", ""),
    "open('/no/such')": (":1: FileNotFoundError: ", "/no/such"),
    "raise KeyError('a\\nb')": (":1: KeyError: ", ""),
    "b'\\xff'.decode()": (":1: UnicodeDecodeError: ", ""),
    "x = 1": (": has no function get_config", ""),
    "def get_config(): pass": (": get_config returns no ConfigDict but NoneType", ""),
    "def get_config(): return get_config()": (":1: RecursionError: ", ""),
    "from ml_collections import ConfigDict\ndef get_config():\n    config = ConfigDict()\n"
    "    config.a = config\n    return config": (": RecursionError: ", ""),
    "from ml_collections import FrozenConfigDict\ndef get_config(): return FrozenConfigDict()": (
        ": get_config returns no ConfigDict but FrozenConfigDict",
        "",
    ),
    "def get_config(): return 3": (": get_config returns no ConfigDict but int", ""),
    BY_BYOL + "    config.batch_size = '64'\n    return config": (":4: TypeError: ", "batch_size"),
    BY_BYOL + "    config.no.such = 1\n    return config": (":4: AttributeError: ", "no"),
    BY_BYOL + "    raise ValueError('no\\nluck')": (":4: ValueError: no luck", ""),
    BY_BYOL + "    {}['a']": (":4: KeyError: 'a'", ""),
    BY_BYOL + "    del config.data\n    return config": ("config.data.", "is missing"),
    BY_BYOL + "    config.seed = 2**70\n    return config": ("config.seed=", "at most"),
}


@pytest.mark.parametrize("overrides", [(), ("--config.steps=3",)], ids=["plain", "overridden"])
@pytest.mark.parametrize("content", FILES)
def test_an_error_of_a_config_file_is_its_line(tmp_path, content, overrides):
    path = tmp_path / "mine.py"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        check(f"--config={path}", *overrides)
    told, hint = str(error.value), FILES[content][1]
    assert FILES[content][0] in told and hint in told and "\n" not in told
    if FILES[content][0].startswith(":"):
        assert told.removeprefix("--config=").startswith(f"{path}:")


def test_a_preset_of_a_file_that_takes_none_is_told(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from configs import byol\ndef get_config():\n    return byol.get_config('demo')"
    )
    check(f"--config={path}")
    with pytest.raises(UserError, match=r"takes 0 positional arguments but 1 was given$"):
        check(f"--config={path}:demo")


def test_a_file_that_was_just_changed_is_read_anew(tmp_path):
    """Bytecode is kept by size and second; the library's own loader takes the earlier one."""
    path = tmp_path / "mine.py"
    for word in ("aaa", "bbb"):
        path.write_text(f"raise ValueError('{word}')")
        os.utime(path, (1e9, 1e9))
        with pytest.raises(UserError, match=f"ValueError: {word}"):
            check(f"--config={path}")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.py"]


@pytest.mark.parametrize("section", ["data", "views", "views.global", "optimizer", "eval.linear"])
def test_a_section_is_not_replaced(section):
    for argument in ([DEMO, f"--config.{section}={{}}"], [f"{DEMO},{section}={{}}"]):
        with pytest.raises(UserError, match=rf"config\.{section}: is a section"):
            check(*argument)


KNN_POLL = "config.follow_poll_seconds="


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--config.job=knn"], "config.job='knn': has other fields, such as neighbours"),
        (["--config.optimizer.exclude=("], r"config.optimizer.exclude=('(',): '(' is no regular"),
        (["--config.optimizer.drops=0.5"], "config.optimizer.drops=(0.5,): have no effect"),
        (["--config.optimizer.schedule=step"], "config.optimizer.drops=(): must be fractions"),
        (["--config.views.global.aspect=(1,)"], "config.views.global.aspect=(1,): must be (low"),
        (["--config.seed=1180591620717411303424"], "config.seed=1180591620717411303424: must be"),
        (["--config.steps="], "flag --config.steps=: must be a whole number"),
        (
            ["--config.optimizer.learning_rate=0,1"],
            "flag --config.optimizer.learning_rate=0,1: ",
        ),
        (
            ["--config.eval.enabled=maybe"],
            "flag --config.eval.enabled=maybe: must be T",
        ),
        (
            ["--config.optimizer.exclude=('a',"],
            "flag --config.optimizer.exclude=('a',: must",
        ),
        (["--config.optimizer=sgd"], "--config.optimizer: is a section; give its fields"),
        (["--steps=20"], "unknown flag --steps; did you mean --config.steps=20?"),
        (
            ["-learning_rate", "3"],
            "unknown flag --learning_rate; did you mean --config.optimizer.le",
        ),
        (
            ["--zzz"],
            "unknown flag --zzz; the fields of the config are given as --config.NAME=VALUE",
        ),
        (
            ["--config=configs/bylo.py"],
            "--config=configs/bylo.py: cannot be read; did you mean conf",
        ),
        (["--config=configs/a.py", DEMO], "--config is given 2 times: configs/a.py, configs/byol"),
        (["--config=configs/knn.py", "--config.follow_poll_seconds=inf"], KNN_POLL),
        (["--config=configs/knn.py", "--config.follow_poll_seconds=1e9"], KNN_POLL),
    ],
)
def test_other_mistakes_are_one_line(argv, told):
    with pytest.raises(UserError) as error:
        check(*([] if argv[0].startswith("--config=") else [DEMO]), *argv)
    assert str(error.value).startswith(told) and "\n" not in str(error.value)


# ------------------------------------------------------------------------ random mistakes

GARBAGE = st.sampled_from(
    [
        "nan",
        "inf",
        "-inf",
        "-1",
        "0",
        "1e300",
        "1e400",
        "10" * 20,
        str(2**70),
        "",
        " ",
        "None",
        "True",
    ]
    + [
        "(1,1)",
        "(",
        "()",
        "(nan,)",
        "('(',)",
        "[1]",
        "{}",
        "{'a': 1}",
        "(1,'a')",
        "a",
        "1.5",
        "0x10",
    ]
    + [
        "../x",
        "\u00e9\u2014",
        "a\nb",
        "a,b",
        "a=b",
        "((1,),)",
        "9" * 5000,
        "1,2",
        "*",
        "--",
        "$(x)",
    ]
) | st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12)
FLAGS = ("num_processes", "process_id", "cpu_devices", "parallel", "compilation_cache", "v")


@st.composite
def command_lines(draw) -> list[str]:
    """A preset and one to three mistakes; now and then one that is none."""
    path = draw(st.sampled_from(sorted(presets())))
    preset = draw(st.sampled_from(presets()[path]))
    fields = parsing.field_names(config_of(path, preset))
    field = st.sampled_from(fields)
    misspelt = st.builds(
        lambda name, at, letter: name[:at] + letter + name[at + 1 :],
        field,
        st.integers(0, 12),
        st.sampled_from(["", "x", ".", "_", "[0]", "=", "\u00e9"]),
    )
    override = st.builds("--config.{}={}".format, field | misspelt, GARBAGE)
    mistake = st.one_of(
        override,
        override,
        st.builds("--config.{} {}".format, field, GARBAGE).map(lambda two: two.split(" ", 1)),
        st.builds("{}={}".format, field | misspelt, GARBAGE),  # without dashes
        st.builds("--{}={}".format, st.sampled_from(FLAGS) | misspelt, GARBAGE),
        GARBAGE,
    )
    mistakes = [
        word
        for m in draw(st.lists(mistake, max_size=3))
        for word in ([m] if isinstance(m, str) else m)
    ]
    after = draw(
        st.lists(st.builds("{}={}".format, field | misspelt, GARBAGE) | GARBAGE, max_size=1)
    )
    config = ",".join([f"--config={path}:{preset}", *after])
    return [config, *mistakes] if draw(st.booleans()) else [*mistakes, config]


SECONDS: list[float] = []


@settings(
    max_examples=int(os.environ.get("MISTAKES", "100")),
    deadline=None,  # a busy machine
    derandomize="MISTAKES" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(argv=command_lines())
def random_mistake(argv):
    start = time.process_time()
    try:
        check(*argv)
    except UserError as e:
        assert "\n" not in str(e) and "Traceback" not in str(e), str(e)
    except SystemExit as e:
        raise AssertionError("only --help exits") from e
    finally:
        SECONDS.append(time.process_time() - start)


def test_random_mistakes_are_one_line(capsys):
    """`MISTAKES=2000 pytest -k random_mistakes` tries as many, new ones."""
    gc.disable()  # of all that this process holds; a user's has just begun
    try:
        random_mistake()
    finally:
        gc.enable()
    with capsys.disabled():
        median, most, count = statistics.median(SECONDS), max(SECONDS), len(SECONDS)
        slow = sum(s > 0.1 for s in SECONDS)
        print(f"\n{count} command lines: CPU s median {median:.3f}, most {most:.3f}, {slow} > 0.1")


@pytest.mark.slow
def test_what_the_config_alone_tells_needs_no_tensorflow_and_no_data(tmp_path):
    """As a user does it, in a process; words are said to be none before the job is begun."""
    program = (
        "import run_experiment, sys\n"
        "from absl import app\n"
        "sys.modules |= dict.fromkeys(('tensorflow', 'tensorflow_datasets', 'sklearn', 'orbax'))\n"
        "app.run(run_experiment.main, flags_parser=run_experiment.parse_flags)\n"
    )
    for argument, told in (
        ("--config.optimizer.learning_rate=-1", "error: config.optimizer.learning_rate=-1.0: must"),
        (
            "config.steps=20",
            "error: 'config.steps=20': is no flag; did you mean --config.steps=20?",
        ),
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, "--config=configs/byol.py", argument]
            + [f"--workdir={tmp_path / 'run'}"],
            cwd=REPOSITORY,
            env=process_env(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith(told)
        assert not (tmp_path / "run").exists()
