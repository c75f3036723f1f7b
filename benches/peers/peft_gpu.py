#!/usr/bin/env python3
"""The peer on a GPU: LoRA training with PEFT + transformers, with or without Liger's kernels.

    python benches/peers/peft_gpu.py --shape smollm2-135m --batch 16x512 --liger

Random weights of a known model's shape and random tokens: nothing is downloaded. LoRA on all seven
projections, AdamW (fused), gradients clipped to norm 1, base in bf16; adapters in bf16 or, with
`--adapters f32`, in f32 under autocast, which is PEFT's default. Whole steps are timed. Prints one JSON object;
the matmul ceiling and the model's arithmetic are counted as `lora-flow bench` counts them.
"""

import argparse
import json
import time

import torch

SHAPES = {
    "smollm2-135m": dict(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                         intermediate_size=1536, vocab_size=49152, tie_word_embeddings=True, rope_theta=100000.0),
    "llama3.2-1b": dict(hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
                        intermediate_size=8192, vocab_size=128256, tie_word_embeddings=True, rope_theta=500000.0),
    "llama3.1-8b": dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
                        intermediate_size=14336, vocab_size=128256, tie_word_embeddings=False, rope_theta=500000.0),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def model_of(args):
    if args.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama
        apply_liger_kernel_to_llama()
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPES[args.shape], max_position_embeddings=8192, attn_implementation="sdpa")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    lora = LoraConfig(r=args.r, lora_alpha=2 * args.r, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora, autocast_adapter_dtype=args.adapters == "f32")
    if args.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.config.use_cache = False
    return model.train(), config


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    parser.add_argument("--batch", default="4x2048", help="documents x tokens")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--adapters", choices=["f32", "bf16"], default="bf16")
    parser.add_argument("--liger", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    args = parser.parse_args()
    documents, tokens = map(int, args.batch.split("x"))

    model, config = model_of(args)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=True)
    ids = torch.randint(0, config.vocab_size, (args.steps + 5, documents, tokens), device="cuda")

    def step(i):
        with torch.autocast("cuda", torch.bfloat16, enabled=args.adapters == "f32"):
            loss = model(input_ids=ids[i], labels=ids[i]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    for i in range(5):
        step(i)
    torch.cuda.synchronize()
    started = time.time()
    for i in range(args.steps):
        loss = step(5 + i)
    torch.cuda.synchronize()
    seconds = (time.time() - started) / args.steps
    peak = torch.cuda.max_memory_allocated()

    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    started = time.time()
    for _ in range(10):
        a @ b
    torch.cuda.synchronize()
    ceiling = 2 * 8192**3 * 10 / (time.time() - started)

    heads = config.num_attention_heads
    width = config.hidden_size // heads
    kv = config.num_key_value_heads * width
    linear = config.num_hidden_layers * (
        2 * config.hidden_size * (config.hidden_size + kv) + 3 * config.hidden_size * config.intermediate_size)
    weights = linear + config.vocab_size * config.hidden_size
    attention = 3 * 2 * tokens * tokens * config.hidden_size * config.num_hidden_layers * documents
    rate = (4 * weights * documents * tokens + attention) / seconds
    print(json.dumps({
        "peer": "peft" + ("+liger" if args.liger else "") + ("+checkpointing" if args.checkpointing else ""),
        "gpu": torch.cuda.get_device_name(), "shape": args.shape, "batch": args.batch, "adapters": args.adapters,
        "loss": float(loss.detach()), "ms_per_step": seconds * 1e3, "tokens_per_second": documents * tokens / seconds,
        "peak_gpu_bytes": peak, "tflops": rate * 1e-12, "ceiling_tflops": ceiling * 1e-12,
        "model_flop_utilisation": rate / ceiling,
    }))


if __name__ == "__main__":
    main()
