"""The figure that compares methods: accuracy against kept attention elements and V rows."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from toptheta.report.plots.tradeoff import draw_tradeoff, tradeoff_figure
from toptheta.report.results import CellResult, Kept, Metric
from toptheta.util.errors import UsageError


def result_of(method: str, k: int | None, accuracy: float, kept: float | None) -> CellResult:
    share = None if kept is None else Kept(kept, min(1.0, 2 * kept))
    return CellResult(
        method,
        task="arc_easy",
        k=k,
        dense=k is None,
        metrics={name: Metric(accuracy, 0.02, 500) for name in ("acc", "acc_norm")},
        kept={"prefill": share, "generative_decoding": None},
    )


def tradeoff_results() -> list[CellResult]:
    results = [result_of("dense", None, 0.6, 1.0)]
    for k, kept in ((128, 0.5), (32, 0.15), (64, 0.3)):
        results.append(result_of(f"Top-k K={k}", k, 0.6 - 2 / k, kept))
        results.append(result_of(f"Top-theta K={k}", k, 0.6 - 3 / k, kept * 1.05))
    results.append(result_of("Top-theta capk", 64, 0.5, 0.2))
    return results


def test_tradeoff_joins_the_ks_of_a_method(tmp_path: Path) -> None:
    figure, notes = tradeoff_figure([*tradeoff_results(), result_of("no statistics", 64, 0.5, None)], "t")
    left, right = figure.axes
    assert left.get_ylabel() == "accuracy (acc_norm) on arc_easy (%)"
    assert left.get_xlabel() == "kept attention elements in prefill (% of dense attention)"
    assert right.get_xlabel() == "kept V rows in prefill (% of dense attention)"
    curves = [line.get_xydata().T for line in left.get_lines() if line.get_marker() == "o"]
    np.testing.assert_allclose(curves[0], [[15, 30, 50], [60 - 200 / 32, 60 - 200 / 64, 60 - 200 / 128]])
    assert sorted(text.get_text() for text in left.texts) == [
        "K=128",
        "K=128",
        "K=32",
        "K=32",
        "K=64",
        "K=64",
    ]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["dense", "Top-k", "Top-theta", "Top-theta capk", "± standard error (band, bars)"]
    assert len(notes) == 1 and notes[0].startswith("no statistics has no counts of kept elements")
    assert draw_tradeoff(tradeoff_results(), tmp_path / "new" / "tradeoff.pdf", "t") == []
    assert (tmp_path / "new" / "tradeoff.pdf").read_bytes().startswith(b"%PDF")


def test_tradeoff_labels_cover_nothing() -> None:
    figure, _ = tradeoff_figure(tradeoff_results(), "t")
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        for line in axes.get_lines():
            if line.get_marker() in ("o", "s", "^"):
                points = axes.transData.transform(line.get_xydata())
                assert not any(box.contains(*point) for box in boxes for point in points)


def test_tradeoff_metric_and_phase() -> None:
    metrics = {"rouge": Metric(12.5), "pass@1": Metric(0.25)}
    results = [
        replace(result, metrics=metrics, kept=(result.kept or {}) | {"generative_decoding": Kept(0.1, 0.2)})
        for result in tradeoff_results()
    ]
    figure, _ = tradeoff_figure(results, "t")
    assert figure.axes[0].get_ylabel() == "pass@1 on arc_easy (%)"
    assert figure.axes[0].get_xlabel() == "kept attention elements in decode (% of dense attention)"
    results[2] = replace(results[2], metrics={"rouge": Metric(12.5)})
    assert tradeoff_figure(results, "t")[0].axes[0].get_ylabel() == "rouge on arc_easy"


def test_tradeoff_refuses_what_it_cannot_draw() -> None:
    dense, *sparse = tradeoff_results()
    for results, words in (
        ([], "no results"),
        ([dense], "no sparse method has"),
        ([dense, replace(sparse[0], task="gsm8k")], "several tasks"),
        ([dense, replace(sparse[0], metrics={"f1": Metric(1.0)})], "no metric in common"),
    ):
        with pytest.raises(UsageError, match=words):
            tradeoff_figure(results, "t")


def test_a_failed_drawing_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tradeoff.png"
    path.write_bytes(b"old")

    def fail(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match=r"No space left on device: .*tradeoff.png"):
        draw_tradeoff(tradeoff_results(), path, "t")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


def test_tradeoff_of_paired_results_has_paired_bars() -> None:
    """Where each sparse result was compared with dense question by question, and there is one dense."""
    extra = {"paired": {"scores": {"acc_norm": {"value": -0.01, "stderr": 0.005}}}}
    results = [result if result.dense else replace(result, extra=extra) for result in tradeoff_results()]

    def bars_and_legend(some: list[CellResult]) -> tuple[set[float], str]:
        figure, _ = tradeoff_figure(some, "t")
        axes = figure.axes[0]
        ends = [path.vertices[:, 1] for bars in axes.collections for path in bars.get_paths()]
        return {round(float(np.ptp(y)), 6) for y in ends}, figure.legends[0].get_texts()[-1].get_text()

    assert bars_and_legend(results) == ({1.0}, "± paired standard error, to dense")
    rounded = replace(results[0], method="dense bfloat16", extra=extra)
    assert results[0].dense and bars_and_legend([*results, rounded])[1] == "± paired standard error, to dense"
    unpaired = ({4.0}, "± standard error (band, bars)")
    assert bars_and_legend([*results, results[0]])[1] == unpaired[1]
    assert bars_and_legend([*results[:-1], tradeoff_results()[-1]]) == unpaired
