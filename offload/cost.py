"""What moving, computing and reading cost here: measured at the start, corrected while running.

An expert that is in host memory can be copied to the device or computed where it is; one that is
evicted from the device can be copied to host memory or forgotten and read again. Whichever is
expected to take less time is done. Knows speeds and sizes, neither experts nor places.
"""

from dataclasses import dataclass, field

_WEIGHT = 0.1
"""Of a new observation: the mean follows a change within some tens of experts."""

_TIMED_EVERY = 32
"""Experts per one that is timed where computing was timed before: on a GPU it needs a sync."""


@dataclass(slots=True)
class Speed:
    """A running mean of bytes per second."""

    bytes_per_s: float | None = None
    """None until it was observed."""

    def observe(self, nbytes: int, seconds: float) -> None:
        """Takes in one movement; times too short to tell anything are left out."""
        if nbytes <= 0 or seconds <= 0:
            return
        seen = nbytes / seconds
        if self.bytes_per_s is None:
            self.bytes_per_s = seen
        else:
            # The mean of seconds per byte, not of speeds: a slow transfer weighs what it took.
            self.bytes_per_s = 1 / ((1 - _WEIGHT) / self.bytes_per_s + _WEIGHT / seen)

    def seconds(self, nbytes: int) -> float | None:
        """How long `nbytes` are expected to take; None while nobody knows."""
        return None if self.bytes_per_s is None else nbytes / self.bytes_per_s


@dataclass(slots=True)
class CostModel:
    """Speeds of one engine, and the choices that follow from them.

    Args:
        shared_memory: Device and host memory are the same RAM: computing is as fast from either.
        computes_in_place: An expert in host memory of its own may be computed there.
    """

    shared_memory: bool
    computes_in_place: bool = True
    disk: Speed = field(default_factory=Speed)
    copy: Speed = field(default_factory=Speed)
    """Between host memory and the device, either way."""
    on_device: dict[int, Speed] = field(default_factory=dict)
    """Bytes of weights per second of computing, by the bit length of the number of rows."""
    on_host: dict[int, Speed] = field(default_factory=dict)
    reuse: float = 0.5
    """Share of the experts demoted to host memory that are used before they are forgotten."""
    copied: int = 0
    """Experts in host memory that were copied to the device when they were wanted."""
    computed_in_place: int = 0
    demoted: int = 0
    forgotten: int = 0
    computed: int = 0
    """Experts computed where it matters in which memory."""

    def wants_compute(self, rows: int, *, in_host: bool) -> bool:
        """True where it should be told how long the next expert takes over `rows` rows."""
        if self.shared_memory or not self.computes_in_place:
            return False
        self.computed += 1
        table = self.on_host if in_host else self.on_device
        return rows.bit_length() not in table or self.computed % _TIMED_EVERY == 0

    def observe_compute(self, rows: int, nbytes: int, seconds: float, *, in_host: bool) -> None:
        """An expert of `nbytes` was computed over `rows` rows, all of it being there before."""
        table = self.on_host if in_host else self.on_device
        table.setdefault(rows.bit_length(), Speed()).observe(nbytes, seconds)

    def observe_fate(self, *, used: bool) -> None:
        """A demoted expert was used, or leaves host memory unused."""
        self.reuse += _WEIGHT * (used - self.reuse)

    def copy_pays(self, rows: int, nbytes: int) -> bool:
        """True where copying an expert to the device and computing it there takes less time.

        Where one of the speeds is not known yet the answer is the one that makes it known.
        """
        if self.shared_memory:
            return False
        if not self.computes_in_place:
            return True
        size = rows.bit_length()
        in_place = self.on_host.get(size, Speed()).seconds(nbytes)
        if in_place is None:
            return False
        copying = self.copy.seconds(nbytes)
        on_device = self.on_device.get(size, Speed()).seconds(nbytes)
        if copying is None or on_device is None:
            return True
        return copying + on_device < in_place

    def demotion_pays(self, nbytes: int) -> bool:
        """True where copying an evicted expert to host memory saves more reading than it costs."""
        copying, reading = self.copy.seconds(nbytes), self.disk.seconds(nbytes)
        if copying is None or reading is None:
            return True
        return copying < self.reuse * reading
