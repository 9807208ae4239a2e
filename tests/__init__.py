"""The tests, in the folders of the code that they test."""

import pytest

# Helpers that check: their asserts show what was compared, as those of the tests do.
pytest.register_assert_rewrite("tests.helpers.calibration", "tests.helpers.golden", "tests.report.helpers")
