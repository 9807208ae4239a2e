"""The rows of a mask: which keys each sequence sees."""

import torch

from toptheta.attention.rows import rows_of


def test_span_of_the_visible_keys():
    """First visible key and the one after the last, by sequence; nothing visible is an empty span."""
    mask = torch.zeros(3, 1, 2, 9, dtype=torch.bool)
    mask[0, 0, 0, 2:5] = mask[0, 0, 1, 7] = mask[1, 0, 1, 8] = True
    rows = rows_of(mask, 2, 9, torch.device("cpu"))
    assert rows.span().tolist() == [[2, 8], [8, 9], [0, 0]] and rows.span() is rows.span()
    assert rows_of(None, 1, 9, torch.device("cpu")).span() is None
