"""Top-theta attention: sparse attention for Llama-family models by calibrated thresholds (arXiv
2502.08363)."""

__version__ = "0.2.0"
