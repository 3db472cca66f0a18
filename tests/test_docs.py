"""The README and the documents: links lead somewhere, commands are valid, Python runs."""

from __future__ import annotations

import functools
import importlib
import json
import re
import runpy
import shlex
import sys

import command_lines
import pytest
from conftest import REPOSITORY

from configs import cifar10_methods, parsing
from selfsup_jax import command_line, console
from selfsup_jax.training import sweep_table

PAGES = sorted(
    [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")]
    + list((REPOSITORY / "docs").glob("*.md"))
)


def ids(page):
    return str(page.relative_to(REPOSITORY))


def test_the_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        path, _, anchor = link.partition("#")
        if path.startswith(("http:", "https:", "mailto:")):
            continue
        target = (page.parent / path) if path else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"(?m)^#+ (.*)$", target.read_text())
            anchors = [re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles]
            assert anchor in anchors, link


def commands():
    """(page, command, comment) of all blocks that are no program's output.

    A command begins with its program: what starts it, such as `srun`, is left out.
    """
    program = r"(?:^|[\s\"'])(python (?:run_experiment|-m ).*)|^((?:selfsup|make) .*)"
    for page in PAGES:
        for block in re.findall(r"```(?:sh|bash)?\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words, comment = re.fullmatch(r"\s*(.*?)(?:\s+#\s(.*))?", line).groups("")
                if found := re.search(program, words):
                    yield page, found[1] or found[2], comment


@pytest.mark.parametrize(
    ("page", "line"),
    [
        pytest.param(page, line, id=f"{page.stem}-{i}")
        for i, (page, line, _) in enumerate(commands())
    ],
)
def test_a_command_is_valid(page, line, monkeypatch):
    """Flags, fields and presets exist and fit together; nothing is run."""
    line = re.split(" (?:&&|>|&|\\.\\.\\.)", line.replace('"$@"', ""))[0]
    for quote in "'\"":
        if line.count(quote) % 2:  # the end of a longer command
            line = line.rstrip(quote)
    words = shlex.split(line)
    if words[0] == "make":
        targets = re.findall(r"(?m)^([\w-]+):", (REPOSITORY / "Makefile").read_text())
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
        return
    if words[0] == "selfsup" and words[1] in console._MODULES:
        module = console._MODULES[words[1]]
        given = words[1:] if words[1] == "import" else words[2:]
        return _parsed(module, given, monkeypatch)
    if words[1] == "-m":
        return _parsed(words[2], words[3:], monkeypatch)
    if words[0] == "selfsup" and console.run(argv := list(words)) == 0:
        return
    words = argv if words[0] == "selfsup" else words[1:]
    if words[1:]:  # else the rest is left to the reader: `...`
        command_lines.check(*(re.sub(r"\$\w+", "1", word) for word in words[1:]))


class Parsed(Exception):
    pass


def _parsed(module, words, monkeypatch):
    """A module's parser takes the words."""
    parse = command_line.Parser.parse_args

    def parse_only(self, args=None, namespace=None):
        parse(self, words, namespace)
        raise Parsed

    path = REPOSITORY / f"{module.replace('.', '/')}.py"
    path = path if path.exists() else path.with_suffix("") / "__main__.py"
    if module.startswith("benchmarks."):
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        source = path.read_text()
        own = {option for option in options if not option.startswith("--config")}
        assert all(f'"{option}"' in source or f'"{option[2:]}"' in source for option in own), own
        return
    monkeypatch.setattr(command_line.Parser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", [module, *words])
    with pytest.raises(Parsed):
        runpy.run_path(str(path), run_name="__main__")


@functools.cache
def all_fields():
    configs = [
        command_lines.config_of(path, name)
        for path, names in command_lines.presets().items()
        for name in names
    ]
    return {field for config in configs for field in parsing.field_names(config)}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_fields_that_are_named_exist(page):
    text = page.read_text()
    named = set(re.findall(r"--config\.([\w.]+)=", text))
    named |= set(re.findall(r"`config\.((?:monitor|data|eval|optimizer|encoder)\.\w+)", text))
    fields = all_fields()
    sections = {name for name in named if any(field.startswith(f"{name}.") for field in fields)}
    assert named <= fields | sections, named - fields - sections


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_files_that_are_named_exist(page):
    """Such as `selfsup_jax/method.py:train_step`, and the name in it."""
    roots = "selfsup_jax|byol_jax|moco_jax|simclr_jax|simsiam_jax|configs|benchmarks|tests|docs"
    pattern = rf"`((?:{roots})/[\w/]+\.\w+)(?::(\w+))?"
    for path, name in re.findall(pattern, page.read_text()):
        if "METHOD" in path or "NAME" in path or "mine" in path:
            continue
        assert (REPOSITORY / path).exists(), path
        if name and path.endswith(".py") and not path.startswith("configs/"):
            module = importlib.import_module(path[:-3].replace("/", "."))
            assert hasattr(module, name), f"{path}:{name}"


def rows(text):
    """First cell -> the other cells, of all lines of all tables."""
    lines = [line[1:-1].split("|") for line in text.splitlines() if line.startswith("| ")]
    return {first.strip(): [cell.strip() for cell in rest] for first, *rest in lines}


def test_the_cifar10_results_are_those_of_the_stored_runs():
    folder = REPOSITORY / "benchmarks/results/cifar10"
    config = cifar10_methods.get_config()
    done = {variant: [] for variant in config.variants}
    for name, run in json.loads((folder / "runs.json").read_text()).items():
        done[name.partition("/")[0]].append(run)
    stored = rows(sweep_table.table(config, done, []))
    assert rows((folder / "table.md").read_text()) == stored
    stored.pop("")  # the titles
    assert len(stored) == 9
    results = {name: (cells[1], cells[2]) for name, cells in stored.items()}
    untrained = {(cells[3], cells[4]) for cells in stored.values()}

    page = rows((REPOSITORY / "docs/comparisons.md").read_text())
    page["DINO"] = page.pop("DINO, no small crops")
    assert {name: tuple(page[name]) for name in results} == results
    assert tuple(page["the encoder, never trained"]) in untrained

    readme = rows((REPOSITORY / "README.md").read_text())
    short = {name: short_pair(*pair) for name, pair in results.items() if name != "MoCo v1"}
    assert {name: readme[name][-1] for name in short} == short
    assert readme["never trained"][-1] in {short_pair(*pair) for pair in untrained}


def short_pair(linear, knn):
    """As README has them: kNN without its deviation."""
    return f"{linear.removesuffix(' %')}, {knn.partition(' ')[0]} %"
