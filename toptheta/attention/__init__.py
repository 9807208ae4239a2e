"""One attention call: its rows, the reference implementation and its counts. Independent of transformers."""
