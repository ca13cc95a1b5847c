"""How good the digits of a run are: an SVM reads them, and a Fréchet distance compares them.

The protocol, always the same. Real digits are split as in S11. As many digits are generated as
are held out (359), with balanced labels, clipped to [-1, 1].

- Share: of the generated digits, those that an SVM, trained on the real training digits, assigns
  to the class that was asked for. Its accuracy on the held-out digits stands beside it.
- Distance: the Fréchet distance between the generated and the training digits, in the first 20
  principal components of the training digits.
- Ratio: that distance over the same one of real digits, held out against training: each of 20
  stratified splits (seeds 0 to 19) gives one, with components of its own, and the mean is taken.
  A finite number of perfect digits is not at distance 0 either; it comes out near 1.

The quality line: share and ratio both hold at one and the same guidance scale, not too large a one.
Fewer digits can be drawn for a quick look, and are then held against as many real ones. That cannot
meet the line: chance puts both further off, and so moves the ratio of bad digits toward 1.

Neither number tells new digits from copies of training digits: those would pass.
"""

import dataclasses
import importlib
import io
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table
from sklearn.decomposition import PCA
from sklearn.svm import SVC

from lab.pictures import grid
from spec.backend import Model
from spec.config import Config
from spec.data import Dataset, load_digits
from spec.noise import normals

LEAST_SHARE, LARGEST_RATIO, LARGEST_SCALE = 0.97, 1.5, 1.5
SCALES = (1.0, 1.25, 1.5)
SPLITS = 20
FEATURES = 20
SVM: dict[str, Any] = {"kernel": "rbf", "C": 10.0, "gamma": 0.03}
BATCH = 64  # digits drawn at a time, at most
ROWS = 4  # of each panel of the picture
BACKENDS = ("impl_torch", "impl_jax", "impl_tf", "impl_numpy")  # the usually faster ones first


class SampleError(ArithmeticError):
    """Digits that cannot be measured, for they hold NaN or infinity."""


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The squared Fréchet distance of two Gaussians with the moments of a [N, F] and b [M, F].

    |mean a - mean b|^2 + trace(A + B - 2 (A B)^(1/2)), with unbiased covariances A and B.
    Source: Dowson & Landau 1982; of generated images: Heusel et al. 2017.
    """
    shift = a.mean(axis=0) - b.mean(axis=0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    # A B has the eigenvalues of the symmetric root(A) B root(A), whose roots are safe to take
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
    return float(shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def flat(images: np.ndarray) -> np.ndarray:
    """[N, H, W, C] -> [N, H*W*C] in float64."""
    return images.reshape(len(images), -1).astype(np.float64)


def components(data: Dataset) -> PCA:
    """The principal components of a split's training digits."""
    return PCA(FEATURES, svd_solver="full").fit(flat(data.train_images))


def balanced_part(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Which `count` of labels [N] to take so that classes are even, else at random: [count].

    The data stand in the order of their writers, so the first ones would be too much alike.
    """
    order, rank = np.random.default_rng(seed).permutation(len(labels)), np.zeros_like(labels)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        rank[members] = np.arange(len(members))
    return np.lexsort((labels, rank))[:count]


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the digits of one guidance scale came to."""

    guidance_scale: float
    share: float
    distance: float
    ratio: float
    whole: bool  # whether as many digits were drawn as the protocol wants

    @property
    def met(self) -> bool:
        """Whether the quality line is met at this scale."""
        return (
            self.whole
            and self.guidance_scale <= LARGEST_SCALE
            and self.share >= LEAST_SHARE
            and self.ratio <= LARGEST_RATIO
        )


class RealDigits:
    """The real digits, and what generated ones are measured with; `count` of these are compared.

    Raises ValueError where there are not that many held-out digits, or too few for a covariance.
    """

    def __init__(self, count: int | None = None) -> None:
        self.data = load_digits()
        self.most = len(self.data.test_images)
        self.count = self.most if count is None else count
        if not FEATURES < self.count <= self.most:
            raise ValueError(
                f"--count {self.count} is outside {FEATURES + 1}..{self.most}: as many real digits "
                f"are compared, and {self.most} are held out"
            )
        self.svm = SVC(**SVM).fit(flat(self.data.train_images), self.data.train_labels)
        self.pca = components(self.data)
        self.accuracy = self.share(self.data.test_images, self.data.test_labels)
        self.distances = []
        for seed in range(SPLITS):
            split = load_digits(seed)
            part = split.test_images[balanced_part(split.test_labels, self.count, seed)]
            self.distances.append(self._distance(split, components(split), part))

    @staticmethod
    def _distance(data: Dataset, pca: PCA, images: np.ndarray) -> float:
        both = (pca.transform(flat(part)) for part in (images, data.train_images))
        return frechet_distance(*both)

    def share(self, images: np.ndarray, labels: np.ndarray) -> float:
        """The share of images [N, H, W, C] that the SVM assigns to labels [N]."""
        return float(np.mean(self.svm.predict(flat(images)) == labels))

    def measure(self, images: np.ndarray, labels: np.ndarray, guidance_scale: float) -> Measured:
        """Share, distance and ratio of images [N, H, W, C] in [-1, 1] that labels [N] asked for."""
        distance = self._distance(self.data, self.pca, images)
        ratio = distance / float(np.mean(self.distances))
        share = self.share(images, labels)
        return Measured(guidance_scale, share, distance, ratio, self.count == self.most)


def check_config(config: Config) -> None:
    """Raise ValueError, with every reason, unless the config is for guided digits."""
    digits = load_digits()
    shape, classes = digits.train_images.shape[1:], int(digits.train_labels.max()) + 1
    problems = []
    if config.data != "digits":
        problems.append(f"data = {config.data!r}, expected 'digits'")
    if config.image_shape != shape:
        problems.append(f"images {list(config.image_shape)}, expected {list(shape)}")
    if config.num_classes != classes:
        problems.append(f"num_classes = {config.num_classes}, expected {classes}")
    if problems:
        raise ValueError(
            f"config {config.name!r} is not for digits that can be asked for by class: "
            f"{'; '.join(problems)}. Quality is measured for such configs alone; where these are "
            "digits, and the folder does not say so, name the config with --config"
        )


def find_backend(name: str | None) -> ModuleType:
    """The backend of this module name; None: the first of BACKENDS that can be imported.

    Raises ValueError that says what is missing.
    """
    reasons = []
    for candidate in BACKENDS if name is None else (name,):
        try:
            module = importlib.import_module(candidate)
        except (ImportError, OSError, TypeError, ValueError) as error:  # names: "", ".x"
            reasons.append(f"{candidate} ({error})")
            continue
        if not hasattr(module, "open") or not hasattr(module, "modes"):
            raise ValueError(f"{candidate} is no backend: it has no `open` and `modes`")
        return module
    raise ValueError(
        f"no backend can be imported: {', '.join(reasons)}; run this with the Python of an "
        f"environment that has its framework, or give --backend as one of {', '.join(BACKENDS)}"
    )


def balanced_labels(count: int, classes: int) -> np.ndarray:
    """0, 1, ..., classes-1, 0, 1, ...: [count] int64."""
    return np.arange(count, dtype=np.int64) % classes


def draw(
    model: Model,
    config: Config,
    labels: np.ndarray,
    guidance_scale: float,
    method: str,
    steps: int,
    seed: int,
) -> Iterator[np.ndarray]:
    """Digits for labels [N], batch by batch; [N, H, W, C] in [-1, 1] when all are put together.

    x_T and z are the shared stream's (S10), so that no digit depends on the batches. Raises
    SampleError where a digit is not finite.
    """
    count, shape = len(labels), (len(labels), *config.image_shape)
    x = normals(seed, "x_T", 0, shape).astype(np.float32)
    noise = None
    if method == "ddpm":
        noise = np.stack([normals(seed, "z", i, shape).astype(np.float32) for i in range(steps)])
    size = -(-count // batches(count))
    for start in range(0, count, size):
        # the last batch is filled up from the first: compiled code wants one size
        rows = np.arange(start, start + size) % count
        images = model.sample(
            x[rows],
            None if noise is None else noise[:, rows],
            labels[rows],
            method=method,
            steps=steps,
            guidance_scale=guidance_scale,
        )[-1][: count - start]
        if not np.isfinite(images).all():
            raise SampleError(
                f"at guidance scale {guidance_scale:g} digits hold NaN or infinity: the weights "
                "are unfit, or not those of this config; no report was written"
            )
        yield np.clip(images, -1, 1)


def batches(count: int) -> int:
    """How many batches `draw` makes of this many digits."""
    return -(-count // BATCH)


def report(measured: list[Measured], real: RealDigits, about: dict[str, Any]) -> dict[str, Any]:
    """All that was measured, and with what, as plain values."""
    return {
        **about,
        "met": any(m.met for m in measured),
        "scales": [{**dataclasses.asdict(m), "met": m.met} for m in measured],
        "real": {
            "svm_accuracy": real.accuracy,
            "distance": float(np.mean(real.distances)),
            "distances": real.distances,
        },
        "protocol": {
            "count": real.count,
            "features": FEATURES,
            "splits": SPLITS,
            "svm": SVM,
            "least_share": LEAST_SHARE,
            "largest_ratio": LARGEST_RATIO,
            "largest_scale": LARGEST_SCALE,
        },
    }


def table(measured: list[Measured], real: RealDigits) -> Table:
    """One row a guidance scale, and one of the real digits."""
    result = Table()
    for heading in ("guidance", "read as asked", "distance", "ratio", "quality line"):
        result.add_column(heading, justify="right")
    for m in measured:
        verdict = "met" if m.met else "not met"
        if m.guidance_scale > LARGEST_SCALE:
            verdict = f"above {LARGEST_SCALE:g}"
        if not m.whole:
            verdict = "too few"
        cells = (f"{m.guidance_scale:g}", f"{m.share:.1%}", f"{m.distance:.3f}", f"{m.ratio:.2f}")
        result.add_row(*cells, verdict)
    result.add_section()
    mean, spread = np.mean(real.distances), np.std(real.distances, ddof=1)
    result.add_row("real, held out", f"{real.accuracy:.1%}", f"{mean:.3f} ± {spread:.3f}", "1", "")
    return result


def picture(
    measured: list[Measured], digits: list[np.ndarray], labels: np.ndarray, real: RealDigits
) -> bytes:
    """The bytes of a PNG file: a column a class, a panel a guidance scale, the real digits last.

    `digits` are those of each scale, [N, H, W, C], asked for by labels [N] in the order of
    `balanced_labels`.
    """
    classes = int(labels.max()) + 1
    panels = [
        (f"guidance {m.guidance_scale:g}: {m.share:.1%} read as asked, ratio {m.ratio:.2f}", images)
        for m, images in zip(measured, digits, strict=True)
    ]
    held_out = real.data.test_images, real.data.test_labels
    by_class = [held_out[0][held_out[1] == label][:ROWS] for label in range(classes)]
    panels.append(("real, held out", np.concatenate(np.stack(by_class, axis=1))))
    figure = Figure(figsize=(6, 2.7 * len(panels)), layout="constrained")
    rows = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axes, (title, images) in zip(rows, panels, strict=True):
        # digits reach from edge to edge: a black frame keeps neighbours apart
        framed = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-1)
        axes.imshow(grid(framed[: ROWS * classes], classes), interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
