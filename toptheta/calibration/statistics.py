"""Running sums of calibration samples per (head, row length), and the thresholds derived from them."""

import torch
from torch import Tensor


def grown(x: Tensor, length: int) -> Tensor:
    """`x` `[..., L]` with zeros up to `length`; it can be changed in place in and out of inference mode."""
    with torch.inference_mode(False):
        return torch.nn.functional.pad(x, (0, length - x.shape[-1]))


class RunningSums:
    """Count, sum and sum of squares of samples per (head, n). The size grows with the longest row, not with
    the number of samples.

    Sums are float64: a variance from float32 sums loses its digits after a few hundred samples.
    """

    def __init__(self, num_heads: int, device: torch.device):
        self.count = torch.zeros(num_heads, 0, dtype=torch.int64, device=device)
        self.total = torch.zeros(num_heads, 0, dtype=torch.float64, device=device)
        self.squares = torch.zeros(num_heads, 0, dtype=torch.float64, device=device)

    def reserve(self, max_n: int) -> None:
        """Allocate row lengths up to `max_n`."""
        if max_n >= self.count.shape[1]:
            sums = (self.count, self.total, self.squares)
            self.count, self.total, self.squares = (grown(one, max_n + 1) for one in sums)

    def add(self, samples: Tensor, n: Tensor, sampled: Tensor) -> None:
        """Add samples `[B, H, R]` of rows with lengths n `[B, R]`, where sampled `[B, R]` holds."""
        num_heads = samples.shape[1]
        index = torch.where(sampled, n, 0).reshape(
            -1
        )  # length 0 does not occur: it takes what is not sampled
        values = torch.where(sampled[:, None], samples, 0.0).double().transpose(0, 1).reshape(num_heads, -1)
        self.count.index_add_(1, index, sampled.reshape(-1).long().expand(num_heads, -1))
        self.total.index_add_(1, index, values)
        self.squares.index_add_(1, index, values * values)

    def mean(self) -> Tensor:
        """`[H, L]` float64; NaN where nothing was sampled."""
        return self.total / self.count

    def threshold(self, add_sigma: float) -> Tensor:
        """mean + add_sigma * population standard deviation, `[H, L]` float64; NaN where nothing was
        sampled."""
        mean = self.mean()
        if add_sigma == 0.0:
            return mean
        variance = (self.squares / self.count - mean * mean).clamp_min(0.0)
        # One sample has no spread; rounding in the line above must not give it any.
        return mean + add_sigma * torch.where(self.count > 1, variance.sqrt(), 0.0)

    def state(self) -> dict[str, Tensor]:
        return {"count": self.count, "total": self.total, "squares": self.squares}

    def load_state(self, state: dict[str, Tensor]) -> None:
        device = self.count.device
        self.count, self.total, self.squares = (
            state[key].to(device) for key in ("count", "total", "squares")
        )

    def add_state(self, state: dict[str, Tensor]) -> None:
        """Add the sums of another process."""
        length = state["count"].shape[1]
        self.reserve(length - 1)
        for key, sums in self.state().items():
            sums[:, :length] += state[key].to(sums.device)
