"""Histograms of effective K from given counts, and the table that a run writes of them."""

import csv
from pathlib import Path

import numpy as np
import torch

from toptheta.attention import effective_k as effective


def histogram_of(kept: np.ndarray, n: np.ndarray) -> np.ndarray:
    histogram = effective.empty_histogram()
    effective.count_rows(
        histogram, torch.from_numpy(kept)[None, None], torch.from_numpy(n)[None], torch.ones(1, len(n)) > 0
    )
    return histogram.numpy()


def rows_of_csv(folder: Path) -> list[dict]:
    with open(folder / "effective_k.csv") as file:
        rows = [{x: y if x == "phase" else float(y) for x, y in row.items()} for row in csv.DictReader(file)]
    assert all(tuple(row) == effective.COLUMNS for row in rows)
    return rows
