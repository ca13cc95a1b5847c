"""The shared random stream: known answers, and the distributions made of it."""

import numpy as np
import pytest

from spec.config import load_config
from spec.data import load_dataset
from spec.noise import (
    PURPOSES,
    integers,
    normals,
    sampling_noise,
    training_draws,
    uniforms,
    words,
)

KNOWN = [
    ((0, "init", 0), "02f4ba6408e4d89b 3dd62b0b9ca8c5b2 1c8667a55d902e79 907d7a052fd5b4dc"),
    ((1, "noise", 2), "179385010d19a3aa dc6cbd01b415f63d 47e83da8f957e2f4 a90ad389a8305c7c"),
    (
        (2**64 - 1, "golden", 2**64 - 1),
        "55a334a6a1cac5bc 2b704673dafe5e8a 265890bdbbf55c61 39210da57165cdb5",
    ),
]


@pytest.mark.parametrize(("key", "expected"), KNOWN)
def test_words_are_known(key, expected):
    assert " ".join(f"{int(word):016x}" for word in words(*key, 4)) == expected


def philox4x64(counter: list[int], key: list[int]) -> list[int]:
    """Ten rounds of Philox4x64 in Python's integers (Salmon et al. 2011)."""
    mask = 2**64 - 1
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        low, high = 0xD2E7470EE14C6C93 * x0, 0xCA5A826395121157 * x2
        x0, x1, x2, x3 = (high >> 64) ^ x1 ^ k0, high & mask, (low >> 64) ^ x3 ^ k1, low & mask
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return [x0, x1, x2, x3]


def test_philox_written_here_gives_its_published_answer():
    published = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox4x64([0, 0, 0, 0], [0, 0]) == published


@pytest.mark.parametrize(("seed", "purpose", "step"), [(0, "init", 0), (7, "z", 41), (3, "t", 9)])
def test_the_stream_is_philox_from_counter_one(seed, purpose, step):
    key = [seed, PURPOSES.index(purpose)]
    blocks = [philox4x64([i, 0, step, 0], key) for i in (1, 2, 3)]  # numpy counts up first
    expected = [word for block in blocks for word in block][:11]
    assert words(seed, purpose, step, 11).tolist() == expected


def test_purposes_seeds_and_steps_do_not_share_words():
    keys = [(seed, purpose, step) for seed in (0, 1) for purpose in PURPOSES for step in (0, 1, 2)]
    firsts = {int(word) for key in keys for word in words(*key, 8)}
    assert len(firsts) == 8 * len(keys)


@pytest.mark.parametrize(
    ("arguments", "words_of_error"),
    [
        ((0, "dropout", 0, 1), "unknown purpose 'dropout'; allowed are init"),
        ((-1, "init", 0, 1), "seed = -1 is outside"),
        ((2**64, "init", 0, 1), "seed = "),
        ((0, "init", -1, 1), "step = -1 is outside"),
    ],
)
def test_bad_keys_are_named(arguments, words_of_error):
    with pytest.raises(ValueError, match=words_of_error):
        words(*arguments)


def test_uniforms_and_normals_are_known():
    assert uniforms(1, "noise", 2, (2,)).tolist() == pytest.approx(
        [((0x179385010D19A3AA >> 11) + 0.5) / 2**53, ((0xDC6CBD01B415F63D >> 11) + 0.5) / 2**53],
        rel=1e-16,
    )
    assert normals(1, "noise", 2, (3,)).tolist() == pytest.approx(
        [1.403042487, -1.673722544, -0.851181222], rel=1e-8
    )
    assert integers(0, "t", 0, (6,), 1000).tolist() == [814, 439, 299, 611, 819, 653]


def test_normals_have_the_moments_of_normals():
    draws = normals(5, "noise", 1, (1_000_000,))
    assert abs(draws.mean()) < 4e-3  # four standard errors
    assert abs(draws.var() - 1) < 4 * np.sqrt(2 / 1e6)
    assert abs((draws**4).mean() - 3) < 4 * np.sqrt(96 / 1e6)
    halves = draws.reshape(-1, 2)
    assert abs((halves[:, 0] * halves[:, 1]).mean()) < 4 / np.sqrt(5e5)


def test_a_shape_is_filled_in_c_order_and_a_shorter_draw_is_a_prefix():
    flat = normals(0, "z", 3, (30,))
    assert np.array_equal(normals(0, "z", 3, (2, 3, 5)), flat.reshape(2, 3, 5))
    assert np.array_equal(normals(0, "z", 3, (7,)), flat[:7])
    assert uniforms(0, "z", 3, (10_000,)).min() > 0


def test_training_draws_cover_their_ranges():
    config = load_config("digits")
    draws = [training_draws(config, 1438, 0, step) for step in range(40)]
    rows = np.concatenate([draw.rows for draw in draws])
    t = np.concatenate([draw.t for draw in draws])
    drop = np.concatenate([draw.drop for draw in draws])
    assert 0 <= rows.min() < 10
    assert 1428 < rows.max() < 1438
    assert 0 <= t.min() < 5
    assert 994 < t.max() < 1000
    assert drop.dtype == bool
    assert abs(drop.mean() - config.label_dropout) < 0.02
    assert draws[0].noise.shape == (config.batch_size, 8, 8, 1)


def test_a_trajectory_draws_noise_for_every_step():
    x, z = sampling_noise(load_config("tiny"), 3, 0, 4)
    assert x.shape == (3, 8, 12, 2)
    assert z.shape == (4, 3, 8, 12, 2)
    assert np.array_equal(z[2], normals(0, "z", 2, x.shape))


def test_the_digits_are_split_without_loss_and_by_class():
    pytest.importorskip("sklearn")
    data = load_dataset("digits")
    assert data.train_images.shape == (1438, 8, 8, 1)
    assert data.test_images.shape == (359, 8, 8, 1)
    assert data.train_images.dtype == np.float32
    assert data.train_labels.dtype == np.int64
    assert data.train_images.min() == -1
    assert data.train_images.max() == 1
    counts = np.bincount(data.test_labels) / np.bincount(
        np.concatenate([data.train_labels, data.test_labels])
    )
    assert np.abs(counts - 0.2).max() < 0.005
    seen = {image.tobytes() for image in data.train_images}
    assert not seen & {image.tobytes() for image in data.test_images}
    with pytest.raises(ValueError, match="dataset 'faces' is not available"):
        load_dataset("faces")
