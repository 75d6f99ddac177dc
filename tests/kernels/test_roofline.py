"""The kernels by which benches measure a device read every byte once, and count what they say they count."""

import pytest
import torch

from fwd.kernels import roofline
from fwd.kernels.host import HostLauncher


def words(launcher, count):
    generator = torch.Generator().manual_seed(count)
    return torch.randint(-(1 << 31), 1 << 31, (count,), dtype=torch.int32, generator=generator).to(launcher.device)


def total(numbers):
    return int(numbers.cpu().long().sum()) % (1 << 32)


@pytest.mark.parametrize("size", [16, 48, roofline.TILE - 16, roofline.TILE, 9 * roofline.TILE + 32])
def test_every_word_is_read_once(execution, size):
    def run(launcher):
        data = words(launcher, size // 4)
        sums = roofline.read_stream(launcher, data)
        assert total(sums) == total(data)
        return sums

    execution.everywhere(run)


def test_a_load_that_is_left_out_shows(execution):
    launcher = execution.mutant("roofline.cu", "i < IN_FLIGHT; ++i) total", "i < IN_FLIGHT - 1; ++i) total")
    data = words(launcher, 3 * roofline.TILE // 4)
    assert total(roofline.read_stream(launcher, data)) != total(data)


def test_empty_steps_count_themselves(execution):
    launcher = execution.launcher
    steps = torch.zeros(1, dtype=torch.int32, device=launcher.device)
    for _ in range(5):
        roofline.empty_step(launcher, steps)
    assert steps.item() == 5


def test_blocks_meet_as_often_as_asked(execution):
    launcher = execution.launcher
    state, steps = (torch.zeros(1, dtype=torch.int32, device=launcher.device) for _ in range(2))
    for _ in range(3):
        roofline.meet(launcher, state, steps, 4)
    assert steps.item() == 12
    assert state.item() & 0x7FFFFFFF == 0


def test_a_grid_fills_the_device_and_no_more():
    assert roofline.read_grid(16, 132) == 1
    assert roofline.read_grid(5 * roofline.TILE, 132) == 5
    assert roofline.read_grid(1 << 30, 132) == 132 * roofline.BLOCKS


def test_what_is_no_multiple_of_a_load_is_refused():
    with pytest.raises(AssertionError):
        roofline.read_stream(HostLauncher(), torch.zeros(5, dtype=torch.int32))
