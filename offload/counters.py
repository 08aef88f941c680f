"""What the expert cache counts."""

from dataclasses import dataclass


@dataclass(slots=True)
class CacheCounters:
    """What `acquire` found and what it cost, since the start. Times are waits, in seconds."""

    device_hits: int = 0
    host_hits: int = 0
    disk_reads: int = 0
    """Experts that were on their way from disk, or not even that, when they were wanted."""
    read_bytes: int = 0
    """From disk, prefetches and what was cancelled on its way included."""
    read_s: float = 0.0
    """Spent waiting for the disk."""
    prefetches: int = 0
    """Reads that were begun on a prediction."""
    prefetch_hits: int = 0
    """Those of them that were wanted."""
    cancelled: int = 0
    """Reads given up on their way: wrong predictions, and requests that left."""
