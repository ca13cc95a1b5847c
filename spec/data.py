"""S11: datasets as arrays in [-1, 1], with a held-out split."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from spec.archives import SOURCES, Progress, load_archive
from spec.folder import load_folder
from spec.noise import uniforms

FOLDER = "folder:"  # what begins the name of a dataset of one's own images
SHAPES = {"digits": (8, 8, 1), **{name: source.shape for name, source in SOURCES.items()}}


class Dataset(NamedTuple):
    """Images and labels, split into a training and a held-out part."""

    train_images: np.ndarray  # [N, H, W, C] float32 in [-1, 1]
    train_labels: np.ndarray  # [N] int64
    test_images: np.ndarray  # [M, H, W, C]
    test_labels: np.ndarray  # [M]


def held_out_rows(labels: np.ndarray, seed: int = 0, held_out: float = 0.2) -> np.ndarray:
    """Which rows are held out, [N] bool: equal shares of every class, drawn from the stream.

    A class counts as many rows as `held_out` of it, rounded; of one or two images, none.
    """
    order = np.argsort(uniforms(seed, "split", 0, labels.shape), kind="stable")
    test: list[np.ndarray] = []
    for label in range(labels.max() + 1):
        members = order[labels[order] == label]
        test.append(members[: round(held_out * len(members))])
    return np.isin(np.arange(len(labels)), np.concatenate(test))


def scaled(images: np.ndarray) -> np.ndarray:
    """x / 127.5 - 1 in float32, of bytes [N, H, W, C]."""
    result = np.array(images, np.float32, order="C")
    result /= 127.5
    result -= 1
    return result


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
    is_test = held_out_rows(labels, seed, held_out)
    return Dataset(images[~is_test], labels[~is_test], images[is_test], labels[is_test])


def load_dataset(
    name: str,
    data_dir: str | Path | None = None,
    image_shape: tuple[int, int, int] | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """The dataset `digits`, `mnist`, `fashion_mnist`, `cifar10` or `folder:PATH`.

    `data_dir` holds the files of one that is otherwise fetched. Images of a folder are brought to
    `image_shape` (height, width, channels); any other dataset must have that shape, where one is
    given. `progress(what, done, total)` is called while files are fetched and read. Raises
    ValueError for a name that is not there, and for files that are missing or broken;
    ImportError that says what to install.
    """
    progress = progress or (lambda what, done, total: None)
    if name.startswith(FOLDER):
        if data_dir is not None:
            raise ValueError(f"dataset {name!r} is a folder itself; leave --data-dir out")
        images, labels = load_folder(name.removeprefix(FOLDER), image_shape, progress)
        test = held_out_rows(labels)
        if not test.any():
            raise ValueError(
                f"dataset {name!r} has too few images ({len(labels)}, classes: "
                f"{labels.max() + 1}): a fifth of each class, rounded, is held out, so give one "
                "class at least 3"
            )
        return Dataset(scaled(images[~test]), labels[~test], scaled(images[test]), labels[test])
    if name not in SHAPES:
        raise ValueError(
            f"dataset {name!r} is not available; available are {', '.join(SHAPES)}, and "
            f"{FOLDER}PATH for images of your own"
        )
    if image_shape is not None and tuple(image_shape) != SHAPES[name]:
        raise ValueError(
            f"dataset {name!r} has images {list(SHAPES[name])}, not {list(image_shape)} (height, "
            "width, channels); choose a config of this dataset"
        )
    if name == "digits":
        if data_dir is not None:
            raise ValueError("dataset 'digits' comes with scikit-learn; leave --data-dir out")
        return load_digits()
    files = load_archive(name, data_dir, progress)
    return Dataset(
        scaled(files.train_images),
        files.train_labels.astype(np.int64),
        scaled(files.test_images),
        files.test_labels.astype(np.int64),
    )
