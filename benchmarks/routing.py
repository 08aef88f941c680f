"""The routing overhead: what a layer pays for choosing experts, beyond computing with them.

    make bench-routing [QUICK=1] [ARGS="--save --format int4 --tokens 1 8"]

Three arms at Mixtral's dimensions, interleaved, same kernels, everything resident: D is the dense
twin (one SwiGLU of the active width, no router), O has experts with ids and plan computed
beforehand, R routes. **R - O is the routing overhead, O - D the sparsity tax.** Layers' weights
take turns, so that no arm finds its weights in a cache; routers and inputs do, too.

The physics: a router's product is 2.1 million operations per token over 32 layers and reads 64 KiB
a layer, experts are 11.3 billion and read a thousand times as much. So R - O is a small difference
of large numbers, and mostly below their noise. Two more figures stand beside it: R - O beside thin
experts, 128 wide, whose time does not drown it; and the routing call's own time inside R, where it
finds all caches filled with weights and pays for code that the experts' calls would have fetched a
moment later. What is reported as the overhead is the first whose 95 % interval is within a quarter
of it, or the last; the output says which. Naive torch (linear, softmax, topk, argsort, bincount)
runs in turn with each.

Where torch finds a GPU it is measured too, every arm a graph that is replayed (`gpu_arms.py`).

Prints a table and one JSON line; --save keeps them, and a picture of the parts, in
benchmarks/results/.
"""

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

# torch's threads would otherwise spin on after their product, in the time of what is measured next.
os.environ["OMP_WAIT_POLICY"] = "passive"

import torch

from benchmarks import ceilings, checkout, kernels, routing_arms, routing_picture, routing_summary
from benchmarks.gpu_arms import GpuArms, Sizes
from benchmarks.routing_arms import Input, Visit, Weights
from benchmarks.routing_summary import Routing, difference, per_token
from moe_server.budget import available_memory_bytes, usable_cores
from moe_server.kernels import native
from moe_server.kernels.formats import WeightFormat

NUM_TOKENS = (1, 8, 32, 64, 2048)
BARS_US = {1: 400.0, 8: 60.0, 64: 12.0, 2048: 5.0}
"""Of R - O, on two cores."""
GPU_BARS_US = {8: 8.0, 2048: 1.0}
FULL_LAYERS = 3
"""Layers that take turns in the large arms; more of the thin ones."""
FULL_SECONDS = {1: 90, 8: 120, 32: 120, 64: 120, 2048: 300}
QUICK_SECONDS = {1: 15, 8: 20, 32: 20, 64: 25, 2048: 60}
THIN_SECONDS, QUICK_THIN_SECONDS = 30, 8
GPU_SECONDS = 5
MIN_ROUNDS = 3
CPU_ARMS = ("D", "O", "R", "naive", "narrow")
THIN_ARMS = ("O", "R", "naive")
PRODUCT_FLOP = 2 * kernels.HIDDEN * routing_arms.NUM_EXPERTS * routing_summary.NUM_LAYERS
"""Of the router, per token."""


def main() -> int:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="an answer within 5 minutes")
    parser.add_argument("--tokens", type=int, nargs="+", default=NUM_TOKENS, help="batch sizes")
    parser.add_argument("--format", choices=("bfloat16", "int8", "int4"), help="of the experts")
    parser.add_argument("--save", action="store_true", help="keep result and picture")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="one only; both if left out")
    args = parser.parse_args()
    on_gpu: list[Routing] = []
    if args.device != "cpu" and torch.cuda.is_available():
        on_gpu = measure_gpu(args.tokens)
    threads = usable_cores()
    native.set_num_threads(threads)
    torch.set_num_threads(threads)
    weight_format = routing_arms.choose_format(available_memory_bytes(), FULL_LAYERS)
    if args.format:
        weight_format = WeightFormat(args.format)
    on_cpu: list[Routing] = []
    if args.device != "cuda":
        on_cpu = measure_cpu(args.tokens, weight_format, quick=args.quick)
    if not on_cpu and not on_gpu:
        raise SystemExit("Nothing was measured: there is no GPU, or no compiled kernel.")
    report(on_cpu, on_gpu, weight_format, threads, save=args.save)
    return 0


def measure_cpu(
    tokens: Sequence[int], weight_format: WeightFormat, *, quick: bool
) -> list[Routing]:
    """Every batch size on the CPU, as long as `quick` says."""
    if not native.is_available():
        print(f"not on the CPU: {native.unavailable_reason()}", file=sys.stderr)
        return []
    full = Weights(weight_format, kernels.INTERMEDIATE, FULL_LAYERS)
    thin = Weights(weight_format, routing_arms.THIN_INTERMEDIATE, routing_summary.NUM_LAYERS)
    print(
        f"{weight_format.value} experts, {FULL_LAYERS} layers in turn ({full.nbytes / 1e9:.1f} GB,"
        f" of {available_memory_bytes() / 1e9:.0f} GB still free), {usable_cores()} threads",
        file=sys.stderr,
    )
    results = []
    for num_tokens in tokens:
        given = routing_arms.make_inputs(num_tokens)
        seconds = (QUICK_SECONDS if quick else FULL_SECONDS).get(num_tokens, 60)
        thin_seconds = QUICK_THIN_SECONDS if quick else THIN_SECONDS
        results.append(
            summarise(
                num_tokens,
                measure(CPU_ARMS, cpu_runner(full, given), seconds),
                measure(THIN_ARMS, cpu_runner(thin, given), thin_seconds),
            )
        )
        print(f"T = {num_tokens}: {results[-1].num_rounds} rounds", file=sys.stderr)
    return results


def measure_gpu(
    tokens: Sequence[int],
    device: torch.device = torch.device("cuda"),  # noqa: B008
    sizes: Sizes = Sizes(),  # noqa: B008
    seconds: float = GPU_SECONDS,
) -> list[Routing]:
    """Every batch size on a GPU, in bfloat16."""
    results = []
    for num_tokens in tokens:
        visits = []
        for intermediate in (sizes.intermediate, routing_arms.THIN_INTERMEDIATE):
            arms = GpuArms(
                num_tokens,
                WeightFormat.BFLOAT16,
                replace(sizes, intermediate=intermediate),
                FULL_LAYERS,
                device,
            )
            names = GpuArms.names if not visits else THIN_ARMS
            visits.append(measure(names, lambda arm, _number, arms=arms: arms.run(arm), seconds))
            del arms
        results.append(summarise(num_tokens, *visits))
        print(f"GPU, T = {num_tokens}: {results[-1].num_rounds} rounds", file=sys.stderr)
    return results


def measure(
    arms: Sequence[str], run: Callable[[str, int], Visit], seconds: float
) -> dict[str, list[Visit]]:
    """Runs the arms for so long, each once a round, in a random order.

    Args:
        arms: Their names.
        run: Runs one, given the number of the round.
        seconds: Rounds are begun that long.
    """
    visits: dict[str, list[Visit]] = {arm: [] for arm in arms}
    choose = random.Random(0)  # noqa: S311
    end, number = time.perf_counter() + seconds, -1
    while number < MIN_ROUNDS or time.perf_counter() < end:
        for arm in choose.sample(arms, len(arms)):
            visit = run(arm, number)
            if number >= 0:  # the first round does not count
                visits[arm].append(visit)
        number += 1
    return visits


def cpu_runner(weights: Weights, inputs: Sequence[Input]) -> Callable[[str, int], Visit]:
    """Runs an arm over the next layer, with the round's input."""
    runs = {
        "D": routing_arms.run_dense,
        "O": routing_arms.run_planned,
        "R": routing_arms.run_routed,
    }

    def run(arm: str, number: int) -> Visit:
        given = inputs[number % len(inputs)]
        if arm == "naive":
            return routing_arms.run_naive(given)
        if arm == "narrow":
            return routing_arms.run_narrow(given)
        return runs[arm](weights.next_layer(), given)

    return run


def summarise(
    num_tokens: int, full: dict[str, list[Visit]], thin: dict[str, list[Visit]]
) -> Routing:
    """Medians and differences of one batch size."""

    def totals(visits: list[Visit]) -> list[float]:
        return per_token([visit.total_s for visit in visits], num_tokens)

    def part(visits: list[Visit], name: str) -> float:
        return statistics.median(per_token([visit.parts[name] for visit in visits], num_tokens))

    arms = {name: statistics.median(totals(visits)) for name, visits in full.items()}
    direct, narrow = part(full["R"], "route"), arms.pop("narrow")
    # On a CPU the host is the device.
    waited = part(full["R"], "host wait") if "host wait" in full["R"][0].parts else 0.0
    return Routing(
        num_tokens=num_tokens,
        arms=arms,
        full=difference(totals(full["R"]), totals(full["O"])),
        sparsity=difference(totals(full["O"]), totals(full["D"])),
        thin=difference(totals(thin["R"]), totals(thin["O"])),
        thin_naive=statistics.median(totals(thin["naive"])),
        direct=direct,
        parts={
            "gate": max(0.0, direct - narrow),
            "plan": min(narrow, direct),
            "gather": part(full["R"], "gather"),
            "combine": part(full["R"], "combine"),
            "host wait": waited,
        },
        naive_parts={name: part(full["naive"], name) for name in ("gate", "plan")},
        num_rounds=len(full["R"]),
    )


def report(
    on_cpu: list[Routing],
    on_gpu: list[Routing],
    weight_format: WeightFormat,
    threads: int,
    *,
    save: bool,
) -> None:
    """Tables, JSON line and, if wanted, the files."""
    for title, results, bars in (("CPU", on_cpu, BARS_US), ("GPU", on_gpu, GPU_BARS_US)):
        for row in [title, *routing_summary.table(results, bars)] if results else []:
            print(row)
    flops = float32_flop_per_s()
    product_us = PRODUCT_FLOP / flops * 1e6
    print(f"float32 at {flops / 1e9:.0f} GFLOP/s: the router's product takes {product_us:.1f} us")
    commit = checkout.commit()
    line = {
        "bench": "routing",
        "commit": commit,
        "hardware": kernels.hardware(threads),
        "ceilings": {
            "memory_bytes_per_s": ceilings.memory_bytes_per_s(),
            "float32_flop_per_s": flops,
        },
        "results": {"format": weight_format.value, **routing_summary.as_json(on_cpu)},
        "ratios": routing_summary.ratios(on_cpu, weight_format.value),
    }
    if on_gpu:
        name = torch.cuda.get_device_name()
        line["gpu"] = {"hardware": name, "format": "bfloat16", **routing_summary.as_json(on_gpu)}
    if save:
        checkout.RESULTS.mkdir(exist_ok=True)
        (checkout.RESULTS / f"routing-{commit}.json").write_text(json.dumps(line, indent=1) + "\n")
        for suffix, results, bars in (("", on_cpu, BARS_US), ("-gpu", on_gpu, GPU_BARS_US)):
            title = f"{kernels.hardware(threads)}, {weight_format.value} experts, {commit}"
            if suffix:
                title = f"{torch.cuda.get_device_name()}, bfloat16 experts, {commit}"
            picture = checkout.RESULTS / f"routing-{commit}{suffix}.png"
            if results:
                print(routing_picture.draw(results, bars, title, picture))
    print(json.dumps(line))


def float32_flop_per_s() -> float:
    """Of torch's product of two square matrices; the best of a few, as a ceiling is meant."""
    size = 1536
    left, right = torch.randn(2, size, size)
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


if __name__ == "__main__":
    sys.exit(main())
