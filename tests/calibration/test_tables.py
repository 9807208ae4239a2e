"""Calibrated tables to files and back, and tables that do not fit the model."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from tests.helpers.calibration import calibrated, prompts
from topk_llama import set_params, update_model
from toptheta.calibration.tables import BINARY_NAME, load_tables, save_tables
from toptheta.models.calibrate import calibrated_tables
from toptheta.util.errors import UsageError

pytestmark = pytest.mark.usefixtures("path")


def test_files_and_back(tiny_model: LlamaForCausalLM, tmp_path: Path) -> None:
    calibrated(tiny_model, sdc="offline-calibrated", calib_add_sigma=0.1)
    tables = calibrated_tables(tiny_model)
    save_tables(tables, tmp_path)
    line = (tmp_path / "th.txt").read_text().splitlines()[0].split(" ")
    assert line[0] == "L0_H0:7" and line[2:] == ["4", "6"] and float(line[1]) == tables.theta[0].values[0, 7]
    assert len((tmp_path / "sdc.txt").read_text().splitlines()[0].split(" ")) == 3
    binary = load_tables(tmp_path, 3, 6)
    (tmp_path / BINARY_NAME).unlink()
    text = load_tables(tmp_path, 3, 6)
    (tmp_path / "th.txt.gz").write_bytes(gzip.compress((tmp_path / "th.txt").read_bytes()))
    (tmp_path / "th.txt").unlink()
    zipped = load_tables(tmp_path, 3, 6)
    assert binary.meta["placement"] == "pre-softmax"
    for loaded in (binary, text, zipped):
        assert loaded.k == {0: 6, 1: 6, 2: 6}
        for kind in ("theta", "sdc"):
            for layer in range(3):
                a, b = getattr(loaded, kind)[layer], getattr(tables, kind)[layer]
                np.testing.assert_array_equal(a.values, b.values)
                np.testing.assert_array_equal(a.samples, b.samples)

    set_params(tiny_model, calibrate=False)
    ids = prompts(1)[0]
    expected = tiny_model(ids).logits
    set_params(tiny_model, mode=3)
    set_params(tiny_model, mode=0, calib_load_path=str(tmp_path))
    assert torch.equal(tiny_model(ids).logits, expected)


def test_tables_that_do_not_fit(tiny_model: LlamaForCausalLM, tmp_path: Path) -> None:
    calibrated(tiny_model)
    save_tables(calibrated_tables(tiny_model), tmp_path / "ours")
    set_params(tiny_model, calibrate=False)
    for path, params, message in (
        ("ours", {"K": 7}, "calibrated for K=6, not for K=7"),
        ("ours", {"placement": "post-softmax"}, "placement pre-softmax, not for post-softmax"),
        ("ours", {"sdc": "offline-calibrated"}, "SDC table lacks layer 0"),
        ("nowhere", {}, "not a folder"),
        ("empty", {}, "neither th.txt nor sdc.txt"),
        ("damaged", {}, "th.txt, line 1: .* is damaged"),
        ("mixed", {}, "layer 0: it mixes several K"),
        ("other", {}, "3 layers and 9 heads"),
        ("deep", {}, "99 layers"),
        ("partial", {}, "lack layer 2"),
    ):
        folder = tmp_path / path
        if path not in ("ours", "nowhere"):
            folder.mkdir(exist_ok=True)
        lines = [f"L{layer}_H{head}:9 0.5 2 6" for layer in range(3) for head in range(6)]
        text = {
            "damaged": "this is no table\n",
            "mixed": "\n".join([*lines, "L0_H0:10 0.5 2 7"]),
            "other": "\n".join([*lines, "L2_H8:9 0.5 2 6"]),
            "deep": "\n".join([*lines, "L98_H0:9 0.5 2 6"]),
            "partial": "\n".join(line for line in lines if not line.startswith("L2")),
        }.get(path)
        if text is not None:
            (folder / "th.txt").write_text(text)
        with pytest.raises(UsageError, match=message):
            set_params(
                tiny_model,
                **({"mode": 0, "K": 6, "placement": "pre-softmax", "sdc": "none"} | params),
                calib_load_path=str(folder),
            )
    # scores can be negative, weights cannot
    (tmp_path / "negative").mkdir()
    (tmp_path / "negative" / "th.txt").write_text("\n".join(line.replace("0.5", "-0.5") for line in lines))
    with pytest.raises(UsageError, match="were calibrated on scores"):
        set_params(
            tiny_model, mode=0, K=6, placement="post-softmax", calib_load_path=str(tmp_path / "negative")
        )
    (tmp_path / "ours" / BINARY_NAME).write_bytes(b"not a table")
    with pytest.raises(UsageError, match="cannot be read"):
        set_params(tiny_model, mode=0, K=6, calib_load_path=str(tmp_path / "ours"))


def test_text_tables_of_another_k(tiny_model: LlamaForCausalLM, tmp_path: Path) -> None:
    """sdc.txt does not tell its K, but its row lengths do; a curve needs lengths above K. A refusal changes
    nothing."""
    every_head = [(layer, head) for layer in range(3) for head in range(6)]
    (tmp_path / "sdc.txt").write_text(
        "".join(f"L{i}_H{h}:{n} 0.5 2\n" for i, h in every_head for n in (7, 9))
    )
    tables = str(tmp_path)
    update_model(tiny_model)
    set_params(tiny_model, mode=1, K=6, sdc="offline-calibrated", calib_load_path=tables)
    ids = prompts(1)[0]
    expected = tiny_model(ids).logits
    with pytest.raises(UsageError, match="layer 0 has row length 7, so .* a smaller K than 8: use that K"):
        set_params(tiny_model, K=8, calib_load_path=tables)
    (tmp_path / "th.txt").write_text("".join(f"L{i}_H{h}:{7 - i} 0.5 2 6\n" for i, h in every_head))
    fitted = {"mode": 0, "placement": "post-softmax", "sdc": "none", "calib_load_path": tables}
    with pytest.raises(UsageError, match="fit needs a calibrated row length above K=6 .* head 0 has none"):
        set_params(tiny_model, calib_interp="fit", **fitted)
    assert torch.equal(tiny_model(ids).logits, expected)
    set_params(tiny_model, **fitted)  # the nearest length will do


@pytest.mark.parametrize("kind", ["theta", "sdc"])
def test_nan_is_refused(tiny_model: LlamaForCausalLM, tmp_path: Path, kind: str) -> None:
    """A comparison with NaN is false, so every kernel would make something else of it."""
    calibrated(tiny_model, sdc="offline-calibrated")
    tables = calibrated_tables(tiny_model)
    getattr(tables, kind)[1].values[2, 30] = np.nan
    save_tables(tables, tmp_path)
    set_params(tiny_model, calibrate=False)
    set_params(tiny_model, mode=3, sdc="none")
    wanted = {"mode": 0, "sdc": "offline-calibrated", "calib_load_path": str(tmp_path)}
    with pytest.raises(UsageError, match="layer 1 (have|has) NaN for head 2 at row length 30"):
        set_params(tiny_model, **wanted)
    (tmp_path / BINARY_NAME).unlink()
    with pytest.raises(UsageError, match=r"\.txt, line \d+: 'L1_H2:30 nan 4.*' is damaged"):
        set_params(tiny_model, **wanted)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("L0_H-1:20 0.5 2 6", "line 7: .* is damaged"),
        ("L-1_H0:20 0.5 2 6", "line 7: .* is damaged"),
        ("L0_H0:-20 0.5 2 6", "line 7: .* is damaged"),
        ("L0_H0:20 1e400 2 6", "line 7: .* is damaged"),
        ("L0_H0:20 0.5 -2 6", "line 7: .* is damaged"),
        ("L0_H0:20 0.5 2 nan", "line 7: .* is damaged"),
        ("L0_H0:20 0.5 2", "line 7: .* is damaged"),
        ("L0_H0:20 0.5 2 6 9", "line 7: .* is damaged"),
        ("0_H0:20 0.5 2 6", "line 7: .* is damaged"),
        ("L0_H0:1e2 0.5 2 6", "line 7: .* is damaged"),
        ("L0_H0:99999999 0.5 2 6", "layer 0: it has row length 99999999, not one from 1 to 131072"),
        ("L0_H0:0 0.5 2 6", "layer 0: it has row length 0"),
        ("L0_H0:20 0.5 0 6", "layer 0: .* has no samples"),
        ("L0_H0:9 0.75 2 6", "layer 0: a head and row length come twice, with different values"),
        ("L1_H0:9 0.5 2 6", "layer 1: it lacks head 1"),
        ("L0_H0:20 0.5 2 6.5", "layer 0: it mixes several K"),
        ("L9_H0:9 0.5 2 6", "10 layers and 6 heads"),
        ("L0_H99999999999:9 0.5 2 6", "1 layers and 100000000000 heads"),
    ],
)
def test_a_line_that_makes_no_sense(line: str, message: str, tmp_path: Path) -> None:
    good = [f"L0_H{head}:9 0.5 2 6" for head in range(6)]
    (tmp_path / "th.txt").write_text("\n".join([*good, line, good[0]]) + "\n")
    with pytest.raises(UsageError, match=message):
        load_tables(tmp_path, 3, 6)


def test_what_may_come_twice(tmp_path: Path) -> None:
    """A th.txt of the published project that was copied onto itself; spaces, ends of lines, no last one."""
    lines = [f"L0_H{head}:9 0.5 2 6.0" for head in range(6)]
    (tmp_path / "th.txt").write_bytes("\r\n".join([*lines, "", *lines]).encode())
    tables = load_tables(tmp_path, 3, 6)
    assert tables.k == {0: 6} and (tables.theta[0].values[:, 9] == 0.5).all()


def test_half_a_gzip_file(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(b"L0_H%d:9 0.5 2 6\n" % head for head in range(6)))
    for data in (whole[:-9], whole[:20], b"", b"no gzip"):
        (tmp_path / "th.txt.gz").write_bytes(data)
        with pytest.raises(UsageError, match=r"th\.txt\.gz is (not a complete gzip file|empty)"):
            load_tables(tmp_path, 3, 6)
