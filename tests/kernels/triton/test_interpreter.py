"""The tests of the Triton kernels in Triton's interpreter, where there is no GPU."""

import os
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT
from tests.kernels.triton.helpers import HERE, needs_triton

FOLDER = ROOT / "tests" / "kernels" / "triton"
FILES = {  # in parts of a few minutes, which run side by side
    "attend": ["attend"],
    "options": ["value_aware", "operators", "refusals", "hub_package", "key_copy", "append"],
    "models": ["whole_models", "when_slower"],
    "benchmarks": ["benchmarks", "tune"],
}
INT8_KEYS = str(FOLDER.parent / "test_int8_keys.py")


@needs_triton
@pytest.mark.skipif(HERE, reason="the tests run in this process")
@pytest.mark.parametrize(
    "part", [pytest.param(part, marks=[pytest.mark.long] * (part == "benchmarks")) for part in FILES]
)
def test_in_the_interpreter(part: str, request: pytest.FixtureRequest):
    files = [str(FOLDER / f"test_{name}.py") for name in FILES[part]]
    files += [INT8_KEYS] if part == "options" else []
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    command += ["-m", request.config.option.markexpr]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]
