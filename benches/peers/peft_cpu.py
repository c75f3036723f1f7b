"""PEFT + transformers + torch on the CPU: the peer of `lora-flow bench train` and `bench eval`.

Random weights in the shape of SmolLM2-135M (no download), LoRA on all seven projections, packed
documents of one length, whole steps: forward, loss, backward, clipping, AdamW. Prints JSON with
the same figures as `lora-flow bench --json`.

    python peft_cpu.py --mode f32|bf16|forward|forward-bf16|generate|generate-bf16
                       [--batch 4x256] [--steps 3] [--r 16] [--checkpointing] [--compile]
                       [--threads N]

`generate` continues a prompt of 128 tokens by 65, greedily, and counts those after the first.
"""

import argparse
import json
import resource
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

MODES = ["f32", "bf16", "forward", "forward-bf16", "generate", "generate-bf16"]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def smollm2_135m():
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_theta=100000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )


def cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def generate(model, prompt, new_tokens):
    """Speed of the tokens after the first, whose time is that of the prompt."""

    def run(count):
        wall, cpu = time.perf_counter(), cpu_seconds()
        with torch.no_grad():
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )
        assert out.shape[1] == prompt.shape[1] + count
        return time.perf_counter() - wall, cpu_seconds() - cpu

    run(2)
    first, whole = run(1), run(new_tokens)
    rest = new_tokens - 1
    print(
        json.dumps(
            {
                "bench": "generate",
                "torch": torch.__version__,
                "prompt_tokens_per_second": prompt.shape[1] / first[0],
                "tokens_per_second": rest / (whole[0] - first[0]),
                "tokens_per_cpu_second": rest / (whole[1] - first[1]),
                "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            },
            indent=2,
        )
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=MODES, default="f32")
    parser.add_argument("--batch", default="4x256", help="DOCSxTOKENS")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true", help="torch.compile; takes minutes")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    documents, tokens = map(int, args.batch.split("x"))
    dtype = torch.bfloat16 if args.mode.endswith("bf16") else torch.float32
    forward_only = not args.mode.startswith(("f32", "bf16"))

    torch.manual_seed(0)
    model = LlamaForCausalLM(smollm2_135m()).to(dtype)
    model.config.use_cache = False
    if not forward_only:
        if args.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        # Adapters stay f32 over a bf16 base: PEFT's default (autocast_adapter_dtype).
        model = get_peft_model(
            model,
            LoraConfig(r=args.r, lora_alpha=2 * args.r, target_modules=PROJECTIONS, task_type="CAUSAL_LM"),
        )
        model.train()
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=2e-4, weight_decay=0.0)
    else:
        model.eval()
    ids = torch.randint(0, 49152, (documents, tokens))
    if args.mode.startswith("generate"):
        return generate(model, torch.randint(0, 49152, (1, 128)), 65)
    if args.compile:
        model = torch.compile(model)

    def step():
        if forward_only:
            with torch.no_grad():
                loss = model(input_ids=ids, labels=ids).loss
        else:
            optimizer.zero_grad(set_to_none=True)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
        assert torch.isfinite(loss), "the loss is not finite"

    step()
    wall, cpu = time.perf_counter(), cpu_seconds()
    for _ in range(args.steps):
        step()
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    counted = documents * tokens * args.steps
    print(
        json.dumps(
            {
                "bench": args.mode
                + ("+checkpointing" if args.checkpointing else "")
                + ("+compile" if args.compile else ""),
                "documents": documents,
                "document_tokens": tokens,
                "steps": args.steps,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "tokens_per_second": counted / wall,
                "tokens_per_cpu_second": counted / cpu,
                "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
