"""Plot a run's calibrated thresholds and what its attention kept, from its folder products/<timestamp>.

Figures: th (thresholds by row length), size (kept elements relative to Top-k), kept_attn (attention elements
and V rows kept, by layer), effective_k (elements that rows keep, against K; for runs with --effective_k),
sequence_lengths. Figures whose files are missing are skipped with a message. Lengths of generated answers:
plot_gen_llama.py.
"""

from toptheta.report.plots.flags import parse_request
from toptheta.util.program import run_main


def main() -> int:
    request = parse_request("Plot a run's thresholds and what its attention kept.")
    # Not at the top: pandas and matplotlib take a second to load, and --help and wrong flags need neither.
    from toptheta.report.plots.report import draw_report
    from toptheta.report.plots.thresholds import FIGURES, INPUTS

    return draw_report(request, FIGURES, INPUTS)


if __name__ == "__main__":
    run_main(main)
