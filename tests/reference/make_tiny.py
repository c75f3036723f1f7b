"""tiny/<variant>/: random models of every supported family, small enough to commit.

    model/                config.json, model.safetensors       as transformers saves them
    adapter/              a PEFT adapter with B ≠ 0            as PEFT saves it
    adapter_after/        the same after ten steps             as PEFT saves it
    tensors.safetensors   logits.{n}.base [T, V], logits.{n}.adapter [T, V], grad.{PEFT tensor name}
    values.json           prompts, batches, settings, and what each step reports
"""

import json
import shutil

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from common import HERE, g, supervised_loss, train_steps, write_json

LLAMA = dict(
    vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
)
SMALL = LLAMA | dict(vocab_size=64, hidden_size=16, intermediate_size=24)
# Each variant also turns on one way in which adapters differ.
VARIANTS = {
    "llama": dict(
        model=LlamaForCausalLM, config=LlamaConfig(**LLAMA, tie_word_embeddings=True),
        lora=dict(r=4, lora_alpha=8, target_modules="all-linear"), micro_batches=1, weight_decay=0.01,
    ),
    "llama_untied": dict(
        model=LlamaForCausalLM,
        config=LlamaConfig(
            **LLAMA, tie_word_embeddings=False, attention_bias=True, mlp_bias=True,
            rope_parameters=dict(
                rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0,
                high_freq_factor=4.0, original_max_position_embeddings=16,
            ),
        ),
        lora=dict(r=4, lora_alpha=8, target_modules="all-linear"), micro_batches=2, weight_decay=0.0,
    ),
    "mistral": dict(
        model=MistralForCausalLM, config=MistralConfig(**SMALL, head_dim=4, tie_word_embeddings=False, sliding_window=5),
        lora=dict(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"]), micro_batches=1, weight_decay=0.0,
    ),
    "qwen2": dict(
        model=Qwen2ForCausalLM, config=Qwen2Config(**SMALL, tie_word_embeddings=True, use_sliding_window=False),
        lora=dict(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "k_proj", "o_proj", "up_proj"]),
        micro_batches=1, weight_decay=0.0,
    ),
    "qwen3": dict(
        model=Qwen3ForCausalLM, config=Qwen3Config(**SMALL, head_dim=8, tie_word_embeddings=True, use_sliding_window=False),
        lora=dict(
            r=4, lora_alpha=8, target_modules="all-linear", rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 6},
            alpha_pattern={"down_proj": 16},
        ),
        micro_batches=1, weight_decay=0.0,
    ),
}
SETTINGS = dict(learning_rate=1e-2, warmup_steps=3, total_steps=10, max_grad_norm=1.0)
STEPS = 10


def randomise(model, rng) -> None:
    """Weights that make every part matter: norms away from 1, biases away from 0."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            x = torch.from_numpy(rng.standard_normal(tuple(p.shape)).astype(np.float32))
            if name.endswith("norm.weight"):
                p.copy_(1.0 + 0.2 * x)
            elif name.endswith(".bias"):
                p.copy_(0.2 * x)
            elif "embed_tokens" in name or "lm_head" in name:
                p.copy_(0.2 * x)
            else:
                p.copy_(x * p.shape[1] ** -0.5)


def document(rng, vocab, length, prompt) -> dict:
    """A document whose first `prompt` tokens (at least one) are not targets."""
    ids = rng.integers(3, vocab, length).tolist()
    return {"ids": ids, "mask": [int(t >= max(prompt, 1)) for t in range(length)]}


def make_variant(name, v, seed) -> None:
    folder = HERE / "tiny" / name
    shutil.rmtree(folder, ignore_errors=True)
    rng = np.random.default_rng(seed)
    config = v["config"]
    config._attn_implementation = "eager"
    base = v["model"](config).float().eval()
    randomise(base, rng)
    base.save_pretrained(folder / "model")
    # A fixed time of making would do no harm, but nobody needs it.
    (folder / "model" / "generation_config.json").unlink(missing_ok=True)

    vocab = config.vocab_size
    prompts = [rng.integers(3, vocab, n).tolist() for n in (1, 7, 19)]
    grad_docs = [document(rng, vocab, 11, 0), document(rng, vocab, 23, 5)]
    steps = [
        [[document(rng, vocab, int(rng.integers(6, 24)), int(rng.integers(0, 4))) for _ in range(2)] for _ in range(v["micro_batches"])]
        for _ in range(STEPS)
    ]

    tensors = {}
    with torch.no_grad():
        for n, ids in enumerate(prompts):
            tensors[f"logits.{n}.base"] = base(input_ids=torch.tensor([ids])).logits[0].clone()

    # dropout 0: PEFT's and our random streams cannot agree.
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **v["lora"]))
    with torch.no_grad():
        for pname, p in model.named_parameters():
            if "lora_B" in pname:
                p.copy_(torch.from_numpy(0.1 * rng.standard_normal(tuple(p.shape)).astype(np.float32)))
            elif "lora_A" in pname:
                p.copy_(torch.from_numpy((rng.random(tuple(p.shape)) * 2 - 1).astype(np.float32) * p.shape[1] ** -0.5))
    save_adapter(model, folder / "adapter")
    with torch.no_grad():
        for n, ids in enumerate(prompts):
            tensors[f"logits.{n}.adapter"] = model(input_ids=torch.tensor([ids])).logits[0].clone()

    nll, count = supervised_loss(model, grad_docs)
    (nll / count).backward()
    for key, grad in saved_names(model, lambda p: p.grad).items():
        tensors[f"grad.{key}"] = grad.contiguous().clone()
    model.zero_grad()
    # The loss that HF itself computes is the same one.
    row = grad_docs[0]
    hf = model(input_ids=torch.tensor([row["ids"]]), labels=torch.tensor([row["ids"]])).loss
    own, n = supervised_loss(model, [row])
    assert abs(float(hf.detach()) - float(own.detach()) / n) < 1e-6

    log = train_steps(model, steps, weight_decay=v["weight_decay"], **SETTINGS)
    save_adapter(model, folder / "adapter_after")
    save_file(tensors, folder / "tensors.safetensors")
    write_json(folder / "values.json", {
        "settings": SETTINGS | {"weight_decay": v["weight_decay"]},
        "prompts": prompts,
        "grad_documents": grad_docs,
        "grad_loss": g(nll.detach() / count),
        "steps": log,
        "documents": [[d for docs in step for d in docs] for step in steps],
        "micro_batch_documents": 2,
    })
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    print(f"tiny/{name}: {size / 1024:.0f} KiB, losses {log[0]['loss']:.4f} … {log[-1]['loss']:.4f}, norms {min(s['grad_norm'] for s in log):.2f}–{max(s['grad_norm'] for s in log):.2f}")


def saved_names(model, value) -> dict:
    """value(parameter) under the names of PEFT's file."""
    return {
        n.replace(".default.weight", ".weight"): value(p)
        for n, p in model.named_parameters() if "lora_" in n
    }


def save_adapter(model, folder) -> None:
    assert set(get_peft_model_state_dict(model)) == set(saved_names(model, id))
    model.save_pretrained(folder)
    # PEFT writes a set in whatever order it has; sorted, a remake changes nothing.
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2) + "\n")
    (folder / "README.md").unlink(missing_ok=True)


def make() -> None:
    for seed, (name, v) in enumerate(VARIANTS.items()):
        make_variant(name, v, seed)
        # What was saved loads back strictly and says the same.
        folder = HERE / "tiny" / name
        values = json.loads((folder / "values.json").read_text())
        base = v["model"].from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="eager")
        again = PeftModel.from_pretrained(base, folder / "adapter").eval()
        nll, count = supervised_loss(again, values["grad_documents"])
        assert abs(float(nll.detach()) / count - values["grad_loss"]) < 1e-6, name
