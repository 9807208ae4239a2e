"""One attention call: its rows, the reference, what it counts. Knows nothing of transformers."""
