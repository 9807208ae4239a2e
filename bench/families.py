"""Write docs/families.md: what was tested for each model family, from a run of test_families.py.

Each cell is a test; the table is written only if all of them pass.
"""

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from toptheta.models.families import FAMILIES  # noqa: E402

TESTS = ROOT / "tests" / "models" / "test_families.py"
TABLE = ROOT / "docs" / "families.md"
COLUMNS = {
    "prefill": "test_prefill",
    "decode": "test_decode",
    "static cache": "test_static_cache",
    "compile": "test_compile",
    "padding": "test_padding",
    "sliding window": "test_sliding_window",
    "statistics": "test_statistics",
    "kernels": "test_kernels",
    "attn_implementation": "test_attn_implementation",
}


class Cells:
    """A pytest plugin that records the outcome of each test, by name and family."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if "[" not in report.nodeid or report.when != "call" and report.passed:
            return
        test, family = report.nodeid.split("::")[-1].rstrip("]").split("[")
        if report.passed:
            self.found[test, family] = dict(report.user_properties).get("cell", "tested")
        else:
            self.found[test, family] = "none" if report.skipped else "FAILED"


def table(found: dict[tuple[str, str], str]) -> str:
    lines = [
        "| " + " | ".join(["family", "models", "differs from Llama in", *COLUMNS]) + " |",
        "|" + "---|" * (3 + len(COLUMNS)),
    ]
    for family in FAMILIES:
        cells = [found.get((test, family.name), "not run") for test in COLUMNS.values()]
        lines.append("| " + " | ".join([family.name, family.title, family.differs or "-", *cells]) + " |")
    return "\n".join(lines)


def main() -> int:
    cells = Cells()
    code = int(pytest.main(["-q", str(TESTS), *sys.argv[1:]], plugins=[cells]))
    text = f"""# Model families

Written by `python bench/families.py`, with transformers {transformers.__version__} and torch \
{torch.__version__.split("+")[0]}, on CPU. Each cell is a passed test in
[tests/models/test_families.py](../tests/models/test_families.py) on a tiny random model: with K at least the
sequence length, the output equals stock eager attention within rounding; with a smaller K it equals slow
loops, for Top-k and Top-theta on scores and on weights, with SDC and VMC. *kernels*: the backend that
computes the attention calls on a CPU. *compile*: torch.compile traces a step behind a static cache as one
graph (its eager backend computes it; no code is generated). *none*: no layer has a sliding window.

{table(cells.found)}
"""
    print(text)
    if code == 0:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(text)
        print(f"Written: {TABLE.relative_to(ROOT)}")
    return code


if __name__ == "__main__":
    sys.exit(main())
