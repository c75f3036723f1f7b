#!/usr/bin/env bash
# lora-flow and its peer in turns, so that whatever else the machine does meets both; prints a
# Markdown table of medians and of their ratios.
#
#   MODEL=out/domain_adapt_base ROUNDS=3 BATCH=4x256 STEPS=2 bash benches/train_cpu.sh
#
# THREADS=1 compares one core with one: on a machine that others use, threads that wait for each
# other burn processor time. Also read: LORA_FLOW (the binary), PYTHON (with torch, transformers,
# peft), PEERS (modes of benches/peers/peft_cpu.py).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
: "${MODEL:?name a published model folder, as MODEL=out/domain_adapt_base}"
LORA_FLOW=${LORA_FLOW:-$here/../target/release/lora-flow}
PYTHON=${PYTHON:-python3}
ROUNDS=${ROUNDS:-3} BATCH=${BATCH:-4x256} STEPS=${STEPS:-2} PEERS=${PEERS:-f32 bf16 forward}
THREADS=${THREADS:-$(nproc)}
export RAYON_NUM_THREADS=$THREADS
results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT

# The command of lora-flow that does what a mode of the peer does.
own() {
  local what=(train --batch "$BATCH" --steps "$STEPS")
  case $1 in
    forward*) what=(eval --batch "$BATCH" --steps "$STEPS") ;;
    generate*) what=(generate) ;;
  esac
  [[ $1 != *bf16 ]] || what+=(--bf16)
  "$LORA_FLOW" bench "${what[@]}" --model "$MODEL" --json
}

for round in $(seq "$ROUNDS"); do
  echo "round $round of $ROUNDS" >&2
  for mode in $PEERS; do
    own "$mode" >"$results/own-$mode.$round"
    "$PYTHON" "$here/peers/peft_cpu.py" --mode "$mode" --batch "$BATCH" --steps "$STEPS" --threads "$THREADS" >"$results/peer-$mode.$round"
  done
done

"$PYTHON" - "$results" "$BATCH" <<'PY'
import json, pathlib, statistics, sys

runs = {}
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    runs.setdefault(path.stem, []).append(json.loads(path.read_text()))
median = lambda name, key: statistics.median(run[key] for run in runs[name])
print(f"| batch {sys.argv[2]} | tokens/s | tokens/CPU-second | peak memory, GB | own speed over it |")
print("|---|---|---|---|---|")
for name in runs:
    cpu = median(name, "tokens_per_cpu_second")
    own = name.replace("peer-", "own-")
    ratio = "" if name == own else f"{median(own, 'tokens_per_cpu_second') / cpu:.2f}"
    wall, peak = median(name, "tokens_per_second"), median(name, "peak_rss_bytes") * 1e-9
    print(f"| {name} | {wall:.0f} | {cpu:.1f} | {peak:.2f} | {ratio} |")
PY
