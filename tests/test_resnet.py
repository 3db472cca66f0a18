"""The encoder: sizes, convolutions and paddings against NumPy, initialisation, types."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from selfsup_jax.devices.collectives import BatchLayout
from selfsup_jax.models.resnet import Conv, ResNet


def shapes_of(model, size=32):
    """Shapes and types of the variables, and of the output for two images; nothing is computed."""
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.PRNGKey(0), images)
    return variables, jax.eval_shape(model.apply, variables, images)


def count(params):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


# --------------------------------------------------------------------------------- sizes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("depth", "parameters", "features"),
    [
        # torchvision's and, for 200, timm's counts less those of their classifiers.
        (18, 11_176_512, 512),
        (34, 21_284_672, 512),
        (50, 23_508_032, 2048),
        (101, 42_500_160, 2048),
        (152, 58_143_808, 2048),
        (200, 62_624_832, 2048),
    ],
)
def test_parameters_and_features(depth, parameters, features):
    model = ResNet(depth)
    variables, output = shapes_of(model)
    assert count(variables["params"]) == parameters
    assert output.shape == (2, features)
    assert model.num_features == features


@pytest.mark.slow
@pytest.mark.parametrize(
    ("depth", "parameters"),
    [
        # The authors' 1x1 convolution of 64 x 64 in stage 1, and its norm.
        (18, 11_176_512 + 64 * 64 + 2 * 64),
        (34, 21_284_672 + 64 * 64 + 2 * 64),
        (50, 23_508_032),  # has one anyway
    ],
)
def test_authors_project_in_stage_1(depth, parameters):
    params = shapes_of(ResNet(depth, stage1_projection=True))[0]["params"]
    assert count(params) == parameters
    projections = {name for name in params if name.endswith("_shortcut")}
    assert projections == {f"stage{i}_block1_shortcut" for i in (1, 2, 3, 4)}
    assert "stage1_block1_shortcut" in shapes_of(ResNet(50))[0]["params"]
    assert "stage1_block1_shortcut" not in shapes_of(ResNet(18))[0]["params"]


@pytest.mark.slow
@pytest.mark.parametrize(("width", "features"), [(2.0, 4096), (0.5, 1024), (1 / 16, 128)])
def test_width_multiplies_the_channels(width, features):
    model = ResNet(50, width=width)
    variables, output = shapes_of(model)
    assert output.shape == (2, features) and model.num_features == features
    assert variables["params"]["stem"]["kernel"].shape == (7, 7, 3, 64 * width)
    assert variables["params"]["stage3_block1_conv2"]["kernel"].shape[2:] == (256 * width,) * 2


def map_sizes(stem, size):
    """The sides of the maps that the stem's convolution and each stage's last one give."""
    model = ResNet(18, width=1 / 16, stem=stem)
    variables, _ = shapes_of(model, size)
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    apply = functools.partial(model.apply, capture_intermediates=True, mutable=["intermediates"])
    seen = jax.eval_shape(apply, variables, images)[1]["intermediates"]
    names = ["stem", *(f"stage{i}_block2_conv2" for i in (1, 2, 3, 4))]
    return [seen[name]["__call__"][0].shape[1] for name in names]


@pytest.mark.slow
def test_stems():
    # A stride-2 stem and a max-pool before stage 1, or neither; then halves from stage 2 on.
    assert map_sizes("imagenet", 64) == [32, 16, 8, 4, 2]
    assert map_sizes("cifar", 32) == [32, 32, 16, 8, 4]
    kernel = shapes_of(ResNet(18, stem="cifar"))[0]["params"]["stem"]["kernel"]
    assert kernel.shape == (3, 3, 3, 64)


# -------------------------------------------------------------------------- convolutions


def conv_by_hand(x, kernel, stride, padding):
    """A loop over output places. `same` pads as TensorFlow says, `torch` by half the kernel."""
    size = kernel.shape[0]
    margins = []
    for n in x.shape[1:3]:
        if padding == "torch":
            margins.append((size // 2, size // 2))
        else:
            total = max((math.ceil(n / stride) - 1) * stride + size - n, 0)
            margins.append((total // 2, total - total // 2))
    x = np.pad(x.astype(np.float64), ((0, 0), *margins, (0, 0)))
    rows, columns = ((n - size) // stride + 1 for n in x.shape[1:3])
    y = np.zeros((len(x), rows, columns, kernel.shape[3]))
    for i in range(rows):
        for j in range(columns):
            patch = x[:, i * stride : i * stride + size, j * stride : j * stride + size]
            y[:, i, j] = np.tensordot(patch, kernel, 3)
    return y


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["same", "torch"])
@pytest.mark.parametrize(
    ("height", "width", "size", "stride"),
    [
        (1, 1, 3, 1),  # from here on: maps that become a matmul of patches
        (2, 2, 3, 1),
        (1, 4, 3, 1),
        (1, 1, 3, 2),
        (2, 2, 3, 2),
        (3, 5, 3, 2),
        (4, 4, 3, 2),
        (3, 3, 3, 1),  # from here on: maps that don't
        (5, 5, 3, 2),
        (6, 7, 3, 2),
        (8, 8, 7, 2),
        (9, 9, 7, 2),
        (4, 4, 1, 1),  # from here on: a matmul of pixels
        (4, 4, 1, 2),
        (5, 7, 1, 2),
    ],
)
def test_convolution_is_numpys(padding, height, width, size, stride):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, height, width, 3)).astype(np.float32)
    kernel = rng.normal(size=(size, size, 3, 4)).astype(np.float32)
    got = Conv(4, size, stride, padding).apply({"params": {"kernel": kernel}}, x)
    np.testing.assert_allclose(got, conv_by_hand(x, kernel, stride, padding), rtol=1e-4, atol=1e-5)


def test_paddings_differ_at_stride_2():
    """On an even map: `same` adds a pixel at the end only, `torch` one at each side."""
    x = np.arange(64, dtype=np.float32).reshape(1, 8, 8, 1)
    center = np.zeros((3, 3, 1, 1), np.float32)
    center[1, 1] = 1
    same = Conv(1, 3, 2, "same").apply({"params": {"kernel": center}}, x)
    symmetric = Conv(1, 3, 2, "torch").apply({"params": {"kernel": center}}, x)
    np.testing.assert_array_equal(same[0, :, :, 0], x[0, 1::2, 1::2, 0])
    np.testing.assert_array_equal(symmetric[0, :, :, 0], x[0, ::2, ::2, 0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("map_size", "size", "stride"), [(2, 3, 1), (4, 3, 2), (4, 1, 1), (5, 1, 2)]
)
def test_matmul_paths_have_the_convolutions_gradients(map_size, size, stride):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, map_size, map_size, 3)).astype(np.float32)
    kernel = rng.normal(size=(size, size, 3, 4)).astype(np.float32)
    weights = rng.normal(size=(2, -(-map_size // stride), -(-map_size // stride), 4))

    def ours(x, kernel):
        y = Conv(4, size, stride).apply({"params": {"kernel": kernel}}, x)
        return jnp.sum(y * weights)

    def lax_conv(x, kernel):
        y = lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.sum(y * weights)

    got, expected = (jax.grad(f, argnums=(0, 1))(x, kernel) for f in (ours, lax_conv))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------ initialisation


@functools.cache
def initialised(depth, zero, **fields):
    model = ResNet(depth, width=1 / 16, stem="cifar", zero_init_gamma=zero, **fields)
    init = jax.jit(model.init)
    return model, init(jax.random.PRNGKey(0), jnp.zeros((1, 8, 8, 3)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("depth", "last", "fields"),
    [
        (18, "conv2_bn", {}),
        (18, "conv2_bn", {"stage1_projection": True}),  # SimCLR's
        (50, "conv3_bn", {}),
        (50, "conv3_bn", {"zero_init_basic": False}),  # Haiku's
    ],
)
def test_each_block_starts_as_its_shortcut(depth, last, fields):
    """With the last gammas at 0: relu of the shortcut, block after block, by hand."""
    model, variables = initialised(depth, True, **fields)
    params = variables["params"]
    for name, leaf in params.items():
        if "bn" in name:
            assert np.all(leaf["scale"] == (0 if name.endswith(last) else 1)), name

    def norm(x):  # in evaluation, with averages and affine as they start
        return x / np.sqrt(1 + 1e-5)

    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    y = np.maximum(norm(conv_by_hand(x, np.asarray(params["stem"]["kernel"]), 1, "same")), 0)
    for name in [k for k in params if k.endswith("_shortcut")]:
        stride = 1 if name.startswith("stage1") else 2
        kernel = np.asarray(params[name]["kernel"])
        y = np.maximum(norm(conv_by_hand(y, kernel, stride, "same")), 0)
    np.testing.assert_allclose(model.apply(variables, x), y.mean((1, 2)), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero", "fields"),
    [(False, {}), (True, {"zero_init_basic": False})],  # the latter is Haiku's ResNet-18
)
def test_gammas_can_start_at_1(zero, fields):
    _, variables = initialised(18, zero, **fields)
    scales = {k: v["scale"] for k, v in variables["params"].items() if k.endswith("_bn")}
    assert len(scales) == 20
    assert all(np.all(scale == 1) for scale in scales.values())


@pytest.mark.parametrize(
    ("init", "deviation"),
    [
        ("lecun", 1 / math.sqrt(9 * 32)),
        ("haiku", 0.87962566 / math.sqrt(9 * 32)),
        ("kaiming_fan_out", math.sqrt(2 / (9 * 128))),
        ("torch", math.sqrt(1 / (3 * 9 * 32))),
    ],
)
def test_kernel_initialisations(init, deviation):
    x = jnp.zeros((1, 8, 8, 32))
    kernel = Conv(128, 3, kernel_init=init).init(jax.random.PRNGKey(0), x)["params"]["kernel"]
    assert float(jnp.std(kernel)) == pytest.approx(deviation, rel=0.02)
    # The truncated normal ends at two deviations of the normal before truncation, which for Haiku
    # is 1 / sqrt(fan in); PyTorch's uniform ends at 1 / sqrt(fan in).
    if init == "haiku":
        assert 1.9 < float(jnp.abs(kernel).max()) * math.sqrt(9 * 32) <= 2.0
    largest = float(jnp.abs(kernel).max()) / deviation
    assert (largest < 2.3) == (init != "kaiming_fan_out")
    assert (largest < math.sqrt(3) + 1e-6) == (init == "torch")


# --------------------------------------------------------------------------------- types


def test_bfloat16_is_for_computing_only():
    model = ResNet(18, width=1 / 16, stem="cifar", dtype=jnp.bfloat16)
    variables, _ = shapes_of(model, 8)
    images = jax.ShapeDtypeStruct((4, 8, 8, 3), jnp.float32)
    apply = functools.partial(
        model.apply, capture_intermediates=True, mutable=["intermediates", "batch_stats"]
    )
    for layout in (None, BatchLayout(num_views=2)):
        output, new = jax.eval_shape(
            lambda v, x, layout=layout: apply(v, x, layout), variables, images
        )
        assert output.dtype == jnp.float32
        seen = new["intermediates"]
        for name in (
            "stem",
            "stage1_block1_conv1",
            "stage4_block1_shortcut",
            "stage4_block2_conv2_bn",
        ):
            assert seen[name]["__call__"][0].dtype == jnp.bfloat16, name
        for leaf in jax.tree.leaves((variables, new["batch_stats"])):
            assert leaf.dtype == jnp.float32
