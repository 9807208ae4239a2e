"""Every chart of a report's part, in order."""

from collections.abc import Iterator

from toptheta.report.frames import LoadedRun
from toptheta.report.page.attention_charts import by_layer, by_row_length, kept, popularity, thresholds
from toptheta.report.page.chart import Chart
from toptheta.report.page.result_charts import by_length, needles, tradeoff


def charts(run: LoadedRun) -> Iterator[Chart]:
    """Every chart that the files of a run of one task have data for."""
    for make in (tradeoff, by_length, needles, kept, thresholds, by_layer, by_row_length, popularity):
        chart = make(run)
        if chart is not None:
            yield chart
