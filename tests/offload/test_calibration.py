"""The calibration against a reader whose speed the test decides."""

import pytest

from moe_server.offload.calibration import Calibration

MIB = 2**20


class Disk:
    """Stands in for a reader: each read takes as long as its setting says."""

    def __init__(self, bytes_per_s, block_bytes=8 * MIB, depth=4) -> None:
        self.bytes_per_s = bytes_per_s
        self.block_bytes, self.depth = block_bytes, depth
        self.read_bytes, self.busy_s = 0, 0.0

    def read(self, nbytes) -> None:
        self.read_bytes += nbytes
        self.busy_s += nbytes / self.bytes_per_s(self.block_bytes, self.depth)

    def speed(self):
        return self.read_bytes, self.busy_s


def calibrate(disk, reads, nbytes=100 * MIB) -> None:
    calibration = Calibration(disk)
    for _ in range(reads):
        calibration.next()
        disk.read(nbytes)
    calibration.conclude()


@pytest.mark.parametrize("best", [(2 * MIB, 2), (4 * MIB, 4), (8 * MIB, 4), (8 * MIB, 2)])
def test_the_fastest_setting_wins(best):
    disk = Disk(lambda *setting: 2e9 if setting == best else 1e9)
    calibrate(disk, 12)
    assert (disk.block_bytes, disk.depth) == best


def test_of_equals_the_one_with_the_fewest_bytes_in_flight_wins():
    disk = Disk(lambda block, depth: 2e9 if block * depth >= 16 * MIB else 1e9)
    calibrate(disk, 12)
    assert disk.block_bytes * disk.depth == 16 * MIB


@pytest.mark.parametrize(("reads", "nbytes"), [(0, 1), (3, 100 * MIB), (30, 1 * MIB)])
def test_too_little_to_read_changes_nothing(reads, nbytes):
    disk = Disk(lambda block, depth: 1e9 / block)
    calibrate(disk, reads, nbytes)
    assert (disk.block_bytes, disk.depth) == (8 * MIB, 4)


def test_small_records_add_up_to_a_sample():
    disk = Disk(lambda *setting: 2e9 if setting == (4 * MIB, 2) else 1e9)
    calibrate(disk, 200, 5 * MIB)
    assert (disk.block_bytes, disk.depth) == (4 * MIB, 2)


def test_the_reader_s_own_bounds_are_kept():
    disk = Disk(lambda block, depth: block * depth * 1e3, block_bytes=4 * MIB, depth=1)
    calibrate(disk, 12)
    assert (disk.block_bytes, disk.depth) == (4 * MIB, 1)
