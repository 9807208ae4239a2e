"""--calib_load_path is checked for every cell before the model is loaded."""

from pathlib import Path

import pytest

from tests.eval.helpers import calibrating_settings
from toptheta.eval import runner
from toptheta.util.errors import UsageError
from toptheta.util.files import write_text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": (3, 0), "k": (16, 32)}, r"folder, Top-theta K=32: .* were calibrated for K=16, not for K"),
        ({"placement": "post-softmax"}, "Top-theta K=16: the thresholds go down to -0.5"),
        ({"sdc": "offline-calibrated"}, "Top-theta K=16: the SDC table lacks layer 0"),
        ({"method": ("dense", "top_k:sdc=offline-calibrated")}, "Top-k sdc=offline-.*: the SDC table lacks"),
        ({"calib_load_path": "run"}, r"^--calib_load_path is 'run', .*: name one of its cells \(a, task/b\)"),
        ({"calib_load_path": "empty"}, "^--calib_load_path is 'empty', .* sdc.txt: calibrate first"),
        ({"calib_load_path": "larger"}, "^--calib_load_path: .* 3 layers and 6 heads, but this model has 2"),
    ],
)
def test_tables_that_do_not_fit(
    changes: dict, message: str, folder_model: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"L{layer}_H{head}:{n} -0.5 2 16\n" for layer in range(3) for head in range(6) for n in (20, 40)]
    write_text("folder/th.txt", "".join(lines[:24]))
    write_text("run/a/th.txt", "".join(lines[:24]))
    write_text("run/task/b/sdc.txt.gz", "")
    write_text("larger/th.txt", "".join(lines))
    Path("empty").mkdir()
    monkeypatch.setattr(runner, "_load", lambda job, source: pytest.fail("the model was loaded"))
    values = {"mode": (0,), "calib_load_path": "folder", "calib_samples": None, "calib_sample_frac": 0.1}
    values |= {"mode": (3,)} if "method" in changes else {}
    with pytest.raises(UsageError, match=message):
        runner.evaluate(calibrating_settings(folder_model, **values | changes))
    assert not Path("products").exists()
