"""What `fit` draws and trains on (S10): no golden case calls it, so faults are held to this."""

import importlib
from types import ModuleType
from typing import Any

import numpy as np

from spec.config import Config, load_config
from spec.noise import training_draws

SAME = 1e-12  # relative, in float64: memory may be laid out otherwise, and sums run otherwise
# Images and times share a divisor: the same whole number, drawn twice from one key and reduced to
# two ranges without one, gives pairs as independent as any.
IMAGES, TIMES = 15, 10
STEPS = 250  # of native draws; with 8 rows each, every pair of an image and a time comes up
SIGMAS = 5.0  # how far a statistic may stand from what is expected: 6e-7 of right draws do
SHARED_STEPS = 4


def problem_of_fit(package: ModuleType) -> str | None:
    """What is wrong with the `fit` of an implementation, in a sentence; None where it is right.

    With shared noise, it must do what `train_step` does on the shared stream's draws. With native
    noise, what it gives to `train_step` of the package's module `train` must be distributed as S8
    says, follow from the seed and the step, and differ between steps.
    """
    return _shared_problem(package) or _native_problem(package)


def problem_of_seeds(package: ModuleType) -> str | None:
    """What is wrong with how native draws follow from the seed of `open`; None where it is right.

    Any two seeds must give other draws, neighbours and those that differ in a high bit alike: some
    generators drop a part of a key.
    """
    seeds = (0, 1, 2, 2**31, 2**32 - 1)
    batches = [_native(package, seed, (1,))[0] for seed in seeds]
    for i, one in enumerate(seeds):
        for j, other in enumerate(seeds[:i]):
            if _overlap(batches[i], batches[j]):
                return f"fit draws the same numbers for the seeds {other} and {one}"
    return None


def _data(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Images that are all of one value, their number / IMAGES, and labels that follow from it."""
    values = np.arange(IMAGES) / IMAGES
    images = np.ones((IMAGES, *config.image_shape)) * values[:, None, None, None]
    return images, np.arange(IMAGES) * 3 % config.num_classes


def _open(package: ModuleType, config: Config, seed: int) -> Any:
    return package.open(
        config, None, seed=seed, dtype="float64", device="cpu", mode=package.modes[0]
    )


def _shared_problem(package: ModuleType) -> str | None:
    config, seed = load_config("tiny"), 3
    images, labels = _data(config)
    fitted, stepped = _open(package, config, seed), _open(package, config, seed)
    losses = list(fitted.fit(images, labels, 1, True))  # and a second call goes on from there
    losses += fitted.fit(images, labels, SHARED_STEPS - 1, True)
    if len(losses) != SHARED_STEPS:
        return f"fit gave {len(losses)} losses for {SHARED_STEPS} steps"
    for step, loss in enumerate(losses):
        rows, t, noise, drop = training_draws(config, IMAGES, seed, step)
        expected = stepped.train_step(images[rows], t, noise, labels[rows], drop)
        if not abs(loss - expected) <= SAME * abs(expected):
            return (
                f"with shared noise, fit gives the loss {loss} at step {step}; "
                f"train_step on the stream's draws gives {expected}"
            )
    one, other = fitted.state(), stepped.state()
    if one["step"] != other["step"]:
        return f"fit counted {one['step']} steps, train_step {other['step']}"
    for part in ("params", "m", "v", "ema"):
        for name, expected in other[part].items():
            if name.endswith("to_k.bias"):  # what a step makes of its gradient is rounding (S8)
                continue
            if np.linalg.norm(one[part][name] - expected) > SAME * np.linalg.norm(expected):
                return f"with shared noise, fit trains {part}[{name}] otherwise than train_step"
    return None


def _small() -> Config:
    """A config whose steps cost little: of draws, it takes many to see a frequency."""
    return load_config("tiny").replace(
        image_size=(2, 2),
        channels=(4, 4),
        groups=2,
        attention_levels=(),
        timesteps=TIMES,
        batch_size=8,
    )


def _native(package: ModuleType, seed: int, counts: tuple[int, ...]) -> list[list[np.ndarray]]:
    """x0, t, noise, labels, drop of every step of a new model, which fits once for each count."""
    train: Any = importlib.import_module(f"{package.__name__}.train")
    config = _small()
    images, labels = _data(config)
    seen: list[list[np.ndarray]] = []
    real = train.train_step

    def record(state: Any, tables: Any, config: Any, *batch: Any) -> Any:
        seen.append([np.asarray(value).copy() for value in batch])
        return real(state, tables, config, *batch)

    train.train_step = record
    try:
        model = _open(package, config, seed)
        for count in counts:
            for _ in model.fit(images, labels, count):
                pass
    finally:
        train.train_step = real
    return seen


def _native_problem(package: ModuleType) -> str | None:
    config = _small()
    _, labels = _data(config)
    run, again = _native(package, 5, (STEPS,)), _native(package, 5, (3, 2))
    if (len(run), len(again)) != (STEPS, 5):
        return f"fit took {len(run)} and {len(again)} train steps; expected {STEPS} and 5"
    if not all(map(_same, run, again)):
        return "fit draws other numbers for the same seed and step"
    if any(_overlap(run[i], run[i + 1]) for i in range(STEPS - 1)):
        return "fit draws the same numbers at two steps"
    x0, t, noise, given, drop = (np.concatenate(column) for column in zip(*run, strict=True))
    rows = np.rint(x0.reshape(len(x0), -1)[:, 0] * IMAGES).astype(int)
    if (given != labels[rows]).any():
        return "fit gives images the labels of other images"
    rate = config.label_dropout
    return (
        _sharing_problem("image", rows, 1 / IMAGES)
        or _sharing_problem("time", t, 1 / config.timesteps)
        or _sharing_problem("choice to drop the label", drop, rate**2 + (1 - rate) ** 2)
        or _frequency_problem("images", rows, IMAGES)
        or _frequency_problem("times", t, config.timesteps)
        or _rate_problem("a dropped label", drop, rate)
        or _joint_problem("images and times", rows, t)
        or _joint_problem("images and dropped labels", rows, drop)
        or _joint_problem("times and dropped labels", t, drop)
        or _carried_problem("images", rows, noise)
        or _carried_problem("times", t, noise)
        or _carried_problem("dropped labels", drop, noise)
        or _normal_problem(noise)
    )


def _same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    """Whether two train steps were given the same numbers."""
    return all(map(np.array_equal, one, other))


def _overlap(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    """Whether two steps share noise, be it elsewhere in the batch, as where a counter overlaps."""
    return len(np.intersect1d(one[2], other[2])) > one[2].size // 8


def _frequency_problem(what: str, values: np.ndarray, count: int) -> str | None:
    if values.min() < 0 or values.max() >= count:
        return f"{what} from {values.min()} to {values.max()} were drawn; expected 0..{count - 1}"
    for value in range(count):
        problem = _rate_problem(f"{value} of the {what}", values == value, 1 / count)
        if problem:
            return problem
    return None


def _rate_problem(what: str, hits: np.ndarray, rate: float) -> str | None:
    allowed = SIGMAS * np.sqrt(rate * (1 - rate) / len(hits))
    if not abs(hits.mean() - rate) <= allowed:
        return f"{what} was drawn {hits.mean():.3f} of the time; expected {rate:.3f}"
    return None


def _sharing_problem(what: str, values: np.ndarray, rate: float) -> str | None:
    """That two rows of a batch are the same no more often than two draws; values [STEPS * B]."""
    one, other = np.split(values.reshape(STEPS, -1), 2, axis=1)  # pairs, so that none shares a row
    return _rate_problem(f"the same {what} for two rows of a batch", (one == other).ravel(), rate)


def _joint_problem(what: str, one: np.ndarray, other: np.ndarray) -> str | None:
    """Pearson's test that two draws of a row, [N] each, are independent of one another.

    The squared deviations of a table's cells from the product of its margins, each over its
    expectation, add up to chi-square of (I - 1)(J - 1) degrees of freedom, k. The cube root of
    chi-square / k is normal, but for little, with mean 1 - 2/(9k) and variance 2/(9k) (Wilson and
    Hilferty 1931), and may stand SIGMAS above its mean. Expectations here are 13 and more.
    """
    (_, one), (_, other) = (np.unique(v, return_inverse=True) for v in (one, other))
    seen = np.zeros((one.max() + 1, other.max() + 1))
    np.add.at(seen, (one, other), 1)
    expected = seen.sum(1, keepdims=True) * seen.sum(0) / len(one)
    chi_square = float(((seen - expected) ** 2 / expected).sum())
    freedom = (len(seen) - 1) * (len(seen[0]) - 1)
    spread = 2 / (9 * freedom)
    allowed = freedom * (1 - spread + SIGMAS * np.sqrt(spread)) ** 3
    if not chi_square <= allowed:
        return (
            f"{what} go together: chi-square is {chi_square:.0f}, at most {allowed:.0f} where they "
            "are independent; look for two draws from the same key"
        )
    return None


def _carried_problem(what: str, values: np.ndarray, noise: np.ndarray) -> str | None:
    """That no number of a batch's noise goes with a draw of it; values [STEPS * B].

    From one key, a generator that counts gives the noise's first B numbers, all of row 0, and the B
    draws the same bits. So each draw is held against each number of the noise, by their correlation
    over the steps. These are hundreds of pairs, so a correlation may stand one sigma further out.
    """
    drawn, numbers = values.reshape(STEPS, -1), noise.reshape(STEPS, -1)
    drawn, numbers = ((a - a.mean(0)) / np.maximum(a.std(0), 1e-9) for a in (drawn, numbers))
    most, allowed = abs(drawn.T @ numbers).max() / STEPS, (SIGMAS + 1) / np.sqrt(STEPS)
    if not most <= allowed:
        return (
            f"{what} and noise go together: a correlation is {most:.2f}, at most {allowed:.2f} "
            "where they are independent; look for two draws from the same key"
        )
    return None


def _normal_problem(noise: np.ndarray) -> str | None:
    allowed = SIGMAS / np.sqrt(noise.size)
    if abs(noise.mean()) > allowed or abs(noise.var() - 1) > allowed * np.sqrt(2):
        return f"noise has mean {noise.mean():.3f} and variance {noise.var():.3f}; expected 0 and 1"
    rows = noise.reshape(len(noise), -1)
    if len(np.unique(rows, axis=0)) < len(rows):
        return "two rows have the same noise"
    return None
