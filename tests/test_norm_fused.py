"""Norms that do without their input against the layers one after the other, and remat."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from selfsup_jax.devices import collectives, tpu_flags
from selfsup_jax.devices.collectives import BatchLayout
from selfsup_jax.models import encoders, norm_fused, resnet
from selfsup_jax.models.convolution import max_pool
from selfsup_jax.models.norm import batch_norm

EPSILON = 1e-5
pool = functools.partial(max_pool, margins=((0, 1), (0, 1)))


def draws(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape) + 0.5, jnp.float32) for shape in shapes]


def product(x, kernel, scale, bias, layout):
    return norm_fused.norm_of_product(x, kernel, scale, bias, layout, EPSILON)


def plain_product(x, kernel, scale, bias, layout):
    return batch_norm(x @ kernel, scale, bias, layout, EPSILON, False)


def maxima(x, scale, bias, layout):
    return norm_fused.norm_of_maxima(x, scale, bias, layout, EPSILON, pool)


def plain_maxima(x, scale, bias, layout):
    y, mean, var = batch_norm(x, scale, bias, layout, EPSILON, True)
    return pool(y), mean, var


def results(function, layout, weights, *arrays):
    """Gradients, and the result with its moments."""

    def loss(*arrays):
        y, mean, var = function(*arrays, layout)
        return jnp.sum(y * weights), (y, mean, var)

    return jax.grad(loss, tuple(range(len(arrays))), has_aux=True)(*arrays)


CASES = {
    "product": (product, plain_product, (8, 6, 6, 10), [(4, 10), (10,), (10,)]),
    "maxima": (maxima, plain_maxima, (8, 3, 3, 4), [(4,), (4,)]),
}


@pytest.mark.parametrize("layout", [BatchLayout(1), BatchLayout(2), BatchLayout(1, 2)])
@pytest.mark.parametrize("name", CASES)
def test_is_the_layers_one_after_the_other(name, layout):
    """With some negative gammas, whose channels the maximum turns around."""
    fused, plain, out, shapes = CASES[name]
    x, weights, *parameters = draws((8, 6, 6, 4), out, *shapes)
    parameters[-2] = parameters[-2].at[:2].multiply(-1)
    run = jax.jit(results, static_argnums=(0, 1))  # operation by operation it compiles each
    got, expected = (run(f, layout, weights, x, *parameters) for f in (fused, plain))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * float(jnp.abs(b).max()))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_is_the_same_on_four_devices(name):
    fused, _, out, shapes = CASES[name]
    x, weights, *parameters = draws((8, 6, 6, 4), out, *shapes)

    def on_device(x, weights):
        layout = collectives.batch_layout(1, 1, "d")
        (d_x, *grads), (y, *found) = results(fused, layout, weights, x, *parameters)
        return d_x, y, jax.lax.psum(grads, "d"), found

    mapped = jax.pmap(on_device, axis_name="d", devices=jax.devices()[:4])
    d_x, y, grads, found = mapped(*(a.reshape(4, 2, *a.shape[1:]) for a in (x, weights)))
    gradients, expected = results(fused, BatchLayout(), weights, x, *parameters)
    pairs = [(d_x.reshape(x.shape), gradients[0]), (y.reshape(out), expected[0])]
    pairs += [
        (a[0], b) for a, b in zip([*grads, *found], [*gradients[1:], *expected[1:]], strict=True)
    ]
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * float(jnp.abs(b).max()))


# ------------------------------------------------------------------------------- the encoder


def differentiated(monkeypatch, **fields):
    """The function (gradient, statistics) of a small bottleneck network, and its parameters."""
    monkeypatch.setitem(resnet.STAGES, 10, ((2, 1, 0, 0), True))
    encoder = resnet.ResNet(10, width=1 / 16, zero_init_gamma=False, **fields)
    images = jnp.asarray(np.random.default_rng(1).normal(size=(4, 32, 32, 3)), jnp.float32)
    variables = jax.jit(encoder.init)(jax.random.PRNGKey(0), images[:1])

    def loss(params):
        variables_ = variables | {"params": params}
        y, new = encoder.apply(variables_, images, BatchLayout(2), mutable=["batch_stats"])
        return jnp.sum(y * jnp.arange(y.size).reshape(y.shape)), new

    return jax.grad(loss, has_aux=True), variables["params"]


@pytest.mark.slow
def test_an_encoder_without_the_tricks_is_the_same(monkeypatch):
    off, params = differentiated(monkeypatch)
    on, same_params = differentiated(monkeypatch, pool_first=True, product_norm_stages=2)
    jax.tree.map(np.testing.assert_array_equal, params, same_params)
    for a, b in zip(*(jax.tree.leaves(jax.jit(f)(params)) for f in (on, off)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(b).max()))


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["blocks", "stages"])
def test_what_is_computed_again_is_the_same(monkeypatch, remat):
    """The gradients, and batch statistics that are updated once; the work shows in the program."""
    plain, params = differentiated(monkeypatch)
    again, _ = differentiated(monkeypatch, remat=remat)
    convolutions = [str(jax.make_jaxpr(f)(params)).count("conv_general") for f in (plain, again)]
    assert convolutions[1] > convolutions[0]
    for a, b in zip(*(jax.tree.leaves(jax.jit(f)(params)) for f in (again, plain)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * float(jnp.abs(b).max()))


def test_defaults_depend_on_the_platform():
    fields = common.encoder()
    names = ("pool_first", "product_norm_stages")
    for on_tpu, expected in ((True, ["yes", 2]), (False, ["no", 0])):
        assert [encoders.for_platform(fields, on_tpu)[name] for name in names] == expected
        given = encoders.for_platform(
            common.encoder(pool_first="yes", product_norm_stages=0), on_tpu
        )
        assert [given[name] for name in names] == ["yes", 0]
    made = encoders.make_encoder(common.encoder(pool_first="yes", remat="blocks"))
    assert (made.pool_first, made.product_norm_stages, made.remat) == (True, 0, "blocks")


# -------------------------------------------------------------------------- the TPU's compiler


def test_flags_that_the_compiler_knows_and_the_user_has_not_set(tmp_path, monkeypatch):
    flag = next(iter(tpu_flags._FLAGS))
    package = tmp_path / "libtpu"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--a=1")

    def given(library):
        (package / "libtpu.so").write_bytes(library)
        tpu_flags.set_flags()
        return tpu_flags.os.environ["LIBTPU_INIT_ARGS"]

    assert given(b"no such flag") == "--a=1"
    assert given(b"\0" + flag.encode() + b"\0") == f"--a=1 --{flag}={tpu_flags._FLAGS[flag]}"
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--{flag}=0.5")
    assert given(flag.encode()) == f"--{flag}=0.5"
