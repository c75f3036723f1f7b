"""transformers loads a folder that lora-flow merged, and computes what base + PEFT adapter compute.

    python tests/reference/check_merged.py MERGED_DIR BASE ADAPTER_DIR [--tolerance 1e-3]

BASE is a Hugging Face folder or a GGUF. Weights saved in bf16 need a tolerance for their rounding (about 0.3 for
SmolLM2); in f32 1e-3 holds. If the folder has a tokenizer, AutoTokenizer must load it and give the ids that the
`tokenizers` library gives for the same tokenizer.json.
"""

import argparse
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer

import common
from load import compare, load_adapted, load_base, logits

TEXTS = ["The capital of France is", "x  12 a", "def f(n):\n    return n * 2  # 1234\n", "Grüße, 世界 👩‍💻"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("merged", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-3)
    args = parser.parse_args()
    common.single_thread()

    good = True
    merged, adapted = load_base(args.merged), load_adapted(load_base(args.base), args.adapter)
    vocab = merged.config.vocab_size
    prompts = [[(7 * n + 3) % vocab for n in range(12)], [5]]
    if (args.merged / "tokenizer.json").exists():
        auto = AutoTokenizer.from_pretrained(args.merged)
        plain = Tokenizer.from_file(str(args.merged / "tokenizer.json"))
        for text in TEXTS:
            ids, want = auto(text, add_special_tokens=False)["input_ids"], plain.encode(text, add_special_tokens=False).ids
            if ids != want:
                good = False
                print(f"FAIL: {type(auto).__name__} gives {ids} for {text!r}, tokenizer.json says {want}")
            prompts.append(want)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            print(f"{name}: tokenizer {getattr(auto, name)}, config {getattr(merged.config, name)}, generation {getattr(merged.generation_config, name)}")
        if auto.chat_template:
            print(json.dumps(auto.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)))
    for n, ids in enumerate(prompts):
        good &= compare(f"prompt {n}", logits(merged, ids), logits(adapted, ids), args.tolerance)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
