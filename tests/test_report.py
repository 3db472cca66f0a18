"""The HTML page on runs and jobs, of small workdirs that are written by hand."""

from __future__ import annotations

import html.parser
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY

from selfsup_jax.errors import UserError
from selfsup_jax.viz import report
from selfsup_jax.viz.report import charts

EVIL = "<script>alert('x')</script>"
PNG = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + b"\0\0\0\x03\0\0\0\x02" + b"rest of a picture"


def put(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, bytes):
        path.write_bytes(value)
    else:
        path.write_text(value if isinstance(value, str) else json.dumps(value))


def a_run(folder, *, seed=0, results=None, lines=(), data="digits", **fields):
    config = {
        **{"job": "pretrain", "method": "byol", "seed": seed, "batch_size": 64, "epochs": 2.0},
        **{"data": {"name": data, "dir": str(folder), "image_size": 16}},
        **{"log_every_steps": 10 + seed, **fields},
        "data_info": {"train_images": 4000, "classes": 3},
    }
    put(folder / "config.json", config)
    if results is not None:
        closing = {"steps": 100, "device_count": 2, "device_kind": "cpu", "collapsed": False}
        put(
            folder / "results.json",
            {"seed": seed, "images_per_second": 900.0, **closing, **results},
        )
    if lines:
        put(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return folder


def a_job(folder, run, *, kind="linear_probe", step=100, seed=0, results=None, **fields):
    told = {"run": str(run) if run else None, "checkpoint": "/x/c", "step": step, "method": "byol"}
    put(folder / "config.json", {"job": kind, "seed": seed, "data_info": told, **fields})
    put(folder / "results.json", {"job": kind, **told, "seed": seed, **(results or {})})
    return folder


class Reader(html.parser.HTMLParser):
    """Rows of a page's tables, its elements, its headings and its text."""

    def __init__(self, page):
        super().__init__()
        self.rows, self.tags, self.text, self._cell = [], [], "", False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        self._cell = tag in ("td", "th") or (self._cell and tag not in ("tr", "table"))
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self._cell:
            self.rows[-1][-1] = " ".join(f"{self.rows[-1][-1]} {data}".split())

    def row(self, start):
        """The only row whose first cell begins so, in the table of measures."""
        return self.of_table(start)[0]

    def of_table(self, start):
        first = next(i for i, r in enumerate(self.rows) if any("top-1" in cell for cell in r))
        width = len(self.rows[first])
        return [r for r in self.rows[first:] if len(r) == width and r[0].startswith(start)]

    def classes(self, tag):
        return [a.get("class") or "" for t, a in self.tags if t == tag]


@pytest.fixture
def read(tmp_path):
    def make(*workdirs, **options):
        report.write([str(w) for w in workdirs], str(tmp_path / "page.html"), **options)
        return Reader((tmp_path / "page.html").read_text())

    return make


def test_seeds_are_one_recipe_with_mean_and_sample_deviation(tmp_path, read):
    for seed, value in enumerate((0.90, 0.92, 0.97)):
        results = {
            "knn_top1": value,
            "random_init_knn_top1": 0.5 + value / 10,
            "pixels_knn_top1": 0.4,
        }
        a_run(tmp_path / f"sweep/base/seed_{seed}", seed=seed, results=results)
    a_run(tmp_path / "sweep/wide/seed_0", results={"knn_top1": 0.95}, batch_size=128)
    page = read(tmp_path / "sweep")
    # Of 0.90, 0.92 and 0.97: mean 0.93, and sqrt((9 + 1 + 16) / 2) / 100 = 0.0361.
    assert page.row("base") == ["base", "3", "93.0 ± 3.6"]
    assert page.row("wide") == ["wide", "1", "95.0"]
    assert page.row("never trained") == ["never trained", "", "59.3 ± 0.4"]
    assert page.row("raw pixels") == ["raw pixels", "", "40.0 ± 0.0"]
    marks = [
        a
        for t, a in page.tags
        if t == "i" and "baseline" in (a.get("class") or "") and "title" in a
    ]
    assert {(a["class"], a["title"]) for a in marks} == {
        ("baseline never-trained", "never trained: 59.3"),
        ("baseline raw-pixels", "raw pixels: 40.0"),
    }
    overview = next(row for row in page.rows if row[0] == "base")
    assert {"0, 1, 2", "BYOL", "digits, 16 px", "2 x cpu", "900", "100"} <= set(overview)


def test_the_best_is_marked_within_a_data_set_only(tmp_path, read):
    for name, data, value in (("a", "digits", 0.9), ("b", "digits", 0.8), ("c", "cifar10", 0.95)):
        a_run(tmp_path / name, data=data, results={"knn_top1": value})
    read(tmp_path)
    bold = re.findall(r"<strong[^>]*>([^<]*)", (tmp_path / "page.html").read_text())
    assert bold == ["90.0"]


def test_a_seed_that_is_there_twice_is_no_second_seed(tmp_path, read):
    for name, value in (("one", 0.9), ("two", 0.8)):
        a_run(tmp_path / name, results={"knn_top1": value})
    page = read(tmp_path / "one", tmp_path / "two", tmp_path)
    assert [page.row(name)[1] for name in ("one", "two")] == ["90.0", "80.0"]
    assert "2 runs" in page.text and "±" not in page.text


def test_jobs_join_the_run_that_they_evaluate(tmp_path, read):
    run = a_run(tmp_path / "runs/mine", results={"linear_probe_top1": 0.9})
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    job = {
        "linear_probe_top1": 0.95,
        "linear_probe_top5": 1.0,
        "random_init_linear_probe_top1": 0.3,
    }
    a_job(tmp_path / "jobs/probe", tmp_path / "link/mine", results=job)
    a_job(tmp_path / "jobs/early", run, step=40, results={"linear_probe_top1": 0.99})
    shots = {"fewshot_5_top1": 0.62, "fewshot_5_ci95": 0.004, "fewshot_5_images": 3}
    a_job(tmp_path / "jobs/shots", "/elsewhere/other", kind="fewshot", results=shots)
    page = read(run, tmp_path / "jobs")
    head = page.rows.index(page.row("mine")) - 2
    assert page.rows[head] == ["", "at the end of pretraining", "linear probe", "few labels"]
    titles = ["", "linear probe, top-1", "top-1", "top-5", "5 per class, top-1"]
    assert page.rows[head + 1] == titles
    # The closing probe and the job's are two measures; the earlier checkpoint has its own row.
    assert page.of_table("mine") == [
        ["mine", "90.0", "95.0", "100.0", "–"],  # noqa: RUF001
        ["mine step 40", "–", "99.0", "–", "–"],  # noqa: RUF001
    ]
    assert page.row("never trained") == ["never trained", "", "30.0", "", ""]
    other = page.row("other")
    assert "run not among those given" in other[0] and other[-1] == "62.0 95 % CI: 0.4"
    assert "<strong" not in (tmp_path / "page.html").read_text()  # an early step can't be the best


def test_of_a_run_that_is_not_given_only_the_newest_step_can_be_the_best(tmp_path, read):
    for step, value in ((40, 0.99), (80, 0.7), (60, 0.8)):
        folder = tmp_path / f"step {step}"
        a_job(folder, "/elsewhere/one", kind="knn", step=step, results={"knn_top1": value})
    a_job(tmp_path / "two", "/elsewhere/two", kind="knn", results={"knn_top1": 0.5})
    page = read(tmp_path)
    assert [row[1] for row in page.of_table("one")] == ["99.0", "80.0", "70.0"]
    bold = re.findall(r"<strong[^>]*>([^<]*)", (tmp_path / "page.html").read_text())
    assert bold == ["70.0"]


def test_jobs_of_seeds_are_averaged_over_runs_and_differing_jobs_stand_apart(tmp_path, read):
    for seed, value in ((0, 0.6), (1, 0.8)):
        run = a_run(tmp_path / f"r/seed_{seed}", seed=seed, results={"knn_top1": 0.5})
        for again in (0, 1):
            results = {"finetune_top1": value + 0.1 * again}
            fields = {"kind": "finetune", "seed": again, "data": {"fraction": 0.1}}
            a_job(run / f"tune_{again}", run, results=results, **fields)
        results = {"finetune_top1": 0.9}
        a_job(run / "all", run, kind="finetune", results=results, data={"fraction": 1.0})
    page = read(tmp_path / "r")
    first, *groups = page.rows[page.rows.index(page.row("r")) - 2][2:]
    assert first == "at the end of pretraining"
    # Runs' means 0.65 and 0.85.
    cells = dict(zip(groups, page.row("r")[3:], strict=True))
    assert cells == {
        "fine-tuning (fraction 0.1)": "75.0 ± 14.1",
        "fine-tuning (fraction 1)": "90.0 ± 0.0",
    }


def test_a_job_that_watches_is_a_curve_and_its_newest_step_is_in_the_table(tmp_path, read):
    run = a_run(tmp_path / "run", results={"knn_top1": 0.9})
    job = a_job(tmp_path / "follow", run, kind="knn", results={"knn_top1": 0.7})
    for step, value in ((20, 0.6), (60, 0.8), (100, 0.7)):
        put(job / f"step_{step:08d}/results.json", {"step": step, "knn_top1": value})
    page = read(run, job)
    assert page.row("run") == ["run", "90.0", "70.0"]
    (curve,) = [a for t, a in page.tags if t == "g" and "curve" in (a.get("class") or "")]
    assert (curve["data-steps"], curve["data-values"]) == ("20,60,100", "60,80,70")
    assert "run-0" in curve["class"] and curve["data-name"] == "run"


def test_how_a_job_follows_its_run_makes_no_other_measure_of_it(tmp_path, read):
    ways = ({"follow": True, "follow_poll_seconds": 3.0}, {"follow": False}, {"watch": True})
    runs = [a_run(tmp_path / name, batch_size=i) for i, name in enumerate("abc")]
    for run, fields in zip(runs, ways, strict=True):
        a_job(run / "job", run, kind="knn", results={"knn_top1": 0.7}, **fields)
    page = read(*runs)
    assert [page.row(name)[1:] for name in "abc"] == [["70.0"]] * 3


def test_what_earlier_versions_wrote_is_shown_alike(tmp_path, read):
    """Their configs have `found` in place of `data_info`; nothing else tells the job's step."""
    run = a_run(tmp_path / "mine", results={"knn_top1": 0.9})
    nowhere = {"knn_top1": 0.7, "run": None, "step": None}
    job = a_job(tmp_path / "job", run, kind="knn", step=1040, results=nowhere)
    pages = [read(run, job)]
    for folder in (run, job):
        config = json.loads((folder / "config.json").read_text())
        config["found"] = config.pop("data_info")
        put(folder / "config.json", config)
    pages.append(read(run, job))
    for page in pages:
        assert page.of_table("mine")[:2] == [
            ["mine", "90.0", "–"],  # noqa: RUF001
            ["mine step 1,040", "–", "70.0"],  # noqa: RUF001
        ]
        assert "4,000" in next(row for row in page.rows if "BYOL" in row)


def test_what_a_run_lacks_is_told(tmp_path, read):
    a_run(tmp_path / "going", lines=[{"step": 20, "loss": 2.0}, {"step": 40, "loss": 1.0}])
    a_run(tmp_path / "done", results={"collapsed": True, "collapsed_at_step": 60}, epochs=3.0)
    page = read(tmp_path)
    assert "Not finished: going" in page.text and "No curves (no metrics.jsonl): done" in page.text
    rows = {row[0]: row for row in page.rows if row}
    assert "step 40" in rows["going"] and "yes, by step 60" in rows["done"]
    assert "What the encoders are worth" not in page.text


def test_broken_files_are_noted_and_left_out(tmp_path, read):
    run = a_run(tmp_path / "run", results={"knn_top1": 0.9}, lines=[{"step": 10, "loss": 1.0}])
    with open(run / "metrics.jsonl", "a") as f:
        f.write('{"step": 20, "lo\n[1]\n{"step": 30, "loss": 0.5}\n{"step": 40, "loss": 0.1')
    put(tmp_path / "deep/config.json", "[" * 99_999)
    put(run / "plots/view_pairs.png", b"no picture")
    job = a_job(tmp_path / "job", run, results={"linear_probe_top1": 0.8})
    put(job / "confusion.npz", b"no archive")
    put(tmp_path / "bad/config.json", "{")
    put(a_run(tmp_path / "half") / "results.json", '{"knn_')
    page = read(run, job, tmp_path)
    broken = [tmp_path / f"{name}/config.json" for name in ("bad", "deep")]
    for path in (run / "plots/view_pairs.png", job / "confusion.npz", *broken):
        assert f"{path}: " in page.text
    assert f"{run}/metrics.jsonl: lines 2, 3 cannot be read" in page.text
    assert f"{tmp_path}/half/results.json: cannot be read" in page.text
    assert page.row("run") == ["run", "90.0", "80.0"]
    (curve,) = [a for t, a in page.tags if t == "g" and "curve" in (a.get("class") or "")]
    assert (curve["data-steps"], curve["data-values"]) == ("10,30", "1,0.5")


def test_values_that_make_no_sense_are_left_out(tmp_path, read):
    results = {"knn_top1": float("nan"), "linear_probe_top1": "x", "fewshot_top1": 7, "steps": [1]}
    lines = [{"step": 10, "loss": float("nan")}, {"step": 20, "loss": 10**400, "odd": None}]
    fields = {"epochs": float("inf"), "batch_size": None, "images_per_second": True}
    a_run(tmp_path / "odd", results=results | fields, lines=lines, **fields)
    a_run(tmp_path / "good", results={"knn_top1": 0.9, "random_init_knn_top1": 7.0})
    page = read(tmp_path)
    assert page.row("good")[1] == "90.0" and not page.of_table("odd")
    assert not page.of_table("never trained")


def test_the_page_needs_nothing_from_outside_and_all_text_is_escaped(tmp_path, read):
    lines = [{"step": step, "loss": 1.0, f"odd{EVIL}/{EVIL}": 2.0} for step in (10, 20)]
    fields = {"note": EVIL, "lines": lines, "results": {"knn_top1": 0.9, EVIL: EVIL}}
    run = a_run(tmp_path / f"run {EVIL.replace('/', '')}", **fields)
    a_run(tmp_path / "other", note="plain")
    put(run / f"plots/{EVIL.replace('/', '')}.png", PNG)
    put(run / "plots/learning_curves.png", PNG)
    names = [EVIL, "]]>&'\"", "\u202edrow"]
    metric = {"transfer_pets": 0.5, "transfer_pets_metric": EVIL}
    job = a_job(tmp_path / "job", run, kind=EVIL, results=metric, checkpoint=EVIL)
    np.savez(job / "confusion.npz", matrix=np.full((3, 3), 4), class_names=names)
    page = read(run, tmp_path / "other", job, title=EVIL)
    assert page.text.count(EVIL) >= 8
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [
        {}
    ]  # the page's own
    assert not {"link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not any(name.startswith("on") or name == "href" for name in attributes)
    sources = [a["src"] for _, a in page.tags if "src" in a]
    assert len(sources) == 1 and sources[0].startswith("data:image/png;base64,")
    (picture,) = [a for tag, a in page.tags if tag == "img"]
    assert (picture["width"], picture["height"]) == ("3", "2")
    text = (tmp_path / "page.html").read_text()
    assert not re.search(r"https?://|@import|url\(", text)


def test_a_confusion_matrix_lists_what_is_taken_for_what(tmp_path, read):
    matrix = [[8, 2, 0], [0, 10, 0], [1, 4, 5]]
    job = a_job(tmp_path / "job", None, results={"knn_top1": 0.7})
    np.savez(job / "confusion.npz", matrix=matrix, class_names=["cat", "dog", "cow"])
    page = read(job)
    assert "23 of 30 right" in page.text
    start = page.rows.index(["true", "taken for", "images", "of its class"])
    pairs = [
        ["cow", "dog", "4", "40.0 %"],
        ["cat", "dog", "2", "20.0 %"],
        ["cow", "cat", "1", "10.0 %"],
    ]
    assert page.rows[start + 1 : start + 4] == pairs
    assert ["best", "dog", "10", "100.0 %"] in page.rows
    assert ["worst", "cow", "10", "50.0 %"] in page.rows
    assert page.classes("g").count("hit") == 3 and page.classes("g").count("miss") == 3


def test_many_classes_are_only_listed(tmp_path, read):
    job = a_job(tmp_path / "job", None)
    matrix = np.diag(np.full(50, 3))
    matrix[7, 9] = 2
    np.savez(job / "confusion.npz", matrix=matrix, class_names=[f"n{i}" for i in range(50)])
    page = read(job)
    assert ["n7", "n9", "2", "40.0 %"] in page.rows
    assert "hit" not in page.classes("g")


def test_only_fields_that_differ_are_in_the_table_of_configs(tmp_path, read):
    a_run(tmp_path / "a", optimizer={"name": "lars", "rate": 0.2})
    a_run(tmp_path / "b", seed=1, optimizer={"name": "lars", "rate": 0.45}, queue=16)
    page = read(tmp_path)
    start = page.rows.index(["", "a", "b"])
    assert page.rows[start + 1 : start + 3] == [
        ["optimizer.rate", "0.2", "0.45"],
        ["queue", "–", "16"],  # noqa: RUF001
    ]
    assert not any(row[:1] in (["seed"], ["data.dir"], ["log_every_steps"]) for row in page.rows)


def test_a_sweep_gives_names_and_runs_that_are_only_in_its_record(tmp_path, read):
    sweep = tmp_path / "sweep"
    a_run(sweep / "with_queue/seed_0", results={"knn_top1": 0.9})
    entry = {
        "seed": 0,
        "jax": "0.1",
        "config": {"job": "pretrain", "method": "moco", "data.name": "x"},
    }
    put(
        sweep / "runs.json",
        {
            "with_queue/seed_0": {**entry, "variant": "with_queue", "results": {"knn_top1": 0.9}},
            "gone/seed_0": {**entry, "variant": "gone", "results": {"knn_top1": 0.4, "steps": 7}},
            "wild/seed_0": {**entry, "variant": "wild", "results": {"diverged": "loss was nan"}},
        },
    )
    page = read(sweep)
    assert page.row("with queue")[1] == "90.0" and page.row("gone")[1] == "40.0"
    assert any(row[0] == "wild" and "(loss was nan)" in " ".join(row) for row in page.rows if row)


def test_curves_are_drawn_to_scale():
    nan = float("nan")
    steps, values = [0, 10, 20, 30, 40], [0.0, 0.5, nan, 1.0, 1.0]
    drawn = charts.panel("%", [charts.Curve(steps, values, 0, "x")], 40, percent=True, log=False)
    (line,) = drawn.lines
    assert line.values == "0,50,,100,100"
    assert line.path.count("M") == 2  # what is no number breaks the curve
    places = dict(zip((0, 0.5, 1), sorted({y for _, y in line.dots}, reverse=True), strict=True))
    assert places[0] + places[1] == pytest.approx(2 * places[0.5], abs=0.11)
    assert next(t.at for t in drawn.y_ticks if t.text == "100") == pytest.approx(
        places[1], abs=0.11
    )
    assert line.dots[0][0] == charts.LEFT and line.dots[-1][0] == charts.WIDTH - charts.RIGHT
    flat = charts.panel("", [charts.Curve([5], [0.0], 0, "x")], 40, percent=False, log=True)
    assert charts.TOP < flat.lines[0].dots[0][1] < charts.HEIGHT - charts.BOTTOM


def test_a_long_curve_keeps_its_ends_and_extremes():
    values = [1.0] * 5000
    values[1234], values[4321] = 9.0, -9.0
    curve = charts.Curve(range(5000), values, 0, "x")
    (line,) = charts.panel("", [curve], 4999, percent=False, log=False).lines
    steps = [int(step) for step in line.steps.split(",")]
    assert len(steps) < 300 and steps == sorted(steps)
    assert {0, 1234, 4321, 4999} <= set(steps)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (0.12, 0.31, [0.1, 0.15, 0.2, 0.25, 0.3, 0.35]),
        (3, 3, [3]),
    ],
)
def test_ticks_are_round(low, high, ticks):
    assert charts.nice_ticks(low, high) == pytest.approx(ticks)


def test_a_page_that_cannot_be_made_leaves_the_old_one(tmp_path):
    run = a_run(tmp_path / "run")
    old = '<meta name="generator" content="selfsup_jax.report">'
    put(tmp_path / "page.html", old)
    with pytest.raises(UserError, match="does not exist"):
        report.write([str(run), str(tmp_path / "none")], str(tmp_path / "page.html"))
    assert (tmp_path / "page.html").read_text() == old
    with pytest.raises(UserError, match="cannot be written"):
        report.write([str(run)], str(tmp_path / "no/folder/page.html"))
    report.write([str(run)], str(tmp_path / "page.html"))
    assert sorted(os.listdir(tmp_path)) == ["page.html", "run"]


def command(*arguments):
    """Runs the module as a user does, after code that tells what it has imported."""
    code = (
        "import runpy, sys, atexit; sys.argv[0] = 'report'\n"
        "heavy = {'jax', 'tensorflow', 'clu', 'matplotlib', 'sklearn', 'orbax'}\n"
        "atexit.register(lambda: print('heavy:', sorted(heavy & set(sys.modules))))\n"
        "runpy.run_module('selfsup_jax.report', run_name='__main__')"
    )
    process = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(process, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


def test_the_command_line(tmp_path):
    run = a_run(tmp_path / "run", results={"knn_top1": 0.9})
    done = command(run, f"--output={tmp_path}/out.html", "--title=Two words")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"wrote {tmp_path}/out.html" in done.stdout and "1 run" in done.stdout
    assert "heavy: []" in done.stdout
    assert "<h1>Two words</h1>" in (tmp_path / "out.html").read_text()
    empty = tmp_path / "empty"
    empty.mkdir()
    for wrong in (empty, tmp_path / "none"):
        failed = command(run, wrong, f"--output={tmp_path}/never.html")
        assert failed.returncode == 2
        assert failed.stderr.startswith(f"error: {wrong}: ") and failed.stderr.count("\n") == 1
    assert not (tmp_path / "never.html").exists()


def falling(first: float, last: float) -> list[dict]:
    values = {"projection_std": 0.8, "effective_rank": 9.0, "knn_top1": 0.9}
    return [
        {"step": 10 * i, "loss": loss, **values, "wall_time": 1.8e9 + i}
        for i, loss in enumerate(np.linspace(first, last, 10).tolist(), start=1)
    ]


def test_the_page_begins_with_what_came_of_it(tmp_path, read):
    a = {"linear_probe_top1": 0.9, "random_init_linear_probe_top1": 0.6}
    a_run(tmp_path / "a", results=a, lines=falling(4, 1))
    page = read(tmp_path / "a")
    worth = "On digits, the linear probe (top-1) of a is 90.0 %, against 60.0 % for its encoder"
    assert worth in page.text
    said = "The run learned: linear probe 90.0 %, never trained 60.0 %, the loss fell from 4 to 1"
    assert said in page.text
    a_run(tmp_path / "b", method="moco", results={"linear_probe_top1": 0.8}, lines=falling(9, 8))
    for name, (first, last) in (("plain", (4, 1)), ("flat", (4, 4))):
        path = a_run(tmp_path / name, results={}, lines=falling(first, last))
        config = json.loads((path / "config.json").read_text())
        put(path / "config.json", config | {"data_info": {"train_images": 640, "classes": None}})
    page = read(tmp_path)
    assert "On digits, the best linear probe (top-1) is that of a: 90.0 %" in page.text
    assert "next is b with 80.0 %. No run collapsed; " in page.text
    assert "plain: learned, as far as its loss can tell" in page.text
    assert "flat: shows no clear sign in its loss that it learned" in page.text
    assert "Not measured, as their data has no labels: flat, plain." in page.text
    # Losses of two methods are not compared; kNN has its settings.
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", (tmp_path / "page.html").read_text())
    assert "loss: BYOL" in titles and "loss: MoCo" in titles and "loss" not in titles
    assert not [title for title in titles if "wall" in title]
    overview = {row[0]: row for row in page.rows if len(row) > 8}
    assert overview["plain"][4:7] == [
        "2 epochs",
        "100",
        "10",
    ]  # of 10 steps, not what was asked for
    assert not [a for tag, a in page.tags if tag == "img" and "loading" in a]


def test_a_column_of_neighbours_says_how_many(tmp_path):
    for name, k in (("a", 20), ("b", 20), ("c", 200)):
        results = {
            "steps": 8,
            "knn_top1": 0.9,
            "knn_k": k,
            "knn_temperature": 0.1,
            "linear_probe_top1": 0.9,
        }
        put(tmp_path / name / "config.json", {"job": "pretrain", "method": name, "seed": 0})
        put(tmp_path / name / "results.json", results)
    for names, heading in (
        ("ab", "k 20, temperature 0.1"),
        ("abc", "k 20 or 200, temperature 0.1"),
    ):
        report.write([str(tmp_path / name) for name in names], str(tmp_path / "page.html"))
        text = (tmp_path / "page.html").read_text()
        assert f"kNN, top-1, {heading}, %" in text
        assert "linear probe, top-1" in text and "linear probe, top-1, k" not in text
