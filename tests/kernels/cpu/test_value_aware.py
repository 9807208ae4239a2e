"""Value-aware thresholds by the CPU kernel."""

import pytest
import torch

from tests.helpers.kernel_cases import KINDS, needs_kernel
from tests.helpers.value_aware import check_weighed, weighed_call
from toptheta.kernels.cpu import backend as cpu


@needs_kernel
@pytest.mark.parametrize("options", [{}, {"capk": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_reference(kind, options):
    torch.manual_seed(1)
    asked = weighed_call(kind, (4, 2, 64), 1.0, vmc=True, **options)
    assert cpu.unsupported(asked) is None
    check_weighed(asked, cpu.run)
