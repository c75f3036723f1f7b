"""smollm2.json: the real SmolLM2-135M-Instruct in f32: logits of three prompts and ten PEFT steps.

The weights are those of the Q4_1 GGUF, dequantised here (not by transformers' GGUF loader), so that
a program which reads the same file has the very same numbers to start from.
"""

import time

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from common import HERE, SEED_A, SEED_B, g, hash_floats, hash_signs, hash_u16, smollm2_path, train_steps, write_json
from make_tokenizer import PlainTokenizer, gguf_fields

MODULES = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
GGUF_NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}
R, ALPHA = 8, 16
EXPONENT_A, EXPONENT_B = -3, -6  # A in ±1/16, B in ±1/128
SETTINGS = dict(learning_rate=5e-4, warmup_steps=2, total_steps=10, weight_decay=0.0, max_grad_norm=1.0)
STEPS, ROWS, LENGTH = 10, 2, 64
PROBES = 4
COLUMNS = list(range(0, 49152, 1024)) + [1, 2, 198, 216, 253, 260, 28, 30]

PROMPTS = [
    "The capital of France is",
    "<|im_start|>user\nName three primary colours.<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n):\n    \"\"\"Return the n-th Fibonacci number, for n = 0, 1, 2, 10.\"\"\"\n    if n < 2:\n        return n\n"
    "    return fibonacci(n - 1) + fibonacci(n - 2)\n\n\nprint([fibonacci(i) for i in range(10)])\n# prints [0, 1, 1, 2, 3, 5, 8, 13, 21, 34]\n",
]
TEXT = """A river is older than the bridge that crosses it, and younger than the valley it runs through. When the water is low, the stones of an earlier ford show in a line from bank to bank, and people who know the place still cross there with dry feet. In spring nobody tries, for the snow of the hills comes down within three days and the river takes back the meadow on both sides.
The mill was built in 1842 by two brothers who had quarrelled about everything else. Its wheel turned for ninety years, first for flour, then for a saw, and at last for a dynamo that lit eleven houses and the church. The dynamo is still there, under a cover of oiled canvas, and the present owner starts it once a year so that the bearings do not seize.
To measure the flow, throw an orange into the middle of the stream and count the seconds until it passes the second post, forty metres further down. Multiply the speed by the cross section, which you find by sounding the depth at every metre with a stick, and take four fifths of the result, because water near the bed is slower than water at the surface.
fn flow(depths: &[f64], width: f64, seconds: f64, distance: f64) -> f64 {
    let area: f64 = depths.iter().map(|d| d * width).sum();
    0.8 * area * distance / seconds
}
Question: Why does the orange work better than a piece of cork? Answer: It floats low, so that the wind does not push it, and it is easy to see. Question: What if the stream bends? Answer: Measure on a straight reach, at least ten times as long as the stream is wide, or the current crosses from one bank to the other and the orange travels further than you think.
The keeper of the weir writes down the level at six in the morning and at six in the evening. In the book for 1910 there is a gap of two days, then a line in another hand: the house was flooded to the third stair, the levels of Tuesday and Wednesday are taken from the mark on the door. That mark has been painted over four times since, yet you can feel it with a finger.
Trout stand behind the large stones with their heads upstream. They let the current bring what they eat, and they spend less strength in the still water there than a fish in the open stream would. Whoever wants to catch one has to come from below, slowly, and must not let a shadow fall on the pool. Most visitors come from above, talking, and say that there are no fish in this river.
"""


def load_model(path) -> LlamaForCausalLM:
    reader = GGUFReader(path)
    meta = lambda name: reader.fields["llama." + name].contents()
    heads, kv_heads = meta("attention.head_count"), meta("attention.head_count_kv")
    config = LlamaConfig(
        vocab_size=meta("vocab_size"), hidden_size=meta("embedding_length"), intermediate_size=meta("feed_forward_length"),
        num_hidden_layers=meta("block_count"), num_attention_heads=heads, num_key_value_heads=kv_heads,
        max_position_embeddings=meta("context_length"), rms_norm_eps=float(meta("attention.layer_norm_rms_epsilon")),
        rope_parameters=dict(rope_type="default", rope_theta=float(meta("rope.freq_base"))), tie_word_embeddings=True,
        attn_implementation="eager",
    )
    state = {}
    for t in reader.tensors:
        w = torch.from_numpy(np.array(dequantize(t.data, t.tensor_type), dtype=np.float32))
        w = w.reshape([int(n) for n in reversed(t.shape)])
        if t.name == "token_embd.weight":
            state["model.embed_tokens.weight"] = w
            state["lm_head.weight"] = w
        elif t.name == "output_norm.weight":
            state["model.norm.weight"] = w
        else:
            _, layer, part, _ = t.name.split(".")
            if part in ("attn_q", "attn_k"):
                # A GGUF interleaves the two halves of each head; HF's rotary embedding wants them apart.
                n = heads if part == "attn_q" else kv_heads
                w = w.reshape(n, w.shape[0] // n // 2, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
            state[f"model.layers.{layer}.{GGUF_NAMES[part]}.weight"] = w
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    # Buffers were made on the meta device; a fresh module computes them.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model.float().eval()


def summary(logits: torch.Tensor) -> dict:
    """One position's logits in a few numbers."""
    top = int(logits.argmax())
    return {"argmax": top, "max": g(logits[top]), "min": g(logits.min()), "logsumexp": g(torch.logsumexp(logits.double(), -1)), "columns": [g(logits[c]) for c in COLUMNS]}


def lora_weights(model):
    """(index, path, A, B) of each adapted layer in model order."""
    named = dict(model.named_parameters())
    for layer in range(model.config.num_hidden_layers):
        for n, module in enumerate(MODULES):
            path = f"model.layers.{layer}.{module}"
            a, b = (named[f"base_model.model.{path}.lora_{x}.default.weight"] for x in "AB")
            yield layer * len(MODULES) + n, path, a, b


def tensor_facts(kind: int, module: int, w: np.ndarray, start: np.ndarray) -> dict:
    """Norms, four entries, and random projections of the update of a trained tensor."""
    w, start = w.astype(np.float64), start.astype(np.float64)
    update = w - start
    flat = w.reshape(-1)
    at = [int(x) * 40503 % flat.size for x in hash_u16(9, module * 2 + kind, 1, 4)[0]]
    return {
        "norm": g(np.linalg.norm(w)), "update_norm": g(np.linalg.norm(update)),
        "at": at, "entries": [g(flat[n]) for n in at],
        "projections": [g((hash_signs(2 * p + kind, module, *w.shape) * update).sum()) for p in range(PROBES)],
    }


def make() -> None:
    path = smollm2_path()
    tokens, merges, types, _ = gguf_fields(path)
    tokenizer = PlainTokenizer(tokens, merges, types)
    model = load_model(path)

    prompts = []
    for text in PROMPTS:
        ids = tokenizer.encode(text)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0]
        positions = sorted({0, len(ids) // 2, len(ids) - 1})
        prompts.append({"text": text, "ids": ids, "logits": [{"position": p} | summary(logits[p]) for p in positions]})
        print(repr(tokenizer_text(tokens, [int(logits[-1].argmax())])), end=" ")

    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=R, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear"))
    start = {}
    with torch.no_grad():
        for index, name, a, b in lora_weights(model):
            start[name] = hash_floats(SEED_A, index, *a.shape, EXPONENT_A), hash_floats(SEED_B, index, *b.shape, EXPONENT_B)
            a.copy_(torch.from_numpy(start[name][0]))
            b.copy_(torch.from_numpy(start[name][1]))

    ids = tokenizer.encode(TEXT)
    rows = [ids[n * LENGTH:(n + 1) * LENGTH] for n in range(len(ids) // LENGTH)]
    assert len(rows) >= ROWS, len(rows)
    # Every third row has a prompt of twenty tokens that is not trained on.
    documents = [{"ids": row, "mask": [int(t >= (20 if n % 3 == 2 else 1)) for t in range(LENGTH)]} for n, row in enumerate(rows)]
    steps = [[[documents[(step * ROWS + n) % len(documents)] for n in range(ROWS)]] for step in range(STEPS)]
    began = time.time()
    log = train_steps(model, steps, **SETTINGS)
    print(f"{time.time() - began:.0f} s for {STEPS} steps, losses {[round(s['loss'], 4) for s in log]}")

    modules = []
    for index, name, a, b in lora_weights(model):
        facts = {x: tensor_facts(kind, index, w.detach().numpy(), start[name][kind]) for kind, (x, w) in enumerate([("a", a), ("b", b)])}
        modules.append({"path": name} | facts)
    write_json(HERE / "smollm2.json", {
        "columns": COLUMNS,
        "prompts": prompts,
        "lora": {"r": R, "lora_alpha": ALPHA, "exponent_a": EXPONENT_A, "exponent_b": EXPONENT_B},
        "settings": SETTINGS,
        "documents": documents,
        "rows_per_step": ROWS,
        "steps": log,
        "modules": modules,
    })


def tokenizer_text(tokens, ids) -> str:
    return "".join(tokens[i] for i in ids)


if __name__ == "__main__":
    make()
