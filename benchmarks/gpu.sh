#!/usr/bin/env bash
# Everything that has to be seen on a GPU, in one run of at most 9 minutes, without a network:
#
#     benchmarks/gpu.sh [OUT_DIR]        REHEARSE=1: tiny sizes on a CPU, to see that the script runs
#
# Kernels against their references, the model's CUDA tests, bandwidths and synchronisations, the arms
# of the routing benchmark, a full-size Mixtral 8x7B served in 24 GiB of GPU memory (int4 from disk,
# bf16 from host memory). Every part has a time limit and a log of its own in OUT_DIR; one that fails
# hides no other. Ends with a table and one JSON line (also OUT_DIR/gpu.json).
#
# Needs 128 GiB of memory and 64 GiB of disk (WORK_DIR, by default /tmp/moe-gpu). Packages that the
# machine lacks are taken from wheels in WHEELS (by default .whl), if it exists; to fill it elsewhere:
#     python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 \
#         --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
#         --platform manylinux2014_x86_64 -d .whl -r benchmarks/gpu_wheels.txt
set -uo pipefail
cd "$(dirname "$0")/.."
OUT="$(mkdir -p "${1:-build/gpu}" && cd "${1:-build/gpu}" && pwd)"
WORK_DIR="${WORK_DIR:-/tmp/moe-gpu}"
WHEELS="${WHEELS:-.whl}"
PYTHON="${PYTHON:-python3}"
LIMIT_S=530
REHEARSAL=()
if [[ -n "${REHEARSE:-}" ]]; then
    REHEARSAL=(--rehearse)
    export TRITON_INTERPRET=1
fi
export PYTHONUNBUFFERED=1
mkdir -p "$WORK_DIR"

if compgen -G "$WHEELS/*.whl" > /dev/null; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --upgrade \
        --target "$WORK_DIR/site" "$WHEELS"/*.whl || echo "Some wheels could not be installed."
    export PYTHONPATH="$WORK_DIR/site${PYTHONPATH:+:$PYTHONPATH}"
fi
# The CPU's kernels, for experts in host memory: the server's own build, beside the sources.
"$PYTHON" setup.py -q build_ext --inplace > "$OUT/build.log" 2>&1 || echo "No CPU kernels were built."

# part NAME SECONDS COMMAND...: runs it within the time that is left.
part() {
    local name=$1 seconds=$2 left=$((LIMIT_S - SECONDS)) began=$SECONDS code=0
    shift 2
    if ((left < 10)); then
        echo "skipped, no time is left" > "$OUT/$name.status"
        return
    fi
    timeout --kill-after=5 $((seconds < left ? seconds : left)) "$@" > "$OUT/$name.log" 2>&1 || code=$?
    if ((code == 0)); then echo ok; elif ((code >= 124)); then echo "out of time"; else echo "failed ($code)"; fi \
        > "$OUT/$name.status"
    echo "$name: $(cat "$OUT/$name.status") after $((SECONDS - began)) s"
}

SPREAD=()
"$PYTHON" -c 'import xdist' 2> /dev/null && SPREAD=(-n 8)
part machine 30 bash -c 'nvidia-smi; "$0" -m moe_server doctor' "$PYTHON"
part rates 70 "$PYTHON" -m benchmarks.gpu_rates "${REHEARSAL[@]}"
part numerics 130 "$PYTHON" -m pytest -q -p no:cacheprovider "${SPREAD[@]}" tests/kernels/gpu/numerics
if [[ -z "${REHEARSE:-}" ]]; then
    part routing 80 "$PYTHON" -m benchmarks.routing --device cuda --quick
fi
part int4 170 "$PYTHON" -m benchmarks.gpu_serving int4 --dir "$WORK_DIR" "${REHEARSAL[@]}"
rm -rf "$WORK_DIR/int4"
part bf16 170 "$PYTHON" -m benchmarks.gpu_serving bf16 --dir "$WORK_DIR" "${REHEARSAL[@]}"
rm -rf "$WORK_DIR/bf16"
"$PYTHON" -m benchmarks.gpu_report "$OUT"
