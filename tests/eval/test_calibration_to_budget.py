"""--calib_to budget in a run: one number in th.txt for each K of one pass, through an interrupt; bad
flags."""

from pathlib import Path

import pytest

from tests.eval.helpers import calibrating_settings, interrupt_at, parse
from toptheta.calibration.tables import load_tables
from toptheta.util.errors import UsageError

BUDGET = {"placement": "post-softmax", "vmc": True, "calib_to": "budget", "k": (16, 32)}


def numbers(folder: Path) -> set[str]:
    return {line.split()[1] for line in (folder / "th.txt").read_text().splitlines()}


def test_a_run_of_two_budgets(folder_model: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from toptheta.eval.runner import evaluate

    whole = evaluate(calibrating_settings(folder_model, **BUDGET, output_dir="whole"))
    (folder,) = here.joinpath("whole").iterdir()
    found = {k: numbers(folder / f"mode0_k{k}") for k in (16, 32)}
    assert len(found[16]) == len(found[32]) == 1 and float(*found[16]) > float(*found[32])
    assert [result.method for result in whole] == ["Top-theta budget K=16", "Top-theta budget K=32"]
    assert whole[0].kept["prefill"].attn < whole[1].kept["prefill"].attn < 1
    assert load_tables(folder / "mode0_k16", 2, 6).meta["calib_to"] == "budget"

    interrupt_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        evaluate(calibrating_settings(folder_model, **BUDGET))
    (run,) = here.joinpath("products").iterdir()
    again = evaluate(calibrating_settings(folder_model, **BUDGET), resume=str(run))
    assert {k: numbers(run / f"mode0_k{k}") for k in (16, 32)} == found
    assert [result.metrics for result in again] == [result.metrics for result in whole]


def test_a_copy_of_k_shares_the_pass_and_weighed_values_do_not(folder_model: str, here: Path) -> None:
    from toptheta.eval.runner import evaluate

    methods = ("top_theta", "top_theta:key_copy=int4", "top_theta:value_aware=True")
    options = BUDGET | {"mode": (3,), "method": methods, "k": (16,), "calibrate_only": False}
    plain, copied, weighed = evaluate(calibrating_settings(folder_model, **options))
    assert numbers(Path(plain.folder)) == numbers(Path(copied.folder)) != numbers(Path(weighed.folder))
    assert [one.seconds["calibration"] > 0 for one in (plain, copied, weighed)] == [True, False, True]
    saved = [load_tables(one.folder, 2, 6).meta["method"] for one in (plain, copied, weighed)]
    assert saved == list(methods)
    evaluate(calibrating_settings(folder_model, **options | {"method": methods[1:2], "output_dir": "alone"}))
    (alone,) = here.joinpath("alone").iterdir()
    assert numbers(alone) == numbers(Path(copied.folder))


def test_layers_by_sensitivity_and_values(folder_model: str, here: Path) -> None:
    from toptheta.eval.runner import evaluate

    options = BUDGET | {"k": (16,), "calib_layers": "sensitivity", "mode": (3,)}
    (result,) = evaluate(
        calibrating_settings(folder_model, **options, method=("top_theta:value_aware",), calibrate_only=False)
    )
    assert result.method == "Top-theta budget value_aware K=16" and result.name == "top_theta"
    assert len(numbers(Path(result.folder))) == 2  # a threshold for each of the two layers


@pytest.mark.parametrize(
    "flags, says",
    [
        (
            "--mode 0 --calib_to budget",
            "--calib_to budget calibrates a threshold on weights, which needs --placement",
        ),
        ("--mode 1 --calib_to budget", "--calib_to has no effect without thresholds"),
        (
            "--mode 0 --placement post-softmax --calib_to budget --calib_dump_samples",
            "--calib_dump_samples saves threshold samples, and --calib_to budget takes none",
        ),
        (
            "--mode 0 --placement post-softmax --calib_to half",
            "--calib_to is 'half': choose one of k, budget",
        ),
        ("--mode 0 --placement post-softmax --calib_layers sensitivity", "add --calib_to budget"),
    ],
)
def test_flags_that_do_not_fit(flags: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse(flags)
