"""What stands in the pictures, pixel by pixel, and what becomes of the files."""

from __future__ import annotations

import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
from conftest import REPOSITORY, process_env
from PIL import Image

from selfsup_jax.viz import plots
from selfsup_jax.viz.plots import curves, maps, page

pytestmark = pytest.mark.filterwarnings("error")

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
YELLOW, CYAN = (255, 255, 0), (0, 255, 255)
CURVE = (31, 111, 180)  # the colour of a panel's first curve


@pytest.fixture
def path(tmp_path):
    """In a folder that isn't there yet."""
    return str(tmp_path / "plots" / "picture.png")


def read(path):
    """`[height, width, 3]` uint8."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def box(picture, color, tolerance=0):
    """(top, left, bottom, right) around the pixels of a colour, ends exclusive."""
    apart = np.abs(picture.astype(int) - np.asarray(color, int)).max(axis=-1)
    rows, columns = np.nonzero(apart <= tolerance)
    assert len(rows), f"no pixel has the colour {color}"
    return rows.min(), columns.min(), rows.max() + 1, columns.max() + 1


def plain(color, size=16):
    """An image `[size, size, 3]` of one colour."""
    return np.broadcast_to(np.array(color, np.uint8), (size, size, 3))


# --------------------------------------------------------------------------------- images


def test_views_of_a_pair_stand_side_by_side(path):
    views_1 = np.stack([plain(RED), plain(GREEN)]) / 255
    views_2 = np.stack([plain(BLUE), plain(YELLOW)]) / 255
    plots.view_pairs(path, views_1, views_2, step=1500)
    picture = read(path)
    boxes = [box(picture, color) for color in (RED, BLUE, GREEN, YELLOW)]
    for top, left, bottom, right in boxes:
        assert (bottom - top, right - left) == (96, 96)
        assert len(np.unique(picture[top:bottom, left:right].reshape(-1, 3), axis=0)) == 1
    assert len({top for top, *_ in boxes}) == 1
    gaps = [boxes[i + 1][1] - boxes[i][3] for i in range(3)]
    assert 0 < gaps[0] == gaps[2] <= 3  # the two of a pair all but touch
    assert gaps[1] > 8  # pairs stand apart


def test_pixels_of_small_images_are_squares(path):
    rng = np.random.default_rng(0)
    views_1, views_2 = np.stack([plain(RED)]) / 255, rng.uniform(size=(1, 16, 16, 3))
    plots.view_pairs(path, views_1, views_2, step=0)
    picture = read(path)
    top, left, _, right = box(picture, RED)
    left += right - left + 2
    shown = picture[top : top + 96, left : left + 96]
    expected = np.round(255 * views_2[0]).astype(np.uint8)
    np.testing.assert_array_equal(shown, expected.repeat(6, axis=0).repeat(6, axis=1))


def test_photos_are_averaged_to_a_handy_size(path):
    fine = np.zeros((1, 224, 224, 3))
    fine[:, ::2] = 0.4  # lines that leave out pixels would show as black or as 0.4
    plots.view_pairs(path, np.stack([plain(RED, 224)]) / 255, fine, step=0)
    picture = read(path)
    top, left, bottom, right = box(picture, RED)
    assert (bottom - top, right - left) == (112, 112)
    assert np.all(picture[top:bottom, right + 2 : right + 2 + 112] == 51)


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (4, 1), (5, 2), (16, 4)])
def test_pairs_fill_rows_of_four(path, count, rows):
    views = np.zeros((count, 28, 28, 3))
    plots.view_pairs(path, views, views, step=0)
    height, width = read(path).shape[:2]
    assert height == 58 + rows * 98 + 2
    assert 480 <= width < 850


def frames(path, query_names, neighbour_names):
    """The frame's colour around a yellow and a cyan neighbour of one query."""
    plots.nearest_neighbours(
        path,
        np.stack([plain(BLUE)]),
        np.stack([[plain(YELLOW), plain(CYAN)]]),
        np.array([[0.9, -0.2]]),
        query_names=query_names,
        neighbour_names=neighbour_names,
        title="Nearest",
    )
    picture = read(path)
    boxes = [box(picture, color) for color in (BLUE, YELLOW, CYAN)]
    assert boxes[1][1] - boxes[0][3] > boxes[2][1] - boxes[1][3]  # the query stands apart
    found = []
    for top, left, bottom, right in boxes[1:]:
        sides = picture[[top - 2, bottom + 1, top, top], [left, left, left - 2, right + 1]]
        assert len(np.unique(sides, axis=0)) == 1
        found.append(tuple(sides[0].tolist()))
    return found


def test_frames_tell_whose_class_a_neighbour_is_of(path):
    green, red = frames(path, ["cat"], [["cat", "dog"]])
    assert green[1] > 2 * max(green[0], green[2])
    assert red[0] > 2 * max(red[1], red[2])
    assert frames(path, ["cat"], [["dog", "cat"]]) == [red, green]


def test_without_classes_frames_say_nothing(path):
    grey = frames(path, None, None)
    assert grey[0] == grey[1] and len(set(grey[0])) == 1
    assert frames(path, ["cat"], None) == grey


def test_names_are_cut_to_the_room_there_is(path):
    """Written at once, neighbours' names would run into each other."""
    sheet = page.Page(600, 100, "title", "")
    for name in ("W" * 99, "i" * 99, "great white shark, man-eater, Carcharodon carcharias"):
        cut = sheet.cut(name, 100)
        assert cut.endswith("…") and cut[0] == name[0]
        font = {"size": page.SMALL, "parse_math": False}
        widths = [sheet.figure.text(0, 0, t, **font).get_window_extent().width for t in (cut, name)]
        assert 75 < widths[0] <= 101 < widths[1]
    assert sheet.cut("tench", 100) == "tench"
    assert sheet.cut("two\nlines", 100) == "two lines"


def test_names_in_any_script(path):
    names = ["$x", "_", "犬", "100 %"]
    plots.nearest_neighbours(
        path,
        np.stack([plain(BLUE)]),
        np.stack([[plain(RED)] * 4]),
        np.ones((1, 4)),
        query_names=["\\frac$"],
        neighbour_names=[names],
        title="$ of 犬",
    )
    points, labels = np.eye(4, 2), np.arange(4)
    for class_names in (names, names * 10):
        plots.representation_map(path, points, labels, class_names, title="_$_")
        assert read(path).shape[1] > 600


# --------------------------------------------------------------------------------- curves


class Band(NamedTuple):
    steps: np.ndarray
    low: np.ndarray
    mean: np.ndarray
    high: np.ndarray


BAND = Band(np.arange(0, 1001, 100), np.full(11, 0.5), np.full(11, 1.0), np.full(11, 1.5))
HISTORY = {"loss": ([0, 100, 200], [1.5, 0.7, 0.5])}


def draw_curves(path, history, **arguments):
    plots.learning_curves(path, history, title="byol: digits", **arguments)
    return read(path)


def test_related_quantities_share_a_panel():
    one = ([0], [0.5])
    names = ["b/y", "tau", "grad_norm/encoder", "knn_top1", "loss", "b/x", "new_thing"]
    history = dict.fromkeys([*names, "probe_top1", "grad_norm/projector"], one)
    panels = curves._panels(history | {"alignment": ([], [])})
    assert list(panels.items()) == [
        ("loss", {"loss": "all"}),
        ("top-1 accuracy, %", {"knn_top1": "kNN", "probe_top1": "online probe"}),
        ("gradient norm", {"grad_norm/encoder": "encoder", "grad_norm/projector": "projector"}),
        ("tau", {"tau": "all"}),
        ("b", {"b/y": "y", "b/x": "x"}),
        ("new thing", {"new_thing": "all"}),
    ]


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (4, 1), (5, 2)])
def test_panels_fill_rows_of_four(path, count, rows):
    picture = draw_curves(path, {f"quantity_{i}": ([1, 2], [3.0, 4.0]) for i in range(count)})
    assert picture.shape == (58 + 228 * rows, max(480, 16 + 316 * min(4, count)), 3)
    for i in range(count):  # a curve in each
        row, column = divmod(i, 4)
        panel = picture[58 + 228 * row :, 316 * column : 316 * (column + 1)]
        assert box(panel, CURVE, tolerance=40)


def test_a_single_point_is_seen(path):
    top, left, bottom, right = box(draw_curves(path, {"loss": ([5], [1.0])}), CURVE)
    assert 4 <= bottom - top <= 12 and 4 <= right - left <= 12


def test_the_reference_lies_behind_and_shows_the_whole_plan(path):
    alone = draw_curves(path, HISTORY)
    assert np.array_equal(
        alone, draw_curves(path, HISTORY, reference={"tau": BAND})
    )  # not measured
    behind = draw_curves(path, HISTORY, reference={"loss": BAND})
    widths = [right - left for _, left, _, right in (box(alone, CURVE), box(behind[80:], CURVE))]
    assert widths[0] > 230
    assert widths[1] == pytest.approx(widths[0] / 5, abs=5)  # 200 of the plan's 1,000 steps
    tint = behind[150, 280]
    assert not np.array_equal(tint, alone[150, 280])
    _, left, _, right = box(behind[80:], tint, tolerance=1)
    assert right - left > 230


def red_columns(picture):
    """Where there are vertical red lines, a pixel column each, neighbours merged."""
    red = (picture[..., 0] > 180) & (picture[..., 1] < 100) & (picture[..., 2] < 100)
    columns = np.nonzero(red.sum(axis=0) > 120)[0]
    return columns[np.diff(columns, prepend=-9) > 1]


def test_a_collapse_is_marked_in_every_panel(path):
    history = {"loss": ([0, 1000], [1.0, 0.0]), "tau": ([0, 1000], [1.0, 1.0])}
    assert len(red_columns(draw_curves(path, history))) == 0
    early, late = (red_columns(draw_curves(path, history, collapsed_at=s)) for s in (250, 750))
    assert len(early) == len(late) == 2
    assert np.diff(early) == np.diff(late) == 316
    assert np.all(np.abs(late - early - 252 / 1.04 / 2) < 2)


def test_no_history_is_a_picture_too(path):
    for history in ({}, {"loss": ([], [])}):
        picture = draw_curves(path, history, reference={"loss": BAND})
        assert 20 < picture.shape[0] < 100 and picture.min() < 100  # some text


def test_values_of_any_kind(path):
    """Zeros and infinities beside a logarithm, constants, many points, many steps."""
    steps = np.arange(0, 2_000_000, 500)
    history = {
        "grad_norm/a": ([1, 2, 3], [0.0, 1.0, 1e6]),
        "update_norm": ([1, 2, 3], [1e-9, 1.0, np.inf]),
        "target_distance": ([1, 2, 3], [np.nan, 1.0, 100.0]),
        "loss": (steps, np.sin(steps)),
        "tau": (steps, np.ones(len(steps))),
    }
    draw_curves(path, history, collapsed_at=0)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.5, "0.5"), (1500, "1.5k"), (100000, "100k"), (2.5e6, "2.5M"), (-3, "-3")]
    + [(0.00015, "1.5e-4"), (0.3 - 0.1, "0.2"), (0.9985, "0.9985")],
)
def test_ticks_are_short(value, text):
    assert curves._format_value(value) == text


# ------------------------------------------------------------------------------------ map


def test_points_are_coloured_by_class(path):
    points = np.array([(0, 0), (0, 10), (20, 0), (20, 10)], np.float32)
    plots.representation_map(path, points, np.array([0, 1, 2, -1]), list("abc"), title="Map")
    picture = read(path)[50:680, 24:656]
    squares = []
    for quarter in (picture[:315, :316], picture[315:, :316], picture[315:, 316:]):
        colors, counts = np.unique(quarter.reshape(-1, 3), axis=0, return_counts=True)
        assert counts[colors.sum(axis=1) < 765].max() > 15
        squares.append(tuple(colors[np.argsort(-counts)[1]]))
    assert len(set(squares)) == 3
    (top, left, *_), (bottom, *_), (_, right, *_) = (box(picture, squares[i]) for i in range(3))
    assert abs(2 * (bottom - top) - (right - left)) <= 2  # both axes on one scale


def test_classes_beyond_ten_have_another_marker(path):
    pictures = []
    for label in (1, 11):
        plots.representation_map(
            path, np.zeros((1, 2)), np.array([label]), [str(i) for i in range(20)], title="Map"
        )
        pictures.append(read(path)[300:430, 270:410])
    assert not np.array_equal(*pictures)
    np.testing.assert_array_equal(maps._class_colors(20)[:10], maps._class_colors(20)[10:])
    assert len(np.unique(maps._class_colors(1000).round(4), axis=0)) == 1000


def test_without_labels_the_map_shows_the_images(path):
    """Where they are, and not one on another."""
    points = np.array([(0, 0), (10, 0), (0, 10), (0.01, 10)], np.float32)
    images = np.stack([plain(color, 12) for color in (BLUE, YELLOW, CYAN, RED)])
    plots.representation_map(path, points, None, None, title="Map", images=images)
    picture = read(path)
    blue, yellow, cyan = (box(picture, color) for color in (BLUE, YELLOW, CYAN))
    assert blue[1] == cyan[1] < yellow[1] and blue[0] == yellow[0] > cyan[0]
    assert not np.any(np.all(picture == RED, axis=-1))


def test_neighbours_by_the_untrained_encoder_are_beside(path):
    told = {"query_names": ["q.png"], "neighbour_names": [["a.png"]], "files": True}
    rest = plots.Neighbours(np.stack([[plain(CYAN)]]), np.array([[0.5]]), [["b.png"]])
    for untrained in (None, rest):
        images = np.stack([plain(BLUE)]), np.stack([[plain(YELLOW)]]), np.array([[0.9]])
        plots.nearest_neighbours(path, *images, **told, untrained=untrained, title="Nearest")
        picture = read(path)
        assert np.any(np.all(picture == CYAN, axis=-1)) == (untrained is not None)
    (top, _, _, right), (also_top, left, _, _) = (box(picture, c) for c in (YELLOW, CYAN))
    assert top == also_top and left > right
    frame = picture[top - 2, left]
    assert len(set(frame.tolist())) == 1  # grey: of another file is no mistake


@pytest.mark.parametrize("labels", [None, [-1] * 50])
def test_without_labels_there_is_one_colour_and_no_legend(path, labels):
    points = np.random.default_rng(0).normal(size=(50, 2))
    plots.representation_map(path, points, labels, None, title="Map")
    picture = read(path)
    assert picture.shape == (700, 680, 3)
    top, left, bottom, right = box(picture, CURVE, tolerance=60)
    assert min(bottom - top, right - left) > 300


@pytest.mark.parametrize("count", [0, 1, 40])
def test_many_classes_and_points_in_one_place(path, count):
    labels = np.arange(count) * 20
    names = [f"a class with a long name, {i}" for i in range(1000)]
    plots.representation_map(path, np.zeros((count, 2)), labels, names, title="Map")
    assert read(path).shape == (700, 680, 3)


def test_the_map_keeps_clusters_apart_and_its_seed():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(2, 64))
    labels = np.arange(60) % 2
    directions = centres[labels] + 0.3 * rng.normal(size=(60, 64))
    lengths = rng.uniform(0.1, 10, size=(60, 1))  # cosines don't see them
    features = (lengths * directions).astype(np.float32)
    points = plots.map_points(features, seed=0)
    assert points.shape == (60, 2) and np.all(np.isfinite(points))
    middles = np.stack([points[labels == i].mean(axis=0) for i in (0, 1)])
    distances = np.linalg.norm(points[:, None] - middles, axis=-1)
    assert np.array_equal(distances.argmin(axis=1), labels)
    np.testing.assert_array_equal(points, plots.map_points(features, seed=0))


@pytest.mark.parametrize("shape", [(0, 4), (1, 4), (2, 4), (3, 4), (4, 1), (7, 300)])
def test_maps_of_few_features(shape):
    points = plots.map_points(np.random.default_rng(0).normal(size=shape), seed=1)
    assert points.shape == (shape[0], 2) and np.all(np.isfinite(points))


@pytest.mark.parametrize("value", [0.0, 0.1, 1e-20, 1e20])
def test_features_that_do_not_vary_lie_in_one_place(value):
    features = np.full((40, 128), value, np.float32)
    features *= np.linspace(1, 2, 40, dtype=np.float32)[:, None]  # one direction, many lengths
    np.testing.assert_array_equal(plots.map_points(features, seed=0), np.zeros((40, 2)))


def test_one_that_differs_among_equal_features():
    features = np.ones((40, 8))
    features[0, 0] = -1
    assert np.all(np.isfinite(plots.map_points(features, seed=0)))


# ---------------------------------------------------------------------------------- files


def test_a_picture_that_fails_leaves_no_trace(path, tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder.png").mkdir()
    for name in ("file/picture.png", "folder.png"):
        with pytest.raises(OSError):
            plots.learning_curves(str(tmp_path / name), HISTORY, title="x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.png"]
    assert not list((tmp_path / "folder.png").iterdir())


def test_the_old_picture_stands_until_the_new_one_is_whole(path, tmp_path, monkeypatch):
    before = draw_curves(path, HISTORY)

    def torn(self, file, **_):
        file.write(b"\x89PNG")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr("matplotlib.figure.Figure.savefig", torn)
        draw_curves(path, HISTORY, collapsed_at=100)
    np.testing.assert_array_equal(read(path), before)
    assert [p.name for p in (tmp_path / "plots").iterdir()] == ["picture.png"]
    assert not np.array_equal(draw_curves(path, HISTORY, collapsed_at=100), before)


def test_a_run_without_pictures_does_not_wait_for_the_libraries(tmp_path):
    code = f"""if True:
        import sys
        from selfsup_jax.viz import plots
        assert not {{"matplotlib", "sklearn", "jax"}} & set(sys.modules)
        plots.learning_curves({str(tmp_path / "x.png")!r}, {{}}, title="x")
        assert "matplotlib.figure" in sys.modules and "matplotlib.pyplot" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, env=process_env())


# --------------------------------------------------------------------------------- recipes


def test_recipes_stand_side_by_side(path):
    """The longer bar reaches further; a dot for each run, a grey line where the baseline is."""
    panels = [
        plots.Panel("kNN, %", [[20.0, 30.0], [50.0]], [[10.0, 10.0], [40.0]]),
        plots.Panel("rank", [[5.0, 7.0], [6.0]], []),
    ]
    plots.comparison(path, ["one", "another"], panels, title="Two recipes")
    picture = read(path)
    first, second, grey = (
        np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
        for color in (*page.CURVES[:2], page.GREY)
    )
    half = picture.shape[1] // 2
    ends = {}
    for name, color in (("one", first), ("another", second)):
        pale = np.round(255 - 0.35 * (255 - color))
        _, left, _, right = box(picture[:, :half], pale, tolerance=2)
        ends[name] = (left, right)
    assert ends["one"][0] == pytest.approx(ends["another"][0], abs=1)
    lengths = {name: right - left for name, (left, right) in ends.items()}
    assert lengths["one"] / lengths["another"] == pytest.approx(25 / 50, abs=0.03)
    below = page.TOP + 22  # above it the note is grey
    farthest = box(picture[below:, :half], grey, tolerance=2)[3]
    start = ends["one"][0]
    assert (farthest - start) / lengths["another"] == pytest.approx(40 / 50, abs=0.03)


def test_recipes_that_are_still_to_come_leave_room(path):
    panels = [plots.Panel("kNN, %", [[], [50.0]], [[], []])]
    plots.comparison(path, ["to come", "there"], panels, title="One is missing")
    assert read(path).shape[0] > 100


def test_attention_stands_beside_its_image(path):
    """A cell of a map is a square of the picture, as bright as its share of the map's maximum."""
    maps = np.zeros((2, 3, 4, 4), np.float32)
    maps[0, 0] = 0.02
    maps[0, 1, :, 2] = 0.1
    maps[1, 2, 3, 0] = 0.7
    plots.attention_maps(path, np.stack([plain(RED), plain(BLUE)]), maps, step=1500)
    picture = read(path)
    yellow = (253, 231, 37)  # of viridis: the maximum
    top, left, bottom, right = box(picture, RED)
    assert (bottom - top, right - left) == (96, 96)
    row = picture[top:bottom]
    bright = np.unique(np.nonzero((row == yellow).all(-1))[1])
    first = bright[bright < bright[0] + 96]
    assert len(first) == 96 and first[0] > right  # a map that is even
    assert len(bright) - 96 == 24  # a column of four, of the second head
    below = picture[box(picture, BLUE)[0] :]
    found = box(below, yellow)
    assert (found[2] - found[0], found[3] - found[1]) == (24, 24)  # one cell, at the bottom
