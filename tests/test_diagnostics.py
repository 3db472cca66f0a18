"""The diagnostics against NumPy, written from their papers; and when a run counts as collapsed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfsup_jax import optim
from selfsup_jax.state import Outputs, all_finite
from selfsup_jax.training import diagnostics

ALWAYS = {"projection_std", "effective_rank", "prediction_target_cosine"}


def outputs(projection, representation=None, prediction=None, target=None) -> Outputs:
    """Of projections `[V, B, D]`; the rest is theirs too, where it isn't given."""
    projection = np.asarray(projection, np.float32)
    rest = [projection if x is None else x for x in (representation, prediction, target)]
    representation, prediction, target = (np.asarray(x, np.float32) for x in rest)
    return Outputs(representation, projection, prediction, target)


def diagnose(*args, pairs=None, max_rows: int = 512, **kwargs) -> dict[str, float]:
    """`pairs`: each prediction with the target of its own number, where they aren't given."""
    rows = outputs(*args, **kwargs)
    pairs = [(v, v) for v in range(len(rows.prediction))] if pairs is None else pairs
    return diagnostics.of_outputs(rows, pairs, max_rows)


def unit(x) -> np.ndarray:
    return np.asarray(x) / np.linalg.norm(x)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    """Not centred, so that a mean that is taken away or forgotten shows."""
    return np.random.default_rng(seed).normal(0.3, 1.0, shape)


# ------------------------------------------------------------------------------- one batch


def test_all_of_a_random_batch():
    z, y, q, t = draw(2, 7, 5), draw(2, 7, 4, seed=1), draw(2, 7, 5, seed=2), draw(2, 7, 5, seed=3)
    found = diagnose(z, y, q, t, pairs=((0, 1), (1, 0)))
    rows = [unit(z[v, i]) for v in range(2) for i in range(7)]
    std = [np.std([row[d] for row in rows]) for d in range(5)]
    cosines = [unit(q[v, i]) @ unit(t[1 - v, i]) for v in range(2) for i in range(7)]
    apart = [np.sum((unit(z[0, i]) - unit(z[1, i])) ** 2) for i in range(7)]
    pairs = [
        np.exp(-2 * np.sum((unit(z[0, i]) - unit(z[0, j])) ** 2))
        for i in range(7)
        for j in range(7)
        if i != j
    ]
    s = np.linalg.svd(y.reshape(14, 4), compute_uv=False)
    p = s / s.sum()
    expected = {
        "projection_std": np.mean(std) * np.sqrt(5),
        "effective_rank": np.exp(-np.sum(p * np.log(p))),
        "prediction_target_cosine": np.mean(cosines),
        "alignment": np.mean(apart),
        "uniformity": np.log(np.mean(pairs)),
    }
    assert found.keys() == expected.keys() and {type(v) for v in found.values()} == {float}
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


def test_lengths_do_not_matter_but_to_the_rank():
    z, q = draw(2, 6, 3), draw(2, 6, 3, seed=1)
    lengths = np.random.default_rng(2).uniform(0.01, 100, (2, 6, 1))
    found, scaled = diagnose(z, z, q, z), diagnose(z * lengths, z, q * lengths, z / lengths)
    for name, value in found.items():
        np.testing.assert_allclose(scaled[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("dimensions", [2, 16])
def test_spread_is_one_all_over_the_sphere_and_zero_at_a_point(dimensions):
    axes = np.concatenate([np.eye(dimensions), -np.eye(dimensions)])
    np.testing.assert_allclose(diagnose([axes, axes])["projection_std"], 1.0, rtol=1e-6)
    point = np.broadcast_to(draw(dimensions), (2, 9, dimensions))
    assert diagnose(point)["projection_std"] < 1e-6
    # Opposite ends of one line: 1 / D in each of the dimensions but for the one that it lies in.
    line = np.stack([np.eye(dimensions)[0], -np.eye(dimensions)[0]])
    np.testing.assert_allclose(
        diagnose([line, line])["projection_std"], 1 / np.sqrt(dimensions), rtol=1e-6
    )


def test_spread_is_over_both_views():
    """Each view at a point of its own: far from a single point."""
    views = np.stack([np.tile([1.0, 0.0], (5, 1)), np.tile([0.0, 1.0], (5, 1))])
    np.testing.assert_allclose(diagnose(views)["projection_std"], 0.5 * np.sqrt(2), rtol=1e-6)


def test_cosine_of_prediction_and_target():
    views = [[[1.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [0.0, 4.0]]]
    targets = [[[5.0, 0.0], [0.0, -1.0]], [[0.0, 1.0], [1.0, 1.0]]]
    found = diagnose(views, prediction=views, target=targets)
    np.testing.assert_allclose(
        found["prediction_target_cosine"], (1 - 1 + 0 + np.sqrt(0.5)) / 4, rtol=1e-6
    )


@pytest.mark.parametrize(
    "pairs", [((0, 1), (1, 0), (2, 0), (2, 1)), ((2, 1),), ((0, 0), (1, 1)), ((1, 0), (1, 0))]
)
def test_the_pairs_say_which_prediction_is_compared_with_which_target(pairs):
    """Of three predictions and two targets; nothing else reads either."""
    z, y = draw(3, 6, 4), draw(3, 6, 5, seed=1)
    q, t = draw(3, 6, 4, seed=2), draw(2, 6, 4, seed=3)
    found = diagnose(z, y, q, t, pairs=pairs)
    expected = np.mean([unit(q[i, row]) @ unit(t[j, row]) for i, j in pairs for row in range(6)])
    np.testing.assert_allclose(found["prediction_target_cosine"], expected, rtol=1e-5)
    for name, value in diagnose(z, y).items():
        assert name == "prediction_target_cosine" or found[name] == value
    # All six means are different, so that another pair shows.
    each = [diagnose(z, y, q, t, pairs=((i, j),)) for i in range(3) for j in range(2)]
    assert len({round(one["prediction_target_cosine"], 4) for one in each}) == 6
    assert found.keys() == ALWAYS | {"alignment", "uniformity"}


@pytest.mark.parametrize("angle", [0.0, 0.1, np.pi / 2, np.pi])
def test_alignment_and_uniformity_of_two_images(angle):
    """Squared distance on the circle: 2 - 2 cos."""
    squared = 2 - 2 * np.cos(angle)
    here, there = [1.0, 0.0], [np.cos(angle), np.sin(angle)]
    found = diagnose([[here, there], [there, here]])
    np.testing.assert_allclose(found["alignment"], squared, rtol=1e-4, atol=1e-6)
    # Of the one pair of images, in the first view.
    np.testing.assert_allclose(found["uniformity"], -2 * squared, rtol=1e-4, atol=1e-6)


def test_an_images_own_views_are_no_pair_of_the_uniformity():
    here, there = [1.0, 0.0], [-1.0, 0.0]
    found = diagnose([[here, here, there], [here, here, there]])
    np.testing.assert_allclose(found["alignment"], 0.0, atol=1e-6)
    np.testing.assert_allclose(found["uniformity"], np.log((1 + 2 * np.exp(-8.0)) / 3), rtol=1e-5)


def test_what_takes_two_of_something_is_left_out():
    assert diagnose(draw(1, 4, 3)).keys() == ALWAYS | {"uniformity"}
    assert diagnose(draw(2, 1, 3)).keys() == ALWAYS | {"alignment"}


def test_only_the_first_examples_are_looked_at():
    z, y, q, t = draw(2, 8, 3), draw(2, 8, 4, seed=1), draw(2, 8, 3, seed=2), draw(2, 8, 3, seed=3)
    first = [x[:, :5] for x in (z, y, q, t)]
    rest = [np.concatenate([x, 1e3 + draw(2, 20, x.shape[-1], seed=4)], axis=1) for x in first]
    assert diagnose(*rest, max_rows=5) == diagnose(*first)
    assert diagnose(*rest, max_rows=6) != diagnose(*first)
    assert diagnose(*first, max_rows=5) == diagnose(*first)


def test_device_arrays_and_short_floats_will_do():
    z = draw(2, 4, 3)
    short = jnp.asarray(z, jnp.bfloat16)
    found = diagnostics.of_outputs(Outputs(short, short, short, short), ((0, 0), (1, 1)), 99)
    for name, value in diagnose(np.asarray(short, np.float32)).items():
        assert found[name] == value and np.isfinite(value)


def test_nothing_but_zeros_is_a_number_too():
    found = diagnose(np.zeros((2, 4, 3)))
    assert all(np.isfinite(value) for value in found.values())
    assert found["projection_std"] == 0 and found["effective_rank"] == 1


# ------------------------------------------------------------------------------- the rank


@pytest.mark.parametrize("singular", [(1.0,), (3.0, 2.0, 1.0), (5.0, 5.0, 0.0, 0.0), (1.0, 1e-9)])
def test_effective_rank_of_known_singular_values(singular):
    rng = np.random.default_rng(0)
    n = len(singular)
    left = np.linalg.qr(rng.normal(size=(9, n)))[0]
    right = np.linalg.qr(rng.normal(size=(6, n)))[0]
    shares = np.asarray([s for s in singular if s]) / sum(singular)
    expected = np.prod(shares**-shares)  # exp of the entropy
    for scale in (1e-4, 1.0, 1e6):
        x = (left * (scale * np.asarray(singular))) @ right.T
        np.testing.assert_allclose(diagnostics.effective_rank(x), expected, rtol=1e-4)


def test_effective_rank_at_its_ends():
    same = np.tile(draw(5), (20, 1))  # not centred: one point is one direction
    np.testing.assert_allclose(diagnostics.effective_rank(same), 1.0, rtol=1e-4)
    for rows in (1, 4, 9):
        np.testing.assert_allclose(diagnostics.effective_rank(3 * np.eye(9)[:rows]), rows, 1e-5)
    assert diagnostics.effective_rank(np.zeros((7, 3))) == 1.0
    assert isinstance(diagnostics.effective_rank(draw(4, 4)), float)


def test_effective_rank_lies_between_one_and_the_smaller_side():
    for shape in ((3, 50), (50, 3), (20, 20)):
        assert 1 < diagnostics.effective_rank(draw(*shape)) < min(shape)


# --------------------------------------------------------------------------- norms, finite


def tree(seed: int) -> dict:
    parts = {"encoder": ((3, 2), (4,)), "projector": ((2, 2),), "predictor": ((5,),)}
    return {
        part: {str(i): {"w": draw(*shape, seed=seed + i)} for i, shape in enumerate(shapes)}
        for part, shapes in parts.items()
    }


def norm(*trees) -> float:
    leaves = [x.ravel() for x in jax.tree.leaves(trees)]
    return np.sqrt(np.sum(np.concatenate(leaves) ** 2))


def test_norms():
    grads, updates = tree(0), tree(10)
    expected = {f"grad_norm/{part}": norm(grads[part]) for part in grads}
    expected["update_norm"] = norm(updates)
    found = jax.jit(optim.norms)(grads, updates)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == () and found[name].dtype == jnp.float32
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


def test_target_distance():
    online, target = tree(20), tree(30)
    del target["predictor"]  # it has no target
    followed = {part: online[part] for part in target}
    apart = jax.tree.map(lambda a, b: a - b, followed, target)
    np.testing.assert_allclose(
        diagnostics.target_distance(online, target), norm(apart) / norm(followed), rtol=1e-5
    )
    assert diagnostics.target_distance(online, followed) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_gradient_that_is_not_finite_shows_in_its_parts_norm(bad):
    updates, grads = tree(0), tree(0)
    grads["encoder"]["0"]["w"][2, 1] = bad
    found = optim.norms(grads, updates)
    assert not np.isfinite(found["grad_norm/encoder"])
    assert np.isfinite(found["grad_norm/projector"])
    assert all_finite(found) == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["loss", "probe_loss", "grad_norm/encoder"])
def test_finite_is_zero_as_soon_as_one_metric_is_no_number(bad, name):
    metrics = {"loss": 1e38, "probe_loss": -1.0, "grad_norm/encoder": 0.0}
    finite = jax.jit(all_finite)
    for values, expected in ((metrics, 1.0), (metrics | {name: bad}, 0.0)):
        found = finite({k: jnp.float32(v) for k, v in values.items()})
        assert found == expected and found.shape == () and found.dtype == jnp.float32


# -------------------------------------------------------------------------------- collapse


def history(stds, ranks=None) -> dict:
    """Looks at steps 10, 20, ..., with other series of another rhythm beside them."""
    steps = [10 * (i + 1) for i in range(len(stds))]
    ranks = [9.0] * len(stds) if ranks is None else ranks
    return {
        "loss": (list(range(1, 100)), [0.0] * 99),
        "projection_std": (steps, list(stds)),
        "effective_rank": (steps, list(ranks)),
    }


def collapsed_at(*series, **limits) -> int | None:
    return diagnostics.collapsed_at(
        history(*series), **({"min_std": 0.1, "min_rank": 1.5} | limits)
    )


@pytest.mark.parametrize(
    ("stds", "step"),
    [
        ([], None),
        ([0.05], None),  # one look is none
        ([0.05, 0.05], 20),
        ([0.9, 0.05], None),
        ([0.9, 0.05, 0.04], 30),
        ([0.9, 0.05, 0.04, 0.03, 0.02], 30),  # the step stays the same as the run goes on
        ([0.9, 0.05, 0.9, 0.05], None),  # never two in a row
        ([0.9, 0.05, 0.04, 0.9], None),  # it has recovered
        ([0.05, 0.04, 0.9, 0.8, 0.05], None),
        ([0.05, 0.04, 0.9, 0.8, 0.05, 0.01, 0.0], 60),  # and collapsed again
        ([0.1, 0.1, 0.1], None),  # at the limit is not below it
    ],
)
def test_collapse_is_two_low_looks_in_a_row_up_to_the_last(stds, step):
    assert collapsed_at(stds) == step


def test_either_criterion_will_do():
    assert collapsed_at([0.9] * 4, [3.0, 1.4, 1.3, 1.0]) == 30
    assert collapsed_at([0.9] * 4, [3.0, 1.4, 1.3, 1.6]) is None
    assert collapsed_at([0.9, 0.05, 0.9], [9.0, 9.0, 1.0]) == 30  # one look by each
    assert collapsed_at([0.9] * 3, [1.5] * 3) is None


def test_the_limits_are_the_callers():
    stds = [0.3, 0.3]
    assert collapsed_at(stds) is None and collapsed_at(stds, min_std=0.4) == 20
    assert collapsed_at(stds, [4.0, 4.0], min_rank=5.0) == 20
    assert collapsed_at([0.0, 0.0], [1.0, 1.0], min_std=0, min_rank=0) is None


def test_a_run_that_was_never_looked_at_has_not_collapsed():
    limits = {"min_std": 0.1, "min_rank": 1.5}
    assert diagnostics.collapsed_at({}, **limits) is None
    assert diagnostics.collapsed_at({"loss": ([1], [0.5])}, **limits) is None


def test_the_warning_names_the_step_the_numbers_and_what_may_help():
    seen = history([0.9, 0.0612, 0.0372], [7.0, 1.44, 1.26])
    told = diagnostics.collapse_warning(12_345, seen, min_std=0.1)
    for part in (
        "12,345",
        "projections of all",
        "0.037",
        "1.3",
        "learning rate",
        "warm-up",
        "tau",
        "predictor",
    ):
        assert part in told
    assert "0.061" not in told  # the last look counts
    told = diagnostics.collapse_warning(7, history([0.9, 0.85], [1.2, 1.2]), min_std=0.1)
    assert "representations of all" in told and "projections of all" not in told
