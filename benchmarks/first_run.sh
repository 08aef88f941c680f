#!/usr/bin/env bash
# `make run`: the shortest way from nothing to streamed tokens, through the commands a user has.
set -euo pipefail
target=127.0.0.1:${PORT:-50051}
log=$(mktemp)
"$BIN/moe-server" serve --listen "$target" 2>"$log" &
server=$!
trap 'kill $server 2>/dev/null || true; wait $server 2>/dev/null || true; rm -f "$log"' EXIT

fail() {
    echo "$1" >&2
    cat "$log" >&2
    exit 1
}

"$BIN/moe-server" warmup --target "$target" --timeout 300 &
warmup=$!
# Whichever ends first: a server that cannot start is no reason to wait for it.
wait -n $server $warmup || fail "The server did not become ready:"
kill -0 $server 2>/dev/null || fail "The server ended:"
echo "Ready at $target. A completion, streamed:"
echo
"$BIN/moe-server" generate "Return a list of" --target "$target" --max-new-tokens 60 \
    || fail "The completion failed:"
