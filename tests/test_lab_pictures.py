"""lab/pictures.py: where every pixel of a grid, strip or film stands, and what cannot be shown."""

import io

import numpy as np
import pytest
from PIL import Image

from lab.pictures import FRAME_MS, GAP, LAST_FRAME_MS, gif, grid, png, strip, to_bytes


def test_the_ends_and_the_middle_of_the_range():
    values = np.array([-2.0, -1.0, 0.0, 1.0, 3.0])
    assert to_bytes(values).tolist() == [0, 0, 128, 255, 255]


def test_every_image_stands_where_it_should():
    images = np.linspace(-1, 1, 5)[:, None, None, None] * np.ones((5, 32, 64, 1))
    picture = grid(images, 3)
    assert picture.shape == (2 * (32 + GAP) + GAP, 3 * (64 + GAP) + GAP, 3)
    for i in range(5):
        top, left = (i // 3) * (32 + GAP) + GAP, (i % 3) * (64 + GAP) + GAP
        assert (picture[top : top + 32, left : left + 64] == to_bytes(images[i, 0, 0, 0])).all()
    assert (picture[-32:, -32:] == 255).all(), "the free place is white"


def test_small_images_are_enlarged_pixel_by_pixel():
    image = np.linspace(-1, 1, 64).reshape(1, 8, 8, 1)
    picture = grid(image, 4)
    assert picture.shape == (64 + 2 * GAP, 64 + 2 * GAP, 3)
    inside = picture[GAP:-GAP, GAP:-GAP, 0].reshape(8, 8, 8, 8)
    assert (inside == to_bytes(image[0, :, :, 0])[:, None, :, None]).all()


def test_colours_survive_the_file():
    images = np.random.default_rng(0).uniform(-1, 1, (2, 64, 64, 3))
    picture = grid(images, 2)
    assert (np.asarray(Image.open(io.BytesIO(png(picture)))) == picture).all()


@pytest.mark.parametrize(
    ("images", "columns", "words"),
    [
        (np.zeros((2, 8, 8, 2)), 2, "2 channels"),
        (np.zeros((0, 8, 8, 1)), 2, "N at least 1"),
        (np.zeros((8, 8, 1)), 2, "give \\[N, H, W, C\\]"),
        (np.zeros((2, 8, 8, 1)), 0, "columns = 0"),
        (np.stack([np.zeros((8, 8, 1)), np.full((8, 8, 1), np.nan)]), 2, "image 1 holds NaN"),
    ],
)
def test_what_cannot_be_shown_is_said(images, columns, words):
    with pytest.raises(ValueError, match=words):
        grid(images, columns)


def test_a_strip_has_a_row_an_image_and_a_column_a_moment():
    moments = np.linspace(-1, 1, 6).reshape(3, 2, 1, 1, 1) * np.ones((3, 2, 64, 64, 1))
    picture = strip(moments)
    assert picture.shape == (2 * (64 + GAP) + GAP, 3 * (64 + GAP) + GAP, 3)
    for moment in range(3):
        for image in range(2):
            top, left = image * (64 + GAP) + GAP, moment * (64 + GAP) + GAP
            value = to_bytes(moments[moment, image, 0, 0, 0])
            assert (picture[top : top + 64, left : left + 64] == value).all()
    with pytest.raises(ValueError, match=r"give \[S, N, H, W, C\]"):
        strip(moments[0])


@pytest.mark.parametrize("channels", [1, 3])
def test_a_film_shows_every_picture_and_stands_at_its_end(channels):
    images = np.random.default_rng(0).uniform(-1, 1, (4, 2, 8, 8, channels))
    frames = [grid(pair, 2) for pair in images]
    film = Image.open(io.BytesIO(gif(frames)))
    assert film.n_frames == 4
    assert film.info["loop"] == 0
    for i, frame in enumerate(frames):
        film.seek(i)
        assert film.info["duration"] == (LAST_FRAME_MS if i == 3 else FRAME_MS)
        error = np.abs(np.asarray(film.convert("RGB")).astype(int) - frame).max()
        assert error <= (0 if channels == 1 else 64)
    with pytest.raises(ValueError, match="at least one picture"):
        gif([])
