"""Collages, pic-in-pic, patch regions and noise: boxes are checked against the pixels they claim."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mmdpo_trainers.data.compose import (
    GRID_SHAPES,
    add_noise,
    box_to_region,
    grid_collage,
    official_grid_region,
    official_pip_region,
    pic_in_pic,
)

COLOURS = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200), (200, 0, 200), (90, 0, 0), (0, 90, 0), (0, 0, 90)]


def plain(colour, size=(32, 32)):
    return Image.new("RGB", size, colour)


def pixels_inside(picture, box):
    """The pixel rows and columns of a box, which must fall on whole pixels."""
    width, height = picture.size
    edges = [box[0] * width, box[1] * height, box[2] * width, box[3] * height]
    whole = [round(e) for e in edges]
    assert np.allclose(edges, whole)
    return np.asarray(picture)[whole[1] : whole[3], whole[0] : whole[2]]


@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("count", GRID_SHAPES)
def test_each_box_holds_exactly_its_picture(count, square):
    picture, boxes = grid_collage([plain(c) for c in COLOURS[:count]], cell_size=20, margin=10, square=square)
    assert len(boxes) == count
    for box, colour in zip(boxes, COLOURS, strict=False):
        assert (pixels_inside(picture, box) == colour).all()
        assert (np.asarray(picture) == colour).all(-1).sum() == 400
    rows, columns = GRID_SHAPES[count]
    width, height = columns * 20 + (columns + 1) * 10, rows * 20 + (rows + 1) * 10
    assert picture.size == ((max(width, height),) * 2 if square else (width, height))


def test_collage_keeps_aspect_on_white_and_labels_above_the_cell():
    wide = plain((10, 20, 30), (200, 100))
    picture, boxes = grid_collage([wide, plain((0, 200, 0))], cell_size=100, margin=40, square=False)
    cell = pixels_inside(picture, boxes[0])
    assert (cell[25:75] == (10, 20, 30)).all()
    assert (cell[:25] == 255).all() and (cell[75:] == 255).all()
    above = np.asarray(picture)[:40, 40:140]
    assert (above < 128).any()
    unlabelled, _ = grid_collage([wide, wide], cell_size=100, margin=40, label=False, square=False)
    assert (np.asarray(unlabelled)[:40] == 255).all()


def test_labels_differ_between_cells():
    picture, _ = grid_collage([plain((255, 255, 255))] * 2, square=False)
    strip = np.asarray(picture)[:40]
    assert (strip[:, 40:488] != strip[:, 528:976]).any()


@pytest.mark.parametrize(
    ("host", "target", "expected"),
    [
        ((100, 100), (10, 10), (0.15, 0.15, 0.85, 0.85)),
        ((100, 100), (200, 100), (0.15, 0.32, 0.85, 0.67)),
        ((200, 100), (30, 30), (0.325, 0.325, 0.675, 0.675)),
        ((100, 200), (30, 30), (0.325, 0.325, 0.675, 0.675)),
    ],
)
def test_pasted_box_is_where_the_target_is(host, target, expected):
    picture, box = pic_in_pic(plain((0, 0, 200), host), plain((200, 0, 0), target))
    assert picture.size == (max(host), max(host))
    assert box == pytest.approx(expected)
    inside = pixels_inside(picture, box)
    assert (inside == (200, 0, 0)).all()
    assert (np.asarray(picture) == (200, 0, 0)).all(-1).sum() == inside.shape[0] * inside.shape[1]


def test_pic_in_pic_can_keep_the_hosts_size():
    picture, box = pic_in_pic(plain((0, 0, 200), (200, 100)), plain((200, 0, 0)), max_fraction=0.5, square=False)
    assert picture.size == (200, 100)
    assert box == pytest.approx((0.375, 0.25, 0.625, 0.75))
    assert (pixels_inside(picture, box) == (200, 0, 0)).all()


@pytest.mark.parametrize("shape", [(1, 4000), (4000, 1)])
def test_a_hair_thin_picture_keeps_a_pixel(shape):
    picture, boxes = grid_collage([plain((0, 0, 0), shape), plain((0, 200, 0))], cell_size=20, margin=0, label=False)
    assert (pixels_inside(picture, boxes[0]) == 0).any()


@pytest.mark.parametrize("grid", [(4, 4), (24, 24), (7, 5)])
@pytest.mark.parametrize("box", [(0, 0, 1, 1), (0.25, 0.25, 0.75, 0.75), (0.1, 0.3, 0.52, 0.9), (0.51, 0.51, 0.512, 0.512)])
def test_region_is_the_patches_whose_centre_is_inside(box, grid):
    row0, column0, row1, column1 = box_to_region(box, grid)
    inside = {
        (r, c)
        for r in range(grid[0])
        for c in range(grid[1])
        if box[1] <= (r + 0.5) / grid[0] <= box[3] and box[0] <= (c + 0.5) / grid[1] <= box[2]
    }
    region = {(r, c) for r in range(row0, row1) for c in range(column0, column1)}
    assert region == inside if inside else len(region) == 1


def test_official_regions():
    assert [official_grid_region(i, 3, (24, 24)) for i in range(3)] == [[0, 0, 24, 8], [0, 8, 24, 16], [0, 16, 24, 24]]
    assert official_grid_region(0, 9, (4, 5)) == [0, 0, 2, 2]
    assert official_grid_region(8, 9, (4, 5)) == [3, 4, 4, 5]
    assert official_pip_region((24, 24)) == [4, 4, 20, 20]
    assert official_pip_region((4, 4)) == [1, 1, 3, 3]
    for count in GRID_SHAPES:
        cover = np.zeros((24, 25), int)
        for i in range(count):
            row0, column0, row1, column1 = official_grid_region(i, count, cover.shape)
            cover[row0:row1, column0:column1] += 1
        assert (cover == 1).all()


def test_noise_is_gaussian_seeded_and_stays_in_its_box():
    grey = plain((128, 128, 128), (64, 64))
    noisy = np.asarray(add_noise(grey, 10.0, seed=3)).astype(float)
    assert noisy.mean() == pytest.approx(128, abs=0.5) and noisy.std() == pytest.approx(10, rel=0.05)
    assert (noisy == np.asarray(add_noise(grey, 10.0, seed=3))).all()
    assert (noisy != np.asarray(add_noise(grey, 10.0, seed=4))).any()
    boxed = np.asarray(add_noise(grey, 50.0, seed=3, box=(0.25, 0.5, 0.75, 1.0))) != 128
    assert boxed[32:, 16:48].mean() > 0.9
    boxed[32:, 16:48] = False
    assert not boxed.any()
    assert (np.asarray(add_noise(grey, 0.0, seed=3)) == 128).all()


def test_noise_clips_and_wraps_only_on_request():
    white = plain((255, 255, 255), (64, 64))
    clipped = np.asarray(add_noise(white, 20.0, seed=0)).astype(int)
    wrapped = np.asarray(add_noise(white, 20.0, seed=0, wrap=True)).astype(int)
    assert clipped.min() > 128 and (clipped == 255).mean() > 0.4
    assert (wrapped < 128).mean() == pytest.approx(0.49, abs=0.03)
    same = clipped < 255
    assert (clipped == wrapped)[same].all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grid_collage([plain((0, 0, 0))] * 5), "2, 3, 4, 6, 9 pictures, got 5"),
        (lambda: grid_collage([plain((0, 0, 0))] * 2, margin=2), "label=False"),
        (lambda: grid_collage([plain((0, 0, 0))] * 2, cell_size=0), "cell_size=0"),
        (lambda: pic_in_pic(plain((0, 0, 0)), plain((0, 0, 0)), max_fraction=1.5), "max_fraction"),
        (lambda: box_to_region((0.5, 0, 0.5, 1), (4, 4)), "x0 < x1"),
        (lambda: box_to_region((0, 0, 1, 1), (0, 4)), "patch grid"),
        (lambda: official_grid_region(2, 2, (4, 4)), "0 <= index < 2"),
        (lambda: add_noise(plain((0, 0, 0)), -1, 0), "sigma"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
