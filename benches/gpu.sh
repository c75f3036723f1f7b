#!/usr/bin/env bash
# Checks and times lora-flow on one GPU in one go, beside PEFT + Liger on the same card; prints a
# short table last. Everything else goes to files in $OUT.
#
#   bash benches/gpu.sh                     # builds with cargo, then runs all
#   BUILT=DIR bash benches/gpu.sh           # uses DIR/lora-flow and the tests in DIR/tests/*
#
# Also read: ONLY (space-separated: tests, own, peers, plus shape names; all if empty), PYTHON (with
# torch, transformers, peft, liger-kernel), STEPS, OUT (default: target/gpu).
set -uo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
OUT=${OUT:-$here/target/gpu} PYTHON=${PYTHON:-python3} STEPS=${STEPS:-10} ONLY=${ONLY:-}
mkdir -p "$OUT"
wants() { [ -z "$ONLY" ] || case " $ONLY " in *" $1 "*) true ;; *) false ;; esac; }

if [ -z "${BUILT:-}" ]; then
  BUILT=$OUT/built
  mkdir -p "$BUILT/tests"
  (cd "$here" && cargo build --release --locked -p lora-flow --features cuda &&
    cargo test --release --locked --no-run -p lora-flow -p lora-flow-kernels -p lora-flow-model \
      --features lora-flow/cuda,lora-flow-kernels/cuda,lora-flow-model/cuda --test cuda) 2>&1 |
    tee "$OUT/build.log" | tail -n 3
  cp "${CARGO_TARGET_DIR:-$here/target}/release/lora-flow" "$BUILT/"
  sed -n 's/.*(\(.*deps\/cuda-[0-9a-f]*\)).*/\1/p' "$OUT/build.log" | while read -r test; do
    cp "$here/$test" "$BUILT/tests/" 2>/dev/null || cp "$test" "$BUILT/tests/"
  done
fi
# cuBLAS from PyTorch's wheels, where the machine has no toolkit.
wheels=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' 2>/dev/null)/nvidia
export LD_LIBRARY_PATH=$wheels/cu13/lib:$wheels/cublas/lib:/usr/local/cuda/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}

"$BUILT/lora-flow" doctor | tee "$OUT/doctor.txt" | grep cuda
failed=0
if wants tests; then
  # Each in its own process: a fault on the GPU ends one alone.
  for binary in "$BUILT"/tests/*; do
    for test in $("$binary" --list 2>/dev/null | sed -n 's/: test$//p'); do
      log=$OUT/test-$test.log
      LORA_FLOW_TEST_GPU=1 timeout 150 "$binary" --exact "$test" --nocapture >"$log" 2>&1
      code=$?
      [ $code = 0 ] || failed=1
      echo "test $test: $([ $code = 0 ] && echo ok || echo "FAILED ($code)")"
      [ $code = 0 ] || grep -aE 'panicked|FAILED|relative error [0-9.]+e|instead of|\[$' -A 2 "$log" | grep -av '^--' | tail -n 14
    done
  done
fi

own() { # name, arguments
  local name=$1
  shift
  wants own || return 0
  "$BUILT/lora-flow" bench train --device cuda --steps "$STEPS" --json "$@" >"$OUT/own-$name.json" 2>"$OUT/own-$name.err" ||
    { echo "own $name failed:"; tail -n 5 "$OUT/own-$name.err"; failed=1; }
}
peer() {
  local name=$1
  shift
  wants peers || return 0
  timeout 150 "$PYTHON" "$here/benches/peers/peft_gpu.py" --steps "$STEPS" "$@" >"$OUT/peer-$name.json" 2>"$OUT/peer-$name.err" ||
    { echo "peer $name failed:"; tail -n 3 "$OUT/peer-$name.err"; }
}

if wants smollm2-135m; then
  own 135m --shape smollm2-135m --batch 16x512
  peer 135m-liger --shape smollm2-135m --batch 16x512 --liger
fi
if wants llama3.2-1b; then
  own 1b --shape llama3.2-1b --batch 4x2048 --memory 8
  peer 1b-liger --shape llama3.2-1b --batch 4x2048 --liger
  own 1b-checkpointing --shape llama3.2-1b --batch 4x2048 --checkpointing
  peer 1b-liger-checkpointing --shape llama3.2-1b --batch 4x2048 --liger --checkpointing
fi
if wants llama3.1-8b; then
  own 8b --shape llama3.1-8b --batch 4x2048 --memory 30
  peer 8b-liger --shape llama3.1-8b --batch 4x2048 --liger
  own 8b-checkpointing --shape llama3.1-8b --batch 4x2048 --checkpointing
  peer 8b-liger-checkpointing --shape llama3.1-8b --batch 4x2048 --liger --checkpointing
fi

"$PYTHON" - "$OUT" <<'PY'
import json, pathlib, sys

out = pathlib.Path(sys.argv[1])
runs = {}
for path in sorted(out.glob("*.json")):
    try:
        runs[path.stem] = json.loads(path.read_text())
    except ValueError:
        pass
for name, run in runs.items():
    if name.startswith("own-"):
        print(f"\n{name}: {run['launches_per_step']} launches, first step after {run['seconds_to_first_step']:.2f} s, loss {run['loss']:.3f}")
        for row in run["profile"][:16]:
            print(f"  {row['name']:<26} {row['launches']:>5} x {1e3 * row['ms'] / row['launches']:>8.1f} us = {row['ms']:>8.2f} ms")
print("\n| run | ms/step | tokens/s | peak GiB | TFLOP/s | of ceiling | over peer |")
print("|---|---|---|---|---|---|---|")
for name, run in runs.items():
    peer = runs.get(name.replace("own-", "peer-").replace("135m", "135m-liger").replace("1b", "1b-liger").replace("8b", "8b-liger"))
    ratio = f"{run['tokens_per_second'] / peer['tokens_per_second']:.2f}" if name.startswith("own-") and peer else ""
    print(f"| {name} | {run['ms_per_step']:.1f} | {run['tokens_per_second']:.0f} | {run['peak_gpu_bytes'] / 2**30:.2f} "
          f"| {run['tflops']:.0f} | {100 * run['model_flop_utilisation']:.0f} % | {ratio} |")
if runs:
    print("card:", next(iter(runs.values()))["gpu"])
PY
exit $failed
