"""S1 at 50 digits: the reference tables, computed with mpmath and kept in `spec/schedules/*.csv`.

A generator's module: it imports mpmath when asked for a table. The backends never import it.
"""

import functools
from pathlib import Path

import numpy as np

from spec.config import Config, load_config

SCHEDULES = Path(__file__).parent / "schedules"
DIGITS = 17  # significant, enough to give back every float64
PLACES = 50  # in which mpmath computes
# File stem -> the config's fields that make this schedule.
CASES: dict[str, dict[str, object]] = {
    "ho2020": {"schedule": "linear", "timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02},
    "nichol2021": {"schedule": "cosine", "timesteps": 1000},
    # 3e-4 * 1000 / T and 0.03 * 1000 / T
    "linear_300": {"schedule": "linear", "timesteps": 300, "beta_start": 1e-3, "beta_end": 0.1},
    "linear_1": {"schedule": "linear", "timesteps": 1, "beta_start": 1e-4, "beta_end": 0.02},
    "linear_2": {"schedule": "linear", "timesteps": 2, "beta_start": 1e-4, "beta_end": 0.02},
    "linear_20": {"schedule": "linear", "timesteps": 20, "beta_start": 5e-3, "beta_end": 0.4},
    "cosine_1": {"schedule": "cosine", "timesteps": 1},
    "cosine_2": {"schedule": "cosine", "timesteps": 2},
    "cosine_24": {"schedule": "cosine", "timesteps": 24},
    "cosine_4000": {"schedule": "cosine", "timesteps": 4000},
}
NAMES = (
    "betas",
    "alphas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)


@functools.cache
def digits(
    schedule: str, timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02
) -> dict[str, list[str]]:
    """Table name -> T numbers as decimal text of 17 significant digits.

    beta_start and beta_end are taken as the decimal numbers that a config shows.
    """
    from mpmath import mp

    with mp.workdps(PLACES):
        one, offset, period = mp.mpf(1), mp.mpf("0.008"), mp.mpf("1.008")
        if schedule == "linear":
            start, end = mp.mpf(repr(beta_start)), mp.mpf(repr(beta_end))
            gap = (end - start) / max(timesteps - 1, 1)
            betas = [start + i * gap for i in range(timesteps)]
        else:
            f = [
                mp.cos((mp.mpf(t) / timesteps + offset) / period * mp.pi / 2) ** 2
                for t in range(timesteps + 1)
            ]
            betas = [min(1 - f[t + 1] / f[t], mp.mpf("0.999")) for t in range(timesteps)]
        rows, before = [], one
        for beta in betas:
            now = before * (1 - beta)
            rows.append(
                (
                    beta,
                    1 - beta,
                    now,
                    before,
                    mp.sqrt(now),
                    mp.sqrt(1 - now),
                    mp.sqrt(1 / now),
                    mp.sqrt(1 / now - 1),
                    beta * (1 - before) / (1 - now),
                    beta * mp.sqrt(before) / (1 - now),
                    (1 - before) * mp.sqrt(1 - beta) / (1 - now),
                )
            )
            before = now
        columns = zip(*rows, strict=True)
        return {
            name: [mp.nstr(value, DIGITS, strip_zeros=False) for value in column]
            for name, column in zip(NAMES, columns, strict=True)
        }


def exact_tables(config: Config) -> dict[str, np.ndarray]:
    """The tables of a config, [T] float64: the decimal texts, rounded once."""
    bounds = (config.beta_start, config.beta_end) if config.schedule == "linear" else ()
    columns = digits(config.schedule, config.timesteps, *bounds)
    return {name: np.array([float(text) for text in column]) for name, column in columns.items()}


def case_config(stem: str) -> Config:
    """Config `tiny` with the schedule of one file."""
    return load_config("tiny").replace(**CASES[stem])


def csv_text(stem: str) -> str:
    """The file of one schedule: a header, then t and the eleven numbers of each row."""
    config = case_config(stem)
    bounds = (config.beta_start, config.beta_end) if config.schedule == "linear" else ()
    columns = digits(config.schedule, config.timesteps, *bounds)
    rows = zip(*(columns[name] for name in NAMES), strict=True)
    lines = [",".join(("t", *NAMES)), *(",".join((str(t), *row)) for t, row in enumerate(rows))]
    return "\n".join(lines) + "\n"


def read_csv(stem: str) -> dict[str, np.ndarray]:
    """The committed tables of one schedule, [T] float64."""
    lines = (SCHEDULES / f"{stem}.csv").read_text(encoding="ascii").splitlines()
    names = lines[0].split(",")
    rows = [[float(text) for text in line.split(",")] for line in lines[1:]]
    return dict(zip(names[1:], np.array(rows).T[1:], strict=True))
