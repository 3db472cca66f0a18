"""Every field of every config: a wrong type, NaN, infinity and huge numbers are refused."""

from __future__ import annotations

import math

import pytest
from command_lines import check_config, config_of, presets

from selfsup_jax import checks
from selfsup_jax.errors import UserError

NAN, INF = math.nan, math.inf
NOT_NUMBERS = (NAN, INF, -INF, 2**70, -(2**70), 1e300)
WRONG_TYPES = {
    bool: ("yes", 1, 0.5),
    int: ("3", True, 2.5, (1,)),
    float: ("3", True, (1.0,)),
    str: (3, True, ("a",), b"a"),
    tuple: ("a", 3, True, (None,), (NAN,), (INF,), (2**70,), ((),)),
    type(None): ("3", True, (1,)),  # a placeholder
}
PERHAPS = (-1, -0.5, 0, 0.0, 1, 3, 10**18, "", "no such", (), (1, 1), (0.5,), ("(",), ("a", "b"))

CASES = [(path, preset) for path, names in presets().items() for preset in names]
RUNS = [case for case in CASES if config_of(*case).job == "pretrain"]
PRETRAINING = {config_of(*case).method: case for case in reversed(RUNS)}
OTHERS = {
    "/".join(case): case
    for case in CASES
    if case not in RUNS and (config_of(*case).job != "sweep" or case[1] == presets()[case[0]][0])
}


@pytest.mark.parametrize("case", CASES, ids=":".join)
def test_every_preset_is_accepted(case):
    check_config(config_of(*case))


def own_or_first(sweep) -> set[str]:
    """The fields of a sweep, and some of its first variant."""
    own = {field for field, _ in checks.leaves(sweep) if not field.startswith("variants.")}
    some = ("batch_size", "optimizer.learning_rate", "views.global.area", "data.name")
    return own | {f"variants.{sweep.only[0]}.{field}" for field in some}


def refusal(config, field: str, value) -> str | None:
    """What is told about a config with that value; None if it is accepted."""
    *sections, leaf = field.split(".")
    holder = config
    for section in sections:
        holder = holder[section]
    good = holder[leaf]
    del holder[leaf]  # a field that is there is converted to its type
    holder[leaf] = value
    try:
        check_config(config)
    except UserError as e:
        return str(e)
    finally:
        del holder[leaf]
        holder[leaf] = good
    return None


@pytest.mark.parametrize("name", [*PRETRAINING, *OTHERS])
def test_every_field_refuses_what_it_cannot_be(name):
    """In one line with its name; a value that may be meant does not end in another error."""
    config = config_of(*(PRETRAINING | OTHERS)[name]).copy_and_resolve_references().unlock()
    fields = dict(checks.leaves(config))
    shared = dict(checks.leaves(config_of(*PRETRAINING["byol"])))
    if config.job == "pretrain" and name != "byol":
        fields = {field: good for field, good in fields.items() if field not in shared}
    if config.job == "sweep":  # a variant is checked as a run is
        some = own_or_first(config)
        fields = {field: good for field, good in fields.items() if field in some}
    for field, good in fields.items():
        for value in (*NOT_NUMBERS, *WRONG_TYPES[type(good)]):
            if good is None and value is True and field == "data.exif_orientation":
                continue  # of a job, where it is the run's
            told = refusal(config, field, value)
            assert told is not None, (field, value)
            assert told.startswith(f"config.{field}={value!r}: ") and "\n" not in told, told
        for value in PERHAPS:
            told = refusal(config, field, value)
            assert told is None or (told.startswith("config.") and "\n" not in told), told


def test_none_is_only_for_placeholders():
    for case in (PRETRAINING["byol"], *OTHERS.values()):
        config = config_of(*case).copy_and_resolve_references().unlock()
        for field, good in list(checks.leaves(config)):
            if good is not None and not field.startswith("variants."):
                assert refusal(config, field, None) or field.split(".")[-1] in MAY_BE_NONE, field


MAY_BE_NONE = ("epochs", "warmup_epochs")  # if the steps are given


def test_a_field_that_is_not_known_is_checked_too():
    config = config_of("configs/byol.py", "demo").copy_and_resolve_references().unlock()
    config.mine = 3.0
    for value in (NAN, -INF, 2**70, (1.0, INF)):
        assert refusal(config, "mine", value).startswith(f"config.mine={value!r}: must be")
    assert refusal(config, "mine", "anything") is None


def test_a_field_that_is_missing_is_named():
    config = config_of("configs/byol.py", "demo").copy_and_resolve_references().unlock()
    del config.data.name
    with pytest.raises(UserError, match=r"^config\.data\.name: is missing"):
        check_config(config)
