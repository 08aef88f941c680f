"""Brings what a library's import reads into the page cache, many pieces at a time.

An import asks for thousands of small pieces, one after another. Beside reads that keep the disk
busy each of them waits behind 32 MB: an import that takes 2 s alone takes 10 to 40 s. So they are
fetched first, by several threads, while the disk has nothing else to do. Shared objects are left
to the kernel, which reads them ahead itself. Knows no library but by its name.
"""

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

_THREADS = 16
"""They wait for the disk, not for a processor."""


def read_ahead(*packages: str) -> None:
    """Reads the compiled modules of top-level packages; a package that is missing is none.

    Waits until they are there. Returns at once where they have been read before.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        for package in packages:
            spec = find_spec(package)
            if spec is None or spec.cached is None or _is_cached(Path(spec.cached)):
                continue
            for folder in spec.submodule_search_locations or ():
                for _ in pool.map(_read, _modules(Path(folder))):
                    pass


def _modules(folder: Path) -> Iterator[list[Path]]:
    """The compiled modules below a folder, those of one folder together."""
    for path, _, names in os.walk(folder):
        if path.endswith("__pycache__"):
            yield [Path(path, name) for name in names]


def _read(files: list[Path]) -> None:
    for file in files:
        with contextlib.suppress(OSError):
            file.read_bytes()


def _is_cached(file: Path) -> bool:
    """Whether a file's first page is in the page cache."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # nothing was compiled yet
        return False
    try:
        return os.preadv(descriptor, [bytearray(1)], 0, os.RWF_NOWAIT) == 1
    except OSError:  # it would have to be read, or the file system cannot tell
        return False
    finally:
        os.close(descriptor)
