#!/usr/bin/env bash
# All-reduce between two hosts of two ranks each, flat and hierarchical: how long it takes, and how many bytes enter a host,
# counted by the switch. The hosts are namespaces of network and processes joined by scripts/netns-cluster: ranks of one host
# share memory, ranks of two reach each other by TCP only. Needs root, and target/release/gradwire-bench.
#
#   bench/peers/two_hosts.sh [BYTES]    bytes of the buffer (4194304)
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
bytes=${1:-4194304} rounds=10
# One is checked and three warm up.
calls=$((rounds + 4))
export BENCH=$root/target/release/gradwire-bench
[ -x "$BENCH" ] || { echo "build it first: cargo build --release -p gradwire-bench" >&2; exit 2; }
# Ranks of a host see each other's processes, and so each other's memory; those of another host do not.
host='
    for near in 0 1; do
        "$BENCH" all-reduce --wire auto --store tcp://10.78.0.1:29611 --rank $((2 * CLUSTER_RANK + near)) --world-size 4 "$@" &
        ranks+=($!)
    done
    status=0
    for rank in "${ranks[@]}"; do wait "$rank" || status=1; done
    exit $status'
stats=$(mktemp)
trap 'rm -f "$stats"' EXIT
for algorithm in ring direct leaders hierarchical; do
    "$root/scripts/netns-cluster" -n 2 --plain -t 120 -s "$stats" -- unshare --pid --fork --mount-proc bash -c "$host" host \
        --algo "all_reduce:$algorithm" --min-bytes "$bytes" --max-bytes "$bytes" --rounds "$rounds" --json |
        python3 -c 'import json, sys; row = json.loads(sys.stdin.readline()); print("%-14s %10.1f us" % (sys.argv[1], row["p50_us"]), end="")' "$algorithm"
    awk -v calls="$calls" -v bytes="$bytes" \
        '$1 == "sent" { printf "   %.3f of the buffer enters a host (with headers)\n", $2 / calls / bytes }' "$stats"
done
