"""S11: datasets as arrays in [-1, 1], with a held-out split."""

from typing import NamedTuple

import numpy as np

from spec.noise import uniforms


class Dataset(NamedTuple):
    """Images and labels, split into a training and a held-out part."""

    train_images: np.ndarray  # [N, H, W, C] float32 in [-1, 1]
    train_labels: np.ndarray  # [N] int64
    test_images: np.ndarray  # [M, H, W, C]
    test_labels: np.ndarray  # [M]


def load_digits(seed: int = 0, held_out: float = 0.2) -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8x8x1, split with equal shares of every class.

    Source: the optical recognition of handwritten digits data set (Alpaydin & Kaynak 1998), as
    embedded in scikit-learn. Raises ImportError that says what to install.
    """
    try:
        from sklearn.datasets import load_digits as bundled
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn; pip install scikit-learn") from error
    raw = bundled()
    images = (raw.images / 8.0 - 1.0).astype(np.float32)[..., None]
    labels = raw.target.astype(np.int64)
    order = np.argsort(uniforms(seed, "split", 0, labels.shape), kind="stable")
    test: list[np.ndarray] = []
    for label in range(10):
        members = order[labels[order] == label]
        test.append(members[: round(held_out * len(members))])
    is_test = np.isin(np.arange(len(labels)), np.concatenate(test))
    return Dataset(images[~is_test], labels[~is_test], images[is_test], labels[is_test])


def load_dataset(name: str) -> Dataset:
    """The dataset of this name. Raises ValueError for one that is not there."""
    if name != "digits":
        raise ValueError(f"dataset {name!r} is not available; available is digits")
    return load_digits()
