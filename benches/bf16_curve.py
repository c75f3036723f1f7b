#!/usr/bin/env python3
"""How far training over a base in bf16 moves from training over the same in f32.

    python3 benches/bf16_curve.py target/release/lora-flow [--set batch=4 …]

Runs bf16_curve.yaml (SmolLM2-135M, the rows of two of the toolchain's books) and compares the loss of
every step, the means over ten steps, and the perplexity on held-out chapters. Further arguments go
to `lora-flow run`. Standard library alone.
"""
import json
import pathlib
import subprocess
import sys

root = pathlib.Path(__file__).resolve().parent.parent
out = root / "out/bf16_curve"


def losses(dtype):
    lines = map(json.loads, (out / dtype / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def main():
    subprocess.run([sys.argv[1], "run", root / "benches/bf16_curve.yaml", *sys.argv[2:]], check=True)
    f32, bf16 = losses("float32"), losses("bfloat16")
    assert len(f32) == len(bf16) > 0, (len(f32), len(bf16))
    off = [abs(b / f - 1) for f, b in zip(f32, bf16)]
    tens = [slice(i, i + 10) for i in range(0, len(f32), 10)]
    means = [abs(sum(bf16[t]) / sum(f32[t]) - 1) for t in tens]
    print(f"{len(f32)} steps, loss {f32[0]:.4f} to {f32[-1]:.4f} (bf16: {bf16[-1]:.4f})")
    print(f"a step differs by {100 * sum(off) / len(off):.3f} % in the mean, {100 * max(off):.3f} % at most")
    print(f"means over ten steps by {100 * max(means):.3f} % at most")
    perplexity = [
        json.loads((out / f"{dtype}_eval/metrics.json").read_text())["perplexity"]
        for dtype in ("float32", "bfloat16")
    ]
    print(f"held-out perplexity {perplexity[0]:.4f}, bf16 {perplexity[1]:.4f}: {100 * (perplexity[1] / perplexity[0] - 1):+.3f} %")


main()
