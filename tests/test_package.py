"""The package: a wheel holds every file that the code reads, and works where there is no checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import toptheta
from tests.helpers.paths import ROOT
from toptheta.eval import commands

tomllib = pytest.importorskip("tomllib")  # of Python 3.11
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MODULES = [f"{name}.py" for name in PYPROJECT["tool"]["setuptools"]["py-modules"]]


def run(*command: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ | env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, for a build leaves files in its source."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "toptheta", source / "toptheta", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", *MODULES):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet")
    run(*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", "wheels", ".", cwd=source)
    return next((source / "wheels").glob("*.whl"))


def test_the_wheel_holds_all_files(wheel: Path) -> None:
    assert wheel.name.startswith(f"toptheta-{toptheta.__version__}-py3-none-any")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if "dist-info" not in name}
    code = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "toptheta").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert held == {*code, *MODULES}


def test_an_installed_package_works(wheel: Path, tmp_path: Path, folder_model: str) -> None:
    """In a folder of its own, away from the checkout: a command, the bundled task, the kernel's source."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    run(*pip, "--no-deps", "--target", "site", str(wheel), cwd=tmp_path)
    env = {"PYTHONPATH": str(tmp_path / "site"), "TOPTHETA_KERNEL": "cpu", "OMP_NUM_THREADS": "1"}
    flags = ["--llama", folder_model, "--mode", "1", "--k", "8", "--num_samples", "1", "--num_fewshot", "0"]
    done = run("site/bin/toptheta-qa", *flags, "--device", "cpu", "--no_statistics", cwd=tmp_path, **env)
    assert "Top-k K=8" in done
    (folder,) = (tmp_path / "products").iterdir()
    assert (folder / "results.json").is_file()


def test_console_scripts_are_functions() -> None:
    for target in PYPROJECT["project"]["scripts"].values():
        module, name = target.split(":")
        assert callable(getattr(import_module(module), name))


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)  # as if it were not installed
    with pytest.raises(SystemExit) as ended:
        commands.lm_eval()
    assert ended.value.code == 2
    assert "lm_eval.__main__ is not installed: run pip install 'toptheta[eval]'" in capsys.readouterr().err


def test_the_entry_point_of_lm_eval() -> None:
    module, name = PYPROJECT["project"]["entry-points"]["lm_eval.models"]["toptheta"].split(":")
    model = getattr(import_module(module), name)
    from lm_eval.api.registry import get_model

    assert get_model("toptheta") is model


def test_requirements_lie_within_the_ranges() -> None:
    """What the tests run with is what the package asks for, in the versions that it takes."""
    pins = dict[str, list[str]]()
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pinned = Requirement(line)
            pins.setdefault(_name(pinned), []).append(str(pinned.specifier).removeprefix("=="))
    extras = PYPROJECT["project"]["optional-dependencies"]["eval"]
    asked = [Requirement(text) for text in (*PYPROJECT["project"]["dependencies"], *extras)]
    assert {_name(one) for one in asked} == set(pins)
    for one in asked:
        for version in pins[_name(one)]:
            assert version in one.specifier, one


def _name(requirement: Requirement) -> str:
    return requirement.name.lower().replace("_", "-")


def test_one_version_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == toptheta.__version__
    assert f"## {toptheta.__version__}" in (ROOT / "CHANGELOG.md").read_text()
