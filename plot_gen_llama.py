"""Plot the results of a generation run, from its folder products/<timestamp>.

Figures: lengths (of prompts, completions and both, by passed and failed), size_by_layer (kept elements
relative to Top-k, by layer and phase). Figures whose files are missing are skipped with a message. Thresholds
and kept attention: plot_th_llama.py.
"""

from toptheta.report.plots.flags import parse_request
from toptheta.util.program import run_main


def main() -> int:
    request = parse_request("Plot the lengths of a generation run and its kept elements relative to Top-k.")
    # Not at the top: pandas and matplotlib take a second to load, and --help and wrong flags need neither.
    from toptheta.report.plots.generation import FIGURES, INPUTS
    from toptheta.report.plots.report import draw_report

    return draw_report(request, FIGURES, INPUTS)


if __name__ == "__main__":
    run_main(main)
