"""methods/<case>/: what PEFT and plain torch make of the variants of the method, on the models of tiny/.

    adapter/              the adapter before training (PEFT's own start for PiSSA and OLoRA)
    adapter_after/        after ten steps; PiSSA and OLoRA as PEFT converts them to plain LoRA of rank 2r
    model_after/          for full fine-tuning instead of adapters
    tensors.safetensors   logits.{n} [T, V] before training, grad.{name}; start.{name} for PiSSA and OLoRA
    values.json           as in tiny/, and the case's settings
"""

import json
import shutil
import tempfile

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file, save_file

from common import HERE, g, supervised_loss, write_json
from make_tiny import document

SETTINGS = dict(learning_rate=1e-2, warmup_steps=3, total_steps=10, max_grad_norm=1.0)
ALL = "all-linear"
CASES = {
    "dora": dict(base="llama_untied", lora=dict(r=4, lora_alpha=8, use_dora=True, target_modules=ALL), weight_decay=0.01),
    "dora_rslora": dict(base="mistral", lora=dict(r=2, lora_alpha=4, use_dora=True, use_rslora=True, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 3})),
    "loraplus": dict(base="mistral", lora=dict(r=3, lora_alpha=6, target_modules=ALL), loraplus_lr_ratio=4.0, weight_decay=0.02),
    "modules_to_save": dict(base="mistral", lora=dict(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head", "norm", "embed_tokens"]), weight_decay=0.02),
    "pissa": dict(base="mistral", lora=dict(r=3, lora_alpha=6, init_lora_weights="pissa", target_modules=ALL)),
    "olora": dict(base="qwen3", lora=dict(r=4, lora_alpha=6, init_lora_weights="olora", use_rslora=True, target_modules=["q_proj", "k_proj", "up_proj"])),
    "full_mistral": dict(base="mistral", weight_decay=0.02),
    "full_qwen2": dict(base="qwen2", weight_decay=0.02),
    "full_qwen3": dict(base="qwen3"),
}
# Mean loss and gradient norm under dropout, over many masks.
DROPOUT, PASSES, COPIES = 0.3, 40, 250


def make_optimizer(model, case):
    """HF's groups: norms and biases do not decay. LoRA+ is PEFT's own."""
    lr, decay = SETTINGS["learning_rate"], case.get("weight_decay", 0.0)
    rest = dict(betas=(0.9, 0.999), eps=1e-8)
    if ratio := case.get("loraplus_lr_ratio"):
        return create_loraplus_optimizer(model, torch.optim.AdamW, lr=lr, loraplus_lr_ratio=ratio, loraplus_weight_decay=decay, foreach=False, **rest)
    names = transformers.Trainer.get_decay_parameter_names(None, model)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        dict(params=[p for n, p in trained if n in names], weight_decay=decay),
        dict(params=[p for n, p in trained if n not in names], weight_decay=0.0),
    ]
    return torch.optim.AdamW([grp for grp in groups if grp["params"]], lr=lr, foreach=False, **rest)


def train(model, steps, case):
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(model, case)
    schedule = transformers.get_scheduler(
        "linear", optimizer, num_warmup_steps=SETTINGS["warmup_steps"], num_training_steps=SETTINGS["total_steps"],
    )
    log = []
    for docs in steps:
        nll, count = supervised_loss(model, docs)
        (nll / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(params, SETTINGS["max_grad_norm"])
        lr = schedule.get_last_lr()[0]
        log.append({"loss": g(nll.detach() / count), "grad_norm": g(norm), "lr": g(lr), "tokens": count})
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return log


def load_base(name):
    import make_tiny

    folder = HERE / "tiny" / name / "model"
    model = make_tiny.VARIANTS[name]["model"].from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def saved(model) -> dict:
    return {n: t.contiguous().clone() for n, t in get_peft_model_state_dict(model).items()}


def gradients(model) -> dict:
    """The gradient of every trained tensor under its name in PEFT's file."""
    with torch.no_grad():
        values = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
        for n, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(p.grad)
        out = saved(model)
        for n, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(values[n])
    return out


def save(model, folder, **options) -> None:
    model.save_pretrained(folder, **options)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    for field in ("target_modules", "modules_to_save"):
        if isinstance(config[field], list):
            config[field] = sorted(config[field])
    # The folder of the initial adapter is a temporary one.
    config["base_model_name_or_path"] = None
    path.write_text(json.dumps(config, indent=2) + "\n")
    (folder / "README.md").unlink(missing_ok=True)


def logits(model, prompts) -> dict:
    with torch.no_grad():
        return {f"logits.{n}": model(input_ids=torch.tensor([ids])).logits[0].clone() for n, ids in enumerate(prompts)}


def make_case(name, case, seed) -> None:
    folder = HERE / "methods" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1000 + seed)
    base = load_base(case["base"])
    vocab = base.config.vocab_size
    prompts = [rng.integers(3, vocab, n).tolist() for n in (1, 9)]
    grad_docs = [document(rng, vocab, 11, 0), document(rng, vocab, 17, 5)]
    steps = [[document(rng, vocab, int(rng.integers(6, 20)), int(rng.integers(0, 4))) for _ in range(2)] for _ in range(10)]
    before = logits(base, prompts)

    full = "lora" not in case
    if full:
        model, start = base, None
        for p in model.parameters():
            p.requires_grad_(True)
    else:
        config = LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **case["lora"])
        model = get_peft_model(base, config)
        start = case["lora"].get("init_lora_weights")
        with torch.no_grad():
            for pname, p in model.named_parameters():
                if not p.requires_grad or start:
                    continue
                x = torch.from_numpy(rng.standard_normal(tuple(p.shape)).astype(np.float32))
                if "magnitude" in pname:
                    p.mul_(1 + 0.2 * x)
                elif "lora_B" in pname or "modules_to_save" in pname:
                    p.add_(0.1 * x)
    model.eval()

    tensors = logits(model, prompts)
    if start:
        worst = max(float((tensors[k] - before[k]).abs().max()) for k in before)
        assert worst < 1e-4, f"{name}: the start moves logits by {worst}"
        tensors |= {f"start.{n}": t for n, t in saved(model).items()}
        config.init_lora_weights = True
        initial = tempfile.mkdtemp()
        model.save_pretrained(initial)
    elif not full:
        save(model, folder / "adapter")
    nll, count = supervised_loss(model, grad_docs)
    (nll / count).backward()
    if full:
        tensors |= {f"grad.{n}": p.grad.contiguous().clone() for n, p in model.named_parameters()}
    else:
        tensors |= {f"grad.{n}": t for n, t in gradients(model).items()}
    model.zero_grad()
    log = train(model, steps, case)
    if full:
        model.save_pretrained(folder / "model_after")
        (folder / "model_after" / "generation_config.json").unlink(missing_ok=True)
    elif start:
        config.init_lora_weights = start
        save(model, folder / "adapter_after", path_initial_model_for_weight_conversion=initial)
        # PEFT's plain adapter on the untouched base says what PiSSA's says on the lessened one.
        again = PeftModel.from_pretrained(load_base(case["base"]), folder / "adapter_after").eval()
        trained, plain = logits(model, prompts), logits(again, prompts)
        worst = max(float((trained[k] - plain[k]).abs().max()) for k in plain)
        assert worst < 1e-4, f"{name}: the conversion moves logits by {worst}"
    else:
        save(model, folder / "adapter_after")
    save_file(tensors, folder / "tensors.safetensors")
    write_json(folder / "values.json", {
        "base": case["base"],
        "settings": SETTINGS | {"weight_decay": case.get("weight_decay", 0.0), "loraplus_lr_ratio": case.get("loraplus_lr_ratio")},
        "lora": case.get("lora"),
        "prompts": prompts,
        "grad_documents": grad_docs,
        "grad_loss": g(nll.detach() / count),
        "steps": log,
        "documents": steps,
        "micro_batch_documents": 2,
    })
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    print(f"methods/{name}: {size / 1024:.0f} KiB, losses {log[0]['loss']:.4f} … {log[-1]['loss']:.4f}")


def make_dropout() -> None:
    """Random streams cannot agree, means can: loss and gradient of B over many masks."""
    out = {"p": DROPOUT, "samples": PASSES * COPIES}
    for name in ("loraplus", "dora_rslora"):
        case = CASES[name]
        values = json.loads((HERE / "methods" / name / "values.json").read_text())
        model = PeftModel.from_pretrained(load_base(case["base"]), HERE / "methods" / name / "adapter", is_trainable=True)
        for module in model.modules():
            if isinstance(module, torch.nn.ModuleDict) and "default" in module and isinstance(module["default"], torch.nn.Identity):
                module["default"] = torch.nn.Dropout(DROPOUT)
        model.train()
        docs = values["grad_documents"][:1]
        ids = torch.tensor([docs[0]["ids"]] * COPIES)
        targets = torch.tensor(docs[0]["mask"], dtype=torch.bool)
        labels = torch.where(targets, ids, torch.tensor(-100))[:, 1:]
        count, losses = int(targets[1:].sum()), []
        for _ in range(PASSES):
            # Every row of the batch has masks of its own.
            logits = model(input_ids=ids).logits[:, :-1].double()
            nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none").sum(1) / count
            nll.sum().backward()
            losses += nll.detach().tolist()
        samples = PASSES * COPIES
        grads = {n: p.grad / samples for n, p in model.named_parameters() if p.requires_grad and ("lora_B" in n or "magnitude" in n)}
        losses = np.array(losses)
        norm = {n: float(t.norm()) for n, t in grads.items()}
        biggest = max(norm, key=norm.get)
        out[name] = {
            "loss_mean": g(losses.mean()), "loss_sd": g(losses.std(ddof=1)), "loss_without": g(plain_loss(model, docs)),
            "gradient": biggest.replace(".default.weight", ".weight").replace("lora_magnitude_vector.weight", "lora_magnitude_vector"),
            "gradient_mean": [g(x, 6) for x in grads[biggest].flatten().tolist()],
        }
        print(f"methods/dropout {name}: loss {losses.mean():.5f} ± {losses.std() / samples ** 0.5:.5f}")
    write_json(HERE / "methods" / "dropout.json", out)


def plain_loss(model, docs) -> float:
    model.eval()
    nll, count = supervised_loss(model, docs)
    return float(nll.detach()) / count


def make() -> None:
    for seed, (name, case) in enumerate(CASES.items()):
        make_case(name, case, seed)
    make_dropout()
