"""Runs contenders on loads, in turns, and collects samples. `paging` says which and reports.

Knows processes, files and probes; how a contender is set up is in `contenders`, what a result
means in `summary`.
"""

import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import ceilings
from benchmarks.checkout import ROOT
from benchmarks.child import Child, ChildFailedError, can_cap, drop_page_cache, running
from benchmarks.contenders import Contender, contenders
from benchmarks.environments import LLAMA_CPP, PEERS, EnvironmentUnavailableError, python_of
from benchmarks.limits import Mixture
from benchmarks.loads import COLD_START, MAX_TOTAL_TOKENS, PROMPT_TOKENS, Load, Work, prompt
from benchmarks.models import MODELS, ModelFolder, ModelUnavailableError
from benchmarks.summary import Sample
from moe_server.budget import available_memory_bytes, usable_cores

START_TIMEOUT_S = 900
WORK_TIMEOUT_S = 600
QUICK_S = 200
"""QUICK begins nothing new after this long."""
RESIDENT_ROOM_BYTES = 2 * 10**9
"""Beside the model: runtimes, and what else runs."""


class Bench:
    """One run: what is measured, where files are, and what came of it so far.

    Args:
        folder: Where models, environments and logs are kept.
        limit_bytes: Of all models together.
        quick: Install nothing.
    """

    def __init__(self, folder: Path, limit_bytes: int, *, quick: bool) -> None:
        self.samples: list[Sample] = []
        self.unavailable: dict[str, str] = {}
        """By load and contender: why there is no result."""
        self.disk_bytes_per_s: list[float] = []
        self._folder = folder
        self._quick = quick
        self._give_up_at = time.monotonic() + QUICK_S if quick else None
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        self.models = ModelFolder(
            folder / "models",
            limit_bytes,
            lambda: python_of(LLAMA_CPP, folder, install=not quick),
        )

    def measure(self, loads: Sequence[Load], repetitions: int) -> None:
        """Runs every contender of every load, taking turns where their models fit together."""
        for load in loads:
            everybody = contenders(load.format, load.size, capped=not load.all_fits)
            models = {contender.model for contender in everybody}
            turns = [(number, who) for number in range(repetitions) for who in everybody]
            if not self.models.fit_together(models):
                print("The models do not fit together: one after the other.", file=sys.stderr)
                turns.sort(key=lambda turn: everybody.index(turn[1]))
                models = set()
            for number, contender in turns:
                self._turn(load, contender, number, keep=models)

    def _turn(self, load: Load, contender: Contender, number: int, keep: set[str]) -> None:
        """One process of one contender; what goes wrong is told and remembered."""
        place = f"{load.key('*')} {contender.name}"
        if place in self.unavailable:
            return
        if self._give_up_at is not None and time.monotonic() > self._give_up_at:
            self.unavailable[place] = f"not begun within {QUICK_S} s, the time of QUICK"
            return
        scratch = self._folder / "scratch"
        try:
            self._session(load, contender, number, keep, scratch)
        except (ChildFailedError, EnvironmentUnavailableError, ModelUnavailableError) as error:
            self.unavailable[place] = str(error)
            print(f"{place}: {error}", file=sys.stderr)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _session(
        self, load: Load, contender: Contender, number: int, keep: set[str], scratch: Path
    ) -> None:
        python = Path(sys.executable)
        if contender.environment is not None:
            python = python_of(contender.environment, self._folder, install=not self._quick)
        model = self.models.require(contender.model, keep)
        if load.all_fits:
            needed = MODELS[contender.model].size_bytes + RESIDENT_ROOM_BYTES
            if available_memory_bytes() < needed:
                raise ChildFailedError(f"needs {needed / 1e9:.0f} GB of free memory")
        cap_bytes = self._cap_bytes(load, keep)
        if contender.fills_scratch:
            self.models.make_room(MODELS[contender.model].size_bytes, keep)
        scratch.mkdir(exist_ok=True)
        capacity = cap_bytes or (None if load.all_fits else available_memory_bytes())
        turn = _Turn(self, load, contender, number, model, capacity)
        # Ours preloads before it serves; a cold start is one without. The peers start one way only.
        starts = [True, False] if contender.is_ours and load.cold_start else [load.cold_start]
        for cold in starts:
            job = {
                "model": str(model),
                "threads": usable_cores(),
                "max_total_tokens": MAX_TOTAL_TOKENS,
                "options": contender.options(cap_bytes, scratch),
                "prompt": prompt(f"{number}/start", PROMPT_TOKENS),
                "cold": cold,
            }
            command = [str(python), str(PEERS / contender.script), json.dumps(job)]
            environ = {"PYTHONPATH": str(ROOT) if contender.is_ours else ""}
            log = self._folder / "logs" / f"{contender.name.replace(' ', '_')}.log"
            if can_cap() is None:
                drop_page_cache()
            with running(command, cap_bytes=cap_bytes, log=log, environ=environ) as child:
                turn.begin(child, cold=cold)
                if cold is starts[-1]:
                    turn.work(child)

    def _cap_bytes(self, load: Load, keep: set[str]) -> int | None:
        if load.cap_share is None:
            return load.cap_bytes
        peer = next(
            contender.model
            for contender in contenders(load.format, load.size, capped=True)
            if contender.environment is LLAMA_CPP
        )
        try:
            path = self.models.require(peer, keep)
        except (EnvironmentUnavailableError, ModelUnavailableError):
            return round(load.cap_share * MODELS[peer].size_bytes)
        return round(load.cap_share * path.stat().st_size)


class _Turn:
    """What one contender brings in one repetition of a load, and the disk beside it."""

    def __init__(
        self,
        bench: Bench,
        load: Load,
        contender: Contender,
        number: int,
        model: Path,
        capacity_bytes: int | None,
    ) -> None:
        self._bench = bench
        self._load = load
        self._contender = contender
        self._number = number
        self._model = model
        self._capacity_bytes = capacity_bytes
        self._probe = _Probe(bench, model)

    def begin(self, child: Child, *, cold: bool) -> None:
        """Waits for the first token; counts if the start was a cold one."""
        facts = child.answer(START_TIMEOUT_S)
        self._mixture = _mixture(self._contender, self._model, facts)
        if cold:
            seconds = facts["first_token_at"] - child.started_at
            self._add(self._load.key(COLD_START), seconds, facts["read_bytes"], PROMPT_TOKENS)

    def work(self, child: Child) -> None:
        """Asks for the load's works, one after another."""
        for work in self._load.works:
            answer = _ask(child, work, self._number)
            read = answer["read_bytes"] / answer["steps"]
            key = self._load.key(work.kind, work.label)
            self._add(key, work.tokens_per_s(answer), read, work.tokens_per_step)

    def _add(self, key: str, value: float, read_bytes: float, tokens: int) -> None:
        least = None
        if self._capacity_bytes:
            least = self._mixture.least_read_bytes(self._capacity_bytes, tokens)
        disk, name = self._probe.around(), self._contender.name
        self._bench.samples.append(
            Sample(key, name, self._number, value, read_bytes, disk, least, tokens)
        )
        print(
            f"{key} {name} #{self._number}: {value:.2f}, {read_bytes / 1e6:.0f} MB, "
            f"disk {disk / 1e9:.2f} GB/s",
            file=sys.stderr,
        )


class _Probe:
    """The disk's bandwidth on a model's own files, between works."""

    def __init__(self, bench: Bench, model: Path) -> None:
        self._bench = bench
        self._files = sorted(model.glob("*.safetensors")) if model.is_dir() else [model]
        spec = MODELS[model.name].spec
        self._read_bytes = 3 * spec.hidden * spec.intermediate * 2
        self._last = self._measure()

    def around(self) -> float:
        """The mean of the last probe and one taken now."""
        before, self._last = self._last, self._measure()
        return (before + self._last) / 2

    def _measure(self) -> float:
        found = ceilings.disk_bytes_per_s(self._files, self._read_bytes)
        self._bench.disk_bytes_per_s.append(found)
        return found


def _ask(child: Child, work: Work, number: int) -> dict[str, Any]:
    name = f"{number}/{work.kind}/{work.label}"
    if work.warm:
        child.ask(work.request(f"{name}/warm"), WORK_TIMEOUT_S)
    return child.ask(work.request(name), WORK_TIMEOUT_S)


def _mixture(contender: Contender, model: Path, facts: dict[str, Any]) -> Mixture:
    """Sizes of the contender's own format; ours are told by the engine."""
    spec = MODELS[contender.model].spec
    if contender.is_ours:
        expert_bytes, dense_bytes = facts["expert_bytes"], facts["dense_bytes"]
    else:
        weights = 3 * spec.hidden * spec.intermediate
        expert_bytes = weights * 18 // 32 if "q4_0" in contender.model else weights * 2
        files = model.glob("*.safetensors") if model.is_dir() else [model]
        file_bytes = sum(file.stat().st_size for file in files)
        dense_bytes = file_bytes - spec.layers * spec.experts * expert_bytes
    return Mixture(spec.layers, spec.experts, spec.top_k, expert_bytes, dense_bytes)
