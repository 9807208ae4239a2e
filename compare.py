"""Compare runs on the same questions, question by question. The first is the baseline.

A run is a folder products/<timestamp>; all its cells are compared, dense ones first, or only the one given as
RUN/CELL. Writes a table (markdown, CSV, JSON) and a plot of the 95% intervals.
"""

from toptheta.eval.commands import compare

if __name__ == "__main__":
    compare()
