"""Who may import whom: `CONTRIBUTING.md`'s rules of the house."""

from __future__ import annotations

import ast
import functools
import sys

from conftest import REPOSITORY

from selfsup_jax.devices import parallel

# Words, not choices: the methods' names as people write them, what styles of heads were called, and
# which method trained the checkpoints of its authors.
METHODS_NAMED_IN = {
    *("selfsup_jax/viz/report/recipes.py", "selfsup_jax/run/identity.py"),
    *(f"selfsup_jax/interop/from_{name}.py" for name in ("byol", "simclr", "torch")),
}
METHODS = sorted(p.name for p in REPOSITORY.glob("*_jax") if p.is_dir() and p.name != "selfsup_jax")


@functools.cache
def parsed():
    """{path: all nodes of its syntax tree, as a tuple}."""
    return {
        path.relative_to(REPOSITORY): tuple(ast.walk(ast.parse(path.read_text())))
        for root in (*METHODS, "selfsup_jax", "configs", "run_experiment.py")
        for path in sorted([REPOSITORY / root] + list((REPOSITORY / root).rglob("*.py")))
        if path.is_file()
    }


@functools.cache
def imports(nodes):
    """Dotted names of all that a file imports, at its top or inside: `from a import b` is `a.b`."""
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def importers(*packages):
    """The files that import one of the packages (or names in them)."""
    return {
        str(path)
        for path, nodes in parsed().items()
        if any(name == p or name.startswith(p + ".") for name in imports(nodes) for p in packages)
    }


@functools.cache
def attributes(nodes):
    """`{"pmap", ...}`: every name that is looked up in something, or imported from it."""
    looked_up = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return looked_up | {name.rpartition(".")[2] for name in imports(nodes)}


def test_methods_are_found_by_name_alone():
    """Nothing imports one, save another by its pure loss."""
    assert {"byol_jax", "moco_jax", "simclr_jax"} <= set(METHODS)
    for name in METHODS:
        assert {path.split("/")[0] for path in importers(f"{name}.method")} <= {name}
        assert not [p for p in importers(name) if not p.split("/")[0].endswith("_jax")]
        assert not [p for p in importers(name) if p.startswith("selfsup_jax/")]
    strings = {
        str(path): {n.value for n in nodes if isinstance(n, ast.Constant)}
        for path, nodes in parsed().items()
        if path.parts[0] in ("selfsup_jax", "run_experiment.py")
    }
    named = {name.removesuffix("_jax") for name in METHODS}
    assert {path for path, found in strings.items() if found & named} <= METHODS_NAMED_IN


def test_nothing_imports_the_entry_point():
    assert not importers("run_experiment")


def test_configs_import_only_ml_collections_and_each_other():
    allowed = {"ml_collections", "configs", *sys.stdlib_module_names}
    found = {
        name.split(".")[0]
        for path, nodes in parsed().items()
        if path.parts[0] == "configs"
        for name in imports(nodes)
    }
    assert "ml_collections" in found and found <= allowed


def test_tensorflow_is_only_in_the_data_package():
    """And set up by one file, from which the others have it."""
    assert importers("tensorflow") == {"selfsup_jax/data/host_tensorflow.py"}
    users = importers("selfsup_jax.data.host_tensorflow", "tensorflow_datasets")
    assert "selfsup_jax/data/tfds.py" in users
    assert all(path.startswith("selfsup_jax/data/") for path in users)
    assert importers("tensorflow_datasets") <= importers("selfsup_jax.data.host_tensorflow")


def test_only_parallel_and_collectives_know_devices():
    """`parallel.py` maps over them, `collectives.py` is what they tell each other in a step."""
    talk = {
        *("pmean", "psum", "pmax", "pmin", "all_gather", "all_to_all", "ppermute", "pshuffle"),
        *("psum_scatter", "axis_index", "axis_size"),
    }
    for names, home in (({"pmap", "shard_map"}, "parallel"), (talk, "collectives")):
        users = {str(path) for path, nodes in parsed().items() if attributes(nodes) & names}
        assert users == {f"selfsup_jax/devices/{home}.py"}


def test_the_axis_is_named_in_one_place():
    for path, nodes in parsed().items():
        if path.name == "parallel.py":
            assert "AXIS_NAME" in {n.id for n in nodes if isinstance(n, ast.Name)}
            continue
        strings = {n.value for n in nodes if isinstance(n, ast.Constant)}
        assert parallel.AXIS_NAME not in strings, path
        assert "AXIS_NAME" not in attributes(nodes), path


def test_flags_are_only_in_the_entry_point():
    assert importers("absl.flags", "absl.app", "ml_collections.config_flags") == {
        "selfsup_jax/data/grain_reader.py",  # tells Grain that its flags are read
        "run_experiment.py",
    }


def test_the_mathematics_sees_no_config_and_does_no_input_or_output():
    pure = [
        path
        for path in parsed()
        if path.name
        in ("losses.py", "v3_losses.py", "keys.py", "negatives.py", "augment.py", "blur.py")
        or path.parts[:2] == ("selfsup_jax", "models")
    ]
    named = {path.name for path in pure}
    assert {"losses.py", "v3_losses.py", "keys.py", "negatives.py", "heads.py"} <= named
    # A `check(config)` takes the config that it is given, by `checks` alone.
    ours = ("checks", "errors", "state", "method", "data.augment", "data.blur", "data.views")
    ours += ("devices.collectives", "models")
    for path in pure:
        names = imports(parsed()[path])
        packages = {name.split(".")[0] for name in names}
        assert not packages & {"ml_collections", "configs", "os", "pathlib", "json", "absl"}, path
        for name in names:
            within = name.removeprefix("selfsup_jax.")
            assert within == name or any(f"{within}.".startswith(f"{o}.") for o in ours), path
        calls = {
            node.func.id
            for node in parsed()[path]
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not calls & {"open", "print"}, path


def test_a_workdir_may_be_in_a_bucket():
    """What lies in one is looked at with `paths` and written with `run/files.py`."""
    folders = {"evaluation", "jobs", "run", "training", "viz", "verify.py"}
    on_disk = {
        f"selfsup_jax/run/{name}.py" for name in ("events", "files", "library_errors", "lock")
    }
    on_disk.add("selfsup_jax/training/reference.py")
    for path, nodes in parsed().items():
        if path.parts[0] != "selfsup_jax" or path.parts[1] not in folders or str(path) in on_disk:
            continue
        calls = {ast.unparse(n.func) for n in nodes if isinstance(n, ast.Call)}
        local = ("open", "os.listdir", "os.makedirs", "os.remove", "os.rename", "os.replace")
        local += ("os.walk", "os.path.abspath", "os.path.exists", "os.path.isdir")
        local += ("os.path.realpath", "glob.glob", "shutil.rmtree")
        assert not calls & set(local), path


def test_one_step_of_a_method_is_four_files_and_500_lines():
    """And `CONTRIBUTING.md` has the counts."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text().split("Lines in all: ")[1].split(".")[0]
    written = dict(entry.rsplit(" ", 1) for entry in text.split(", "))
    counted = {}
    files = {
        name.removesuffix("_jax"): (f"{name}/losses.py", f"{name}/method.py") for name in METHODS
    }
    files["moco_v3"] = ("moco_jax/v3_losses.py", "moco_jax/v3.py")
    for name, own in files.items():
        keys = REPOSITORY / f"{name}_jax/keys.py"
        last = keys if keys.exists() else "selfsup_jax/models/network.py"
        read = (*own, "selfsup_jax/method.py", last)
        lines = sum(len((REPOSITORY / file).read_text().splitlines()) for file in read)
        counted[name] = str(lines)
        assert lines <= 500, name
    assert {name.lower().replace(" ", "_"): lines for name, lines in written.items()} == counted
