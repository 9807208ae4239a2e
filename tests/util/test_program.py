"""What a program prints on the terminal."""

import subprocess
import sys

PROGRAM = """
import warnings
from toptheta.util.program import run_main

def main():
    warnings.warn("the kernel is slow today")

run_main(main)
"""


def test_warnings_are_one_line() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "warning: the kernel is slow today\n")
