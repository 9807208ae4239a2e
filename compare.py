"""Compare any runs on the same questions, question by question: the first is the baseline.

A run is a folder of products; of a run of several cells all are taken, dense ones first, or the one named by
RUN/CELL. Writes a table (markdown, CSV, JSON) and a picture of the 95% intervals.
"""

from toptheta.eval.commands import compare

if __name__ == "__main__":
    compare()
