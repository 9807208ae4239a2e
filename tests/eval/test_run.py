"""Where the cells of a run have their products."""

from pathlib import Path

from toptheta.eval.run import Run, product_folder
from toptheta.eval.settings import QASettings


def test_folders_of_earlier_versions_are_found(tmp_path: Path) -> None:
    """They were named by mode and K alone, also with --capk."""
    run = Run(tmp_path, QASettings(mode=(0, 1), k=(16, 32), capk=True), "test_llama.py")
    (tmp_path / "mode0_k16").mkdir()
    names = [product_folder(run, cell).name for cell in run.settings.cells()]
    assert names == ["mode0_k16", "top_theta_capk_k32", "mode1_k16", "mode1_k32"]
    single = Run(tmp_path, QASettings(mode=(3,)), "test_llama.py")
    assert product_folder(single, single.settings.cells()[0]) == tmp_path
