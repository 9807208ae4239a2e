"""Draw what a generation run produced, from its folder products/<timestamp>.

Figures: lengths (prompts, completions and both, by passed and failed), size_by_layer (kept elements relative
to Top-k, by layer and phase). What has no file is named and left out. Thresholds and kept attention:
plot_th_llama.py.
"""

import sys

from toptheta.plots.flags import plot_parser


def main() -> int:
    args = plot_parser("Draw the lengths of a generation run and its sizes relative to Top-k.").parse_args()
    # Not at the top: pandas and matplotlib take a second to load, which --help need not wait for.
    from toptheta.plots.generation import FIGURES, INPUTS
    from toptheta.plots.report import draw_report

    return draw_report(args, FIGURES, INPUTS)


if __name__ == "__main__":
    sys.exit(main())
