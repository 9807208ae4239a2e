"""Long prompts: memory stays that of a few blocks of scores."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

BENCH = ROOT / "bench" / "end_to_end.py"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.long
@pytest.mark.parametrize("method", ["Top-theta pre", "Top-k"])
def test_prefill_of_8192_tokens(method: str) -> None:
    """The whole `[9, 8192, 8192]` float32 scores of one layer alone would be 2.4 GB, and each layer needs
    what another one does."""
    command = [sys.executable, str(BENCH), "--memory-of", method, "--layers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 2400
