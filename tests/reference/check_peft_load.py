"""PEFT loads an adapter that lora-flow saved, and computes the same logits.

    python tests/reference/check_peft_load.py ADAPTER_DIR BASE [--logits FILE] [--tolerance 1e-4]

BASE is a Hugging Face folder or a GGUF. FILE is JSON: [{"ids": [...], "logits": [[...], ...]}, ...] with one row
of logits per position (tests/reference/README.md says which test writes one). Without FILE the script only
loads, strictly, and prints the largest logits, to be compared by eye.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

import common
from load import compare, load_adapted, load_base, logits


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("adapter", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("--logits", type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    args = parser.parse_args()
    common.single_thread()

    base = load_base(args.base)
    ids = [5, 17, 9, 33, 21]
    before = logits(base, ids)
    model = load_adapted(base, args.adapter)
    after = logits(model, ids)
    n = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    print(f"loaded strictly: {n:,} adapter parameters; they move the logits of {ids} by at most {float((after - before).abs().max()):.3e}")
    if not args.logits:
        for position, row in enumerate(after):
            top = row.topk(3)
            print(f"  position {position}:", ", ".join(f"{i}: {v:.5f}" for i, v in zip(top.indices.tolist(), top.values.tolist())))
        return
    good = True
    for n, entry in enumerate(json.loads(args.logits.read_text())):
        good &= compare(f"prompt {n}", torch.tensor(entry["logits"]), logits(model, entry["ids"]), args.tolerance)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
