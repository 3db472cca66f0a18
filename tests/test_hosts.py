"""The processes of a job: joining, agreeing, noticing a loss, ending together."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest
import tiny_runs
from conftest import REPOSITORY, process_env
from ml_collections import ConfigDict

from configs import byol
from selfsup_jax.data import inputs
from selfsup_jax.data.source import Source
from selfsup_jax.devices import activity, hosts, job, wire
from selfsup_jax.devices.activity import Activity
from selfsup_jax.devices.link import Link
from selfsup_jax.devices.wire import LOOPBACK
from selfsup_jax.errors import LOST, HostsDiffer, Stopped, UserError
from selfsup_jax.run import checkpoint, identity, same_job, signals, workdir

PATIENCE = 60.0  # seconds; far more than anything here takes


class Members:
    """Links of one job in this process, each in a thread of its own."""

    def __init__(self, timeout=PATIENCE):
        self.timeout, self.port = timeout, wire.free_port()
        self.links: dict[int, Link] = {}
        self.losses: dict[int, concurrent.futures.Future] = {}

    def start(self, processes, numbers, seconds=PATIENCE, port=None):
        """What `join` gives or raises in each, by number."""
        for number in numbers:
            self.losses[number] = concurrent.futures.Future()
            on_loss = self.losses[number].set_result
            self.links[number] = Link(number, processes, self.timeout, on_loss)
        port = self.port if port is None else port
        return self.each(lambda link: link.join(LOOPBACK, port, seconds), numbers)

    def each(self, do, numbers=None):
        """The results or errors of `do(link)`, all at the same time."""
        links = {number: self.links[number] for number in numbers or self.links}
        with concurrent.futures.ThreadPoolExecutor(len(links)) as pool:
            calls = {number: pool.submit(do, link) for number, link in links.items()}
        return {number: call.exception() or call.result() for number, call in calls.items()}

    def break_off(self, number):
        """The end of a killed process, as the others see it: its connections close."""
        self.links.pop(number).close()

    def loss(self, number):
        return self.losses[number].result(PATIENCE)


@pytest.fixture
def job_of():
    made = []

    def make(processes, **options):
        members = Members(**options)
        made.append(members)
        joined = members.start(processes, range(processes))
        assert not [e for e in joined.values() if isinstance(e, Exception)]
        return members

    yield make
    for members in made:
        for link in members.links.values():
            link.close()


@pytest.fixture
def members():
    made = Members()
    yield made
    for link in made.links.values():
        link.close()


# ------------------------------------------------------------------------------- the start


def test_missing_processes_are_named_on_every_host(members):
    errors = members.start(5, [0, 1, 3], seconds=1)
    for error in errors.values():
        assert isinstance(error, UserError)
        assert "processes 2 and 4 of 5 did not start within --start_timeout=1 s" in str(error)


def test_a_coordinator_that_cannot_be_reached(members):
    (error,) = members.start(2, [1], seconds=1).values()
    address = re.escape(f"{LOOPBACK}:{members.port}")
    assert isinstance(error, UserError)
    assert re.search(f"process 0 can't be reached at {address}.*Connection refused", str(error))


def test_a_port_of_something_else(members):
    """It answers, but not as process 0."""
    with socket.create_server((LOOPBACK, 0)) as server:

        def answer():
            with contextlib.suppress(OSError):  # closed at the end of the test
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        port = server.getsockname()[1]
        (error,) = members.start(2, [1], seconds=1, port=port).values()
    assert "what listens there is not process 0" in str(error)


def test_a_taken_port_is_told(members):
    with wire.listen(0) as other:
        port = other.getsockname()[1]
        (error,) = members.start(2, [0], seconds=1, port=port).values()
    assert isinstance(error, UserError)
    assert re.search(f"port {port} of this machine .*Address already in use", str(error))


def test_two_processes_with_one_number(members):
    members.start(3, [0, 1], seconds=0.1)
    twin = Link(1, 3, PATIENCE, lambda loss: None)
    with pytest.raises(UserError, match="--process_id=1: there is a process 1 already"):
        twin.join(LOOPBACK, members.port, 1)
    twin.close()


def test_another_number_of_processes(members):
    members.start(2, [0], seconds=0.1)
    other = Link(1, 3, PATIENCE, lambda loss: None)
    with pytest.raises(UserError, match="--num_processes=3: process 0 has 2"):
        other.join(LOOPBACK, members.port, 1)
    other.close()


def test_process_0_tells_whom_it_refused(members, capsys):
    members.start(2, [0], seconds=0.1)
    losses = []
    for _ in range(2):  # a scheduler starts it again and again
        other = Link(1, 3, PATIENCE, losses.append)
        with pytest.raises(UserError):
            other.join(LOOPBACK, members.port, 1)
        time.sleep(0.1)
        other.close()
    assert not losses  # process 0 closes the connection, but it is not lost
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert re.fullmatch(r"refused process 1 on \S+: --num_processes=3: process 0 has 2", told[0])


def test_an_error_before_the_start_ends_the_others_when_they_start():
    """Not only after --start_timeout; whichever process it is."""
    for wrong in (0, 1):
        members = Members()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            address = f"{LOOPBACK}:{members.port}"
            line = "config.seed='x': must be a number"
            told = pool.submit(hosts.end_others, address, 2, wrong, PATIENCE, line)
            members.start(2, [1 - wrong])
            loss = members.loss(1 - wrong)
            told.result(PATIENCE)
        assert (loss.status, loss.told) == (2, True)
        assert re.fullmatch(rf"process {wrong} of 2 \(.*\): {line}", loss.line)
        members.links.pop(1 - wrong).close()


def test_strangers_do_not_disturb_the_start(members):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        start = pool.submit(members.start, 2, [0])
        for said in (
            b"GET / HTTP/1.1\r\n\r\n",
            b"[1]\n",
            b'{"process": "x"}\n',
            b'{"process": 9, "processes": 2}\n',
        ):
            while True:
                try:
                    with socket.create_connection((LOOPBACK, members.port)) as stranger:
                        stranger.sendall(said)
                        stranger.shutdown(socket.SHUT_WR)
                        stranger.settimeout(PATIENCE)
                        while stranger.recv(4096):
                            pass
                    break
                except ConnectionRefusedError:
                    time.sleep(0.01)
        second = Link(1, 2, PATIENCE, lambda loss: None)
        second.join(LOOPBACK, members.port, PATIENCE)
        assert start.result(PATIENCE)[0].bind
        second.close()


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.0.0.1:1234", ("10.0.0.1", 1234)),
        ("node-7.cluster:80", ("node-7.cluster", 80)),
        ("[fe80::1%eth0]:65535", ("fe80::1%eth0", 65535)),
    ],
)
def test_addresses(address, expected):
    assert job.parse_address(address) == expected


@pytest.mark.parametrize(
    "address",
    ["", ":", "foo", "foo:", ":1", "foo:bar", "foo:0", "foo:65536", "foo:-1", "foo:1:2", "::1:80"]
    + ["http://foo:1", "foo :1", "foo:1\n", "foo:\u0661", "foo:999999999999", "[::1]", "[foo:1"],
)
def test_malformed_addresses(address):
    with pytest.raises(UserError, match="must be HOST:PORT"):
        hosts.join(address, 2, 1, 1.0, 1.0)


# ------------------------------------------------------------------------------- agreement


def test_all_get_what_all_gave(job_of):
    members = job_of(3)
    for turn in range(3):  # a name can be used again
        given = {0: {"a": turn}, 1: {"a": turn}, 2: {"b": [1.5, None]}}
        got = members.each(lambda link, given=given: link.exchange("x", given[link.process]))
        expected = [({"a": turn}, [0, 1]), ({"b": [1.5, None]}, [2])]
        assert [sorted(groups, key=lambda g: g[1]) for groups in got.values()] == [expected] * 3


def test_values_come_in_the_order_of_the_processes(monkeypatch):
    groups = [("b", [1, 3]), ("a", [0, 2])]
    link = types.SimpleNamespace(exchange=lambda what, value: groups)
    assert hosts.of_all("x", {"y": 1}) == [{"y": 1}]  # one process
    monkeypatch.setattr(hosts, "_job", types.SimpleNamespace(link=link))
    assert hosts.of_all("x", "a") == ["a", "b", "a", "b"]
    assert hosts.of_first("x", "a") == "a"


def test_every_difference_is_told_with_all_values():
    groups = [({"x": 1, "y": "a", "z": None}, [0, 2]), ({"x": 2, "y": "a"}, [1])]
    with pytest.raises(HostsDiffer) as error:
        hosts.compare(groups)
    assert str(error.value) == (
        "the hosts differ: x is 1 on processes 0 and 2, 2 on process 1; "
        "z is null on processes 0 and 2, missing on process 1"
    )
    hosts.compare(groups[:1])
    with pytest.raises(HostsDiffer, match=r"; and 980 more$"):
        hosts.compare([({f"f{i}": i for i in range(1000)}, [0]), ({}, [1])])


def test_hosts_differ_in_any_field_but_paths():
    config = byol.get_config("demo")
    mine = same_job.facts(config, parallel="pmap")
    paths = {name for name in identity.flat(config) if f"config.{name}" not in mine}
    assert paths == {"data.dir", "init_from"}
    assert {"code", "version of jax", "--parallel", "config.seed", "config.steps"} <= mine.keys()
    config.optimizer.learning_rate *= 2
    theirs = same_job.facts(config, parallel="pmap")
    assert {k for k in mine if mine[k] != theirs[k]} == {"config.optimizer.learning_rate"}


def test_paths_of_variants_may_differ():
    variant = {"data": {"dir": "/b", "name": "c"}}
    sweep = ConfigDict({"publish_dir": "/a", "variants": {"x": variant}})
    assert same_job.config_facts(sweep) == {"config.variants.x.data.name": "c"}


def test_the_code_is_that_of_the_library_and_of_the_method(tmp_path, monkeypatch):
    # A name that no other test imports: one that was imported is found where it was then.
    package = tmp_path / "written_here_jax"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = [same_job.code_hash({"written_here"}), same_job.code_hash(set())]
    (package / "losses.py").write_text("x = 1\n")
    after = [same_job.code_hash({"written_here"}), same_job.code_hash(set())]
    assert before[0] != after[0] != after[1] == before[1]


def test_what_tells_one_split_from_another():
    def source(names, directory="/here/", **changes):
        labels = np.arange(len(names), dtype=np.int32) % 2
        made = Source("x", len(names), ("a", "b"), "path", np.asarray(names), labels)
        return dataclasses.replace(made, describe=lambda i: directory + names[i], **changes)

    names = [f"{i}.png" for i in range(50)]
    facts = source(names).facts("/here/")
    assert (facts["images"], facts["first"], facts["last"]) == (50, "0.png", "49.png")
    assert source(names, "/there/").facts("/there") == facts  # mounted elsewhere
    for other in (
        source(names[:-1]),
        source([*names[:20], "x.png", *names[21:]]),
        source(names, class_names=("a", "c")),
        source(names, labels=np.zeros(50, np.int32)),
    ):
        assert other.facts("/here/") != facts
    pixels = np.zeros((50, 2, 2, 3), np.uint8)
    black, gray = (source(names, kind="array", images=pixels + x).facts("/here/") for x in (0, 9))
    assert {k for k in black if black[k] != gray[k]} == {"pixels"}


def test_hosts_compare_the_splits_that_they_load(tmp_path, monkeypatch):
    """By name, since a job may load several; before anything is decoded."""
    folder = tiny_runs.write_images(tmp_path / "images", classes=2, count=20)
    config = tiny_runs.tiny_config(folder, data__train_split="train[:50%]", eval__enabled=True)
    compared = {}
    monkeypatch.setattr(hosts, "several", lambda: True)
    monkeypatch.setattr(hosts, "check_same", compared.__setitem__)
    inputs.load_data(config)
    assert compared.keys() == {"data.train_split", "data.test_split"}
    assert compared["data.train_split"]["data.train_split: images"] == 10
    assert compared["data.train_split"]["data.train_split: first"].startswith("class_")


# ----------------------------------------------------------------------- losses and the end


@pytest.mark.parametrize("gone", [0, 2])
def test_a_process_that_dies_is_noticed_at_once(job_of, gone):
    members = job_of(3)
    members.break_off(gone)
    for number in members.links:
        loss = members.loss(number)
        assert loss.status == LOST and not loss.told
        assert re.search(f"process {gone} of 3 .*has died: its connection closed", loss.line)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_process_that_hangs_is_noticed(job_of, frozen):
    """Its connection stays open, but nothing comes."""
    members = job_of(3, timeout=1.0)
    wake = threading.Event()
    members.links[frozen].loop.call_soon_threadsafe(wake.wait)
    try:
        for number in set(members.links) - {frozen}:
            loss = members.loss(number)
            assert loss.status == LOST
            assert re.search(f"process {frozen} of 3 .*no sign of life for 1 s", loss.line)
    finally:
        wake.set()


def test_a_process_that_slept_learns_why_the_others_ended(job_of):
    members = job_of(2, timeout=1.0)
    wake = threading.Event()
    members.links[1].loop.call_soon_threadsafe(wake.wait)
    members.loss(0)
    wake.set()
    assert re.search("process 1 of 2 .*has given no sign of life", members.loss(1).line)


def test_a_process_that_does_nothing_while_the_others_wait_for_it_hangs(monkeypatch):
    now, used, reporting = [100.0], [0.0] * 3, [0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(activity, "_work", lambda: used[reporting[0]])
    processes = [Activity(2.0) for _ in used]

    def after(seconds, cpu=0.0):
        """Who hangs; process 1 uses so much of a core."""
        for _ in range(seconds // 2):
            now[0] += 2.0
            used[1] += 2.0 * cpu
            reports = {}
            for reporting[0], process in enumerate(processes):
                reports[reporting[0]] = process.report()
        return activity.hanging(reports, 10.0)

    assert not after(100)  # all at the same place, such as a compilation or a checkpoint
    for process in processes:
        process.pass_place()
    assert not after(4)
    processes[0].pass_place()  # it has its next batch
    assert not after(8)
    assert after(4) == [1, 2]
    processes[2].pass_place()
    assert not after(8, cpu=0.5)
    assert not after(50, cpu=0.05)  # it works, at whatever that takes so long
    assert not after(10, cpu=0.001)
    assert after(2, cpu=0.001) == [1]
    now[0] += 100.0  # all were paused, with their machine
    assert not after(10)
    assert after(4) == [1]
    processes[1].pass_place()
    assert not after(100)


def test_computing_and_reading_are_work(tmp_path):
    def done(work):
        before = activity._work()
        work()
        return activity._work() - before

    (tmp_path / "file").write_bytes(bytes(5 * 10**6))
    assert done(lambda: time.sleep(0.1)) < 0.1
    assert done(lambda: sum(range(10**7))) > 0.05
    if pathlib.Path("/proc/self/io").exists():
        assert done((tmp_path / "file").read_bytes) > 0.5


def test_a_hanging_process_is_told_while_its_link_lives(job_of, monkeypatch):
    monkeypatch.setattr(activity, "_work", lambda: 0.0)
    members = job_of(3, timeout=1.0)
    for number in (0, 2):
        members.links[number].activity.pass_place()
    for number in members.links:
        loss = members.loss(number)
        assert loss.status == LOST
        assert re.search("process 1 of 3 .* hangs: the others wait for it, .* for 1 s", loss.line)


def test_a_pause_of_this_process_is_not_held_against_the_others(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pulse = wire.Pulse(10.0)
    pulse.heard(1)

    def after(seconds):
        now[0] += seconds
        return pulse.silent()

    assert not any(after(2) for _ in range(5))
    assert after(2) == [1]
    assert not after(1000)  # late: this process was paused
    assert not any(after(2) for _ in range(5))
    assert after(2) == [1]
    pulse.heard(1)
    assert not after(2)
    assert pulse.quiet() == 2


def test_an_error_of_one_ends_the_others_with_its_line(job_of):
    for number in (0, 1):
        members = job_of(3)
        members.links[number].end(2, "config.seed='x': must be a number")
        for other in set(members.links) - {number}:
            loss = members.loss(other)
            assert (loss.status, loss.told) == (2, True)
            assert re.fullmatch(
                rf"process {number} of 3 \(.*\): config.seed='x': must be a number", loss.line
            )


def test_nobody_misses_a_process_that_is_done(job_of):
    members = job_of(3)
    members.each(lambda link: link.finish())
    members.break_off(2)
    members.break_off(0)
    time.sleep(0.3)
    assert not any(loss.done() for loss in members.losses.values())


def test_nobody_is_done_before_all_are(job_of):
    members = job_of(2)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        finished = pool.submit(members.links[1].finish)
        time.sleep(0.3)
        assert not finished.done()
        members.links[0].finish()
        finished.result(PATIENCE)


def test_signs_of_life_after_an_error(job_of):
    """Returns when all are known to be alive, also on process 0."""
    members = job_of(2, timeout=2.0)
    members.each(lambda link: link.wait_for_signs_of_life())
    assert not any(loss.done() for loss in members.losses.values())


def test_jaxs_connections_go_through(job_of):
    """To the service of process 0; when that is gone, JAX's client sees silence, not the end."""
    members = Members()
    joined = members.start(2, [0, 1])
    with socket.create_server((LOOPBACK, int(joined[0].bind.split(":")[1]))) as service:
        host, port = joined[1].coordinator.split(":")
        with socket.create_connection((host, int(port))) as client:
            there, _ = service.accept()
            content = os.urandom(300_000)
            threading.Thread(target=client.sendall, args=(content,)).start()
            received = b""
            while len(received) < len(content):
                received += there.recv(2**16)
            assert received == content
            there.sendall(b"answer")
            assert client.recv(100) == b"answer"
            members.break_off(0)
            there.close()
            members.loss(1)
            client.settimeout(0.5)
            with pytest.raises(TimeoutError):
                client.recv(100)
    members.links[1].close()


# ------------------------------------------------------------------------------- facade


class Recorded:
    """In place of a `Link`: what it is told."""

    timeout = 1.0

    def __init__(self, *_):
        self.calls: list[tuple] = []
        self.activity = Activity(1.0)

    def __getattr__(self, name):
        return lambda *args: self.calls.append((name, *args))


class Left(BaseException):
    pass


@pytest.fixture
def one_job(monkeypatch):
    """A job of this process, whose end raises `Left(status, line)`."""

    def leave(*told):
        raise Left(*told)

    monkeypatch.setattr(job, "Link", Recorded)
    monkeypatch.setattr(job, "leave", leave)
    made = job.Job(0, 2, 1.0)
    monkeypatch.setattr(hosts, "_job", made)
    return made


def test_the_line_of_a_loss_tells_step_and_what_is_saved(one_job):
    loss = job.Loss(LOST, "process 1 of 2 has died", told=False)
    with pytest.raises(Left) as left:
        one_job._lost(loss)
    assert left.value.args == (
        LOST,
        "process 1 of 2 has died; the same command on every host goes on from what is saved",
    )
    with hosts.saves(lambda: "step 30 is saved"):
        hosts.at_step(37)
        with pytest.raises(Left) as left:
            one_job._lost(loss)
        assert left.value.args[1] == "process 1 of 2 has died, at step 37; step 30 is saved"
        with pytest.raises(Left) as left:
            one_job._lost(loss._replace(status=2, told=True))
        assert left.value.args == (2, "process 1 of 2 has died")


def test_errors_are_told_to_the_others(one_job):
    hosts.end(2, "a mistake", UserError("a mistake"))
    assert one_job.link.calls == [("end", 2, "a mistake")]
    one_job.link.calls.clear()
    hosts.end(2, "they differ", HostsDiffer("they differ"))
    assert one_job.link.calls == [("finish",)]  # each tells it itself
    one_job.link.calls.clear()
    hosts.end(1, "a bug", RuntimeError("a bug"))  # or a collective that failed
    assert one_job.link.calls == [("wait_for_signs_of_life",), ("end", 1, "a bug")]
    one_job.link.calls.clear()
    wrapped = UserError("the checkpoint cannot be read")
    wrapped.__cause__ = RuntimeError("Gloo")
    hosts.end(2, str(wrapped), wrapped)
    assert one_job.link.calls[0] == ("wait_for_signs_of_life",)


def test_sigterm_waits_for_a_step_only_while_steps_are_done(one_job):
    told = []
    one_job._tell_jax = told.append
    with pytest.raises(Stopped), signals.StopSignals() as stop_signals:
        stop_signals.catch()
        one_job._terminate()
        raise Stopped("saved", 143)  # what the loop does at the step that all agreed on
    assert told == [signal.SIGTERM] and not one_job.agrees


def test_sigterm_that_came_too_late_for_a_step(one_job):
    """The last step is done: the evaluation does not run on for an hour."""
    one_job._tell_jax = lambda number: None
    with pytest.raises(Left) as left, hosts.sigterm_agreed():
        one_job._terminate()
    assert left.value.args[0] == 128 + signal.SIGTERM
    with pytest.raises(Stopped), hosts.sigterm_agreed():
        raise Stopped("saved", 143)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("error", [UserError("x"), Stopped("saved", 143)])
def test_no_save_is_begun_after_the_error_of_one_host(tmp_path, monkeypatch, processes, error):
    """A save waits for all hosts; the others, at their next step, would wait for this one."""
    closed = []
    made = types.SimpleNamespace(latest_step=None, close=lambda: closed.append(True))
    monkeypatch.setattr(checkpoint, "Checkpoints", lambda *_: made)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(hosts, "gather_hosts", lambda tree: tree)
    config = tiny_runs.tiny_config(tmp_path)
    with pytest.raises(type(error)), workdir.checkpoints_of(config, str(tmp_path)):
        raise error
    assert bool(closed) == (processes == 1 or isinstance(error, Stopped))


# ------------------------------------------------------------------------ real processes


def start_two(directory, *arguments):
    port = wire.free_port()
    command = [
        *(sys.executable, "tests/tiny_process.py", "--config=configs/byol.py:demo"),
        *(f"--workdir={directory}", "--compilation_cache=", "--config.batch_size=16"),
        *("--config.data.image_size=8", "--config.data.test_resize=8"),
        *("--config.optimizer.warmup_steps=1", "--config.log_every_steps=1"),
        *("--config.checkpoint_every_steps=2", "--config.monitor.diagnostics_every_steps=0"),
        *("--config.monitor.knn_every_steps=0", "--config.monitor.plots_every_steps=0"),
        *(f"--coordinator_address={LOOPBACK}:{port}", "--num_processes=2", *arguments),
    ]
    processes = []
    for i in range(2):
        with (directory.parent / f"{i}.txt").open("w") as log:
            processes.append(
                subprocess.Popen(
                    [*command, f"--process_id={i}"],
                    cwd=REPOSITORY,
                    env=process_env() | {"TINY_PAUSE": "0.05"},
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                )
            )
    return processes


def wait_for(processes, folder, text):
    """Waits until process 0 has said this."""
    deadline = time.monotonic() + 300
    while text not in (folder / "0.txt").read_text() and time.monotonic() < deadline:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)


@pytest.mark.slow
def test_kill_9_of_the_coordinator_is_one_line(tmp_path):
    """Without the link, JAX's client aborts with a hundred lines."""
    processes = start_two(tmp_path / "run", "--config.steps=5000", "--config.eval.enabled=False")
    try:
        wait_for(processes, tmp_path, "step 4/")
        while not tiny_runs.saved_steps(tmp_path / "run"):
            time.sleep(0.05)
        processes[0].kill()
        assert processes[1].wait(120) == LOST
    finally:
        for process in processes:
            process.kill()
    lines = (tmp_path / "1.txt").read_text().splitlines()
    saved = tiny_runs.saved_steps(tmp_path / "run")[-1]
    assert [line for line in lines if "process 0" in line] == lines[-1:]
    assert re.match(r"error: process 0 of 2 .*has died.*, at step \d+; step ", lines[-1])
    assert f"; step {saved} is saved in {tmp_path / 'run'}; the same command" in lines[-1]
    assert not any("Check failure" in line or "Traceback" in line for line in lines)


@pytest.mark.slow
def test_sigterm_in_the_closing_evaluation_ends_all_hosts(tmp_path):
    never = ("max_iterations=1000000", "tolerance=1e-30")
    for_ever = [f"--config.eval.linear.{field}" for field in never]
    processes = start_two(tmp_path / "run", "--config.steps=2", *for_ever)
    try:
        wait_for(processes, tmp_path, "probes on")
        processes[1].terminate()
        assert [process.wait(120) for process in processes] == [143, 143]
    finally:
        for process in processes:
            process.kill()
    last = [(tmp_path / f"{i}.txt").read_text().splitlines()[-1] for i in range(2)]
    assert last[1].startswith("SIGTERM: stopped; step 2 is saved in ")
    assert re.match(r"process 1 of 2 .*: SIGTERM: stopped; step 2 is saved in ", last[0])
