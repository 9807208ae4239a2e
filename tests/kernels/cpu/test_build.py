"""Building of the CPU kernel: a failing compiler, two processes at once."""

import os
import subprocess
import sys

import pytest

from tests.helpers.kernel_cases import needs_kernel
from toptheta.kernels.cpu import library


def test_failing_compiler_names_the_error(monkeypatch, tmp_path):
    monkeypatch.setenv("TOPTHETA_CACHE", str(tmp_path))
    with pytest.raises(RuntimeError, match="failed"):
        library.build(compiler=["false"])
    assert not list(tmp_path.glob("*.so"))


@pytest.mark.parametrize(
    "platform, says", [("win32", "not made for Windows"), ("darwin", "set CXX to Homebrew")]
)
def test_says_why_it_is_not_built(platform, says, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeError, match=says):
        library.build()


def test_imports_without_fcntl():
    """As on Windows."""
    script = "import sys, torch, filelock; sys.modules['fcntl'] = None; import toptheta.kernels.registry"
    subprocess.run([sys.executable, "-c", script], check=True)


@needs_kernel
def test_two_processes_build_once(tmp_path):
    script = "from toptheta.kernels.cpu import library as b; assert not isinstance(b.load(), str), b.load()"
    env = os.environ | {"TOPTHETA_CACHE": str(tmp_path)}
    started = [
        subprocess.Popen([sys.executable, "-c", script], env=env, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert "".join(said).count("compiling") == 1
    assert len(list(tmp_path.glob("*.so"))) == 1
