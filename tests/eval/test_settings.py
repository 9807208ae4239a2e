"""Settings: the cells of a run, and what fits which script."""

import pytest

from tests.eval.helpers import parse
from toptheta.eval.cli import settings_from_json
from toptheta.eval.settings import GenSettings, QASettings, Settings
from toptheta.util.errors import UsageError


def test_cells() -> None:
    settings = parse("--mode 0,1,3 --k 32,64 --sdc exact --vmc --calib_tac --capk --layerk {0:512,1:0}")
    cells = settings.cells()
    assert [cell.label for cell in cells] == [
        "Top-theta capk K=32",
        "Top-theta capk K=64",
        "Top-k K=32",
        "Top-k K=64",
        "dense",
    ]
    assert [getattr(cell.method, "capk", False) for cell in cells] == [True, True, False, False, False]
    assert settings.layer_ks(cells[0], 4) == (512, 0, 32, 32)
    with pytest.raises(UsageError, match="--layerk names layer 1, but the model has layers 0 to 0"):
        settings.layer_ks(cells[0], 1)
    assert [cell.label for cell in parse("--mode 0 --placement none").cells()] == ["dense"]
    again = settings_from_json(Settings, settings.to_json())
    assert again == settings


def test_settings_of_each_script() -> None:
    with pytest.raises(UsageError, match="add --do_sample"):
        settings_from_json(GenSettings, GenSettings(num_samples_per_task=3).to_json())
    with pytest.raises(UsageError, match="does not fit this script"):
        settings_from_json(QASettings, GenSettings().to_json())
