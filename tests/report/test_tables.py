"""Tables of the summary."""

import numpy as np

from tests.helpers.effective_k import histogram_of
from toptheta.attention import effective_k as effective
from toptheta.models.recorder import PREFILL
from toptheta.report import tables as report


def test_the_summary_names_the_farthest_layers() -> None:
    rng = np.random.default_rng(0)
    n, spreads = np.full(500, 1000), (0.05, 0.9, 0.3, 0.6, 0.1)
    histograms = {
        layer: histogram_of(np.exp(np.log(64) + width * rng.normal(size=500)).astype(np.int64), n)
        for layer, width in enumerate(spreads)
    }
    result = {"method": "Top-theta", "effective_k": effective.overall(histograms, PREFILL, (64,) * 5)}
    text = report.effective_k([result, {"method": "dense"}])
    line = text.splitlines()[-1]
    assert len(text.splitlines()) == 3 and "| prefill | 64 | 2500 |" in line
    assert line.index(" 1: ") < line.index(", 3: ") < line.index(", 2: ") and ", 4: " not in line
    assert "no evaluated row was longer" in report.effective_k([{"method": "Top-theta", "effective_k": []}])
