"""The share of a part in the time of steps."""

from __future__ import annotations

import time

import pytest
import torch

from cheapertraining.timing import TimeShare


def test_share_is_that_of_the_parts_in_all_steps() -> None:
    share, device = TimeShare(), torch.device("cpu")
    assert share.read() == 0
    for _ in range(2):
        share.begin_step()
        for _ in range(2):
            with share.part(device):
                time.sleep(0.02)
        time.sleep(0.06)
        share.end_step()
    assert share.read() == pytest.approx(0.4, abs=0.15)  # sleeps of a busy machine are longer
