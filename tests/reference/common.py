"""What the reference scripts share: paths, the hashed floats that the Rust tests recompute, files."""

import json
import os
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).resolve().parent
SEED_A, SEED_B, SEED_SIGN = 0, 1, 2


def single_thread() -> None:
    """One thread and no fast paths: the values should not depend on the machine's core count."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.utils.logging.disable_progress_bar()


def smollm2_path() -> Path:
    """The GGUF with the SmolLM2-135M-Instruct weights (Q4_1) and tokenizer."""
    name = os.environ.get("LORA_FLOW_SMOLLM2_GGUF")
    if not name:
        raise SystemExit("set LORA_FLOW_SMOLLM2_GGUF to the path of SmolLM2-135M-Instruct.Q4_1.gguf")
    return Path(name)


def hash_u16(kind: int, module: int, rows: int, cols: int, first_row: int = 0) -> np.ndarray:
    """A [rows, cols] table of 16-bit hashes; `tests/reference/README.md` states the formula."""
    u32 = np.uint32
    i = np.arange(first_row, first_row + rows, dtype=u32)[:, None]
    j = np.arange(cols, dtype=u32)[None, :]
    with np.errstate(over="ignore"):
        x = (
            i * u32(0x9E3779B1)
            + j * u32(0x85EBCA77)
            + u32(module) * u32(0xC2B2AE3D)
            + u32(kind) * u32(0x27D4EB2F)
        )
        x ^= x >> u32(15)
        x *= u32(0x2C1B3C6D)
        x ^= x >> u32(12)
        x *= u32(0x297A2D39)
        x ^= x >> u32(15)
    return x >> u32(16)


def hash_floats(kind: int, module: int, rows: int, cols: int, exponent: int) -> np.ndarray:
    """Floats in [-0.5, 0.5)·2^exponent, exactly representable in f32 (and nearly so in bf16)."""
    h = hash_u16(kind, module, rows, cols).astype(np.float32)
    return (h - np.float32(32768.0)) * np.float32(2.0 ** (exponent - 16))


def hash_signs(probe: int, module: int, rows: int, cols: int) -> np.ndarray:
    """±1 for the random projections that stand for a whole tensor."""
    h = hash_u16(SEED_SIGN + probe, module, rows, cols)
    return np.where(h & 1, 1.0, -1.0)


def write_json(path: Path, value) -> None:
    """One line per top-level list entry: small diffs, small files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = []
    for key, v in value.items():
        if isinstance(v, list) and v and isinstance(v[0], (list, dict)):
            rows = ",\n".join("  " + compact(row) for row in v)
            parts.append(f" {compact(key)}: [\n{rows}\n ]")
        else:
            parts.append(f" {compact(key)}: {compact(v)}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def compact(value) -> str:
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)


def g(x, digits: int = 9) -> float:
    """A float with as many digits as an f32 has."""
    return float(f"{float(x):.{digits}g}")


def supervised_loss(model, docs):
    """(sum of the negative log-likelihoods, count) of documents run as rows of one right-padded
    batch with an attention mask. A document is {"ids": [...], "mask": [...]}: mask[t] says that
    token t is a target; a first token never is one, for nothing stands before it.
    """
    width = max(len(d["ids"]) for d in docs)
    ids = torch.zeros(len(docs), width, dtype=torch.long)
    attention = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, d in enumerate(docs):
        n = len(d["ids"])
        ids[row, :n] = torch.tensor(d["ids"])
        attention[row, :n] = 1
        mask = torch.tensor(d["mask"], dtype=torch.bool)
        labels[row, :n] = torch.where(mask, ids[row, :n], torch.tensor(-100))
    # torch's f32 log-softmax on the CPU loses small terms: over SmolLM2's 49,152 columns every loss
    # comes out 1.8e-5 too low. The model stays f32; only the loss is taken in f64.
    logits = model(input_ids=ids, attention_mask=attention).logits.double()
    nll = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1),
        ignore_index=-100, reduction="sum",
    )
    return nll, int((labels[:, 1:] != -100).sum())


def train_steps(model, steps, *, learning_rate, warmup_steps, total_steps, weight_decay, max_grad_norm):
    """The loop of HF's Trainer, written out: each step is a list of micro-batches; the loss is the
    sum over supervised tokens divided by their number in the whole step.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        params, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay, foreach=False,
    )
    schedule = transformers.get_scheduler(
        "linear", optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps,
    )
    log = []
    for micro_batches in steps:
        count = sum(sum(d["mask"][1:]) for docs in micro_batches for d in docs)
        loss = 0.0
        for docs in micro_batches:
            nll, _ = supervised_loss(model, docs)
            (nll / count).backward()
            loss += float(nll.detach()) / count
        norm = torch.nn.utils.clip_grad_norm_(params, max_grad_norm)
        log.append({"loss": g(loss), "grad_norm": g(norm), "lr": g(schedule.get_last_lr()[0]), "tokens": count})
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return log
