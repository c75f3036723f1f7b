"""Writes a tiny random Llama as a Hugging Face folder: request on stdin, events on stdout."""

import array
import json
import os
import random
import sys

request = json.load(sys.stdin)
params, folder = request["params"], request["outputs"]["files"]["path"]
hidden, layers, heads, vocab = params["hidden_size"], params["num_hidden_layers"], 4, 258
inner, key_value = 2 * hidden, hidden // 2


def write(name, value):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)


write("config.json", {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden,
    "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "bos_token_id": None, "eos_token_id": 256,
    "pad_token_id": 257, "dtype": "float32",
})

# One token a byte, under GPT-2's printable names for bytes, and two special tokens.
printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
others = [byte for byte in range(256) if byte not in printable]
names = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
write("tokenizer.json", {
    "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
    "added_tokens": [{"id": 256, "content": "<|end|>", **special}, {"id": 257, "content": "<|pad|>", **special}],
    "pre_tokenizer": byte_level, "decoder": byte_level,
    "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
              "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
              "vocab": {names[byte]: byte for byte in range(256)}, "merges": []},
})
write("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>",
                                "pad_token": "<|pad|>", "add_bos_token": False})

shapes = {"model.embed_tokens.weight": [vocab, hidden], "model.norm.weight": [hidden]}
for layer in range(layers):
    prefix = f"model.layers.{layer}."
    shapes |= {f"{prefix}{norm}.weight": [hidden] for norm in ("input_layernorm", "post_attention_layernorm")}
    shapes |= {f"{prefix}self_attn.{p}_proj.weight": [rows, hidden] for p, rows in
               (("q", hidden), ("k", key_value), ("v", key_value), ("o", hidden))}
    shapes |= {f"{prefix}mlp.{p}_proj.weight": shape for p, shape in
               (("gate", [inner, hidden]), ("up", [inner, hidden]), ("down", [hidden, inner]))}

# safetensors: the length of a JSON header, the header, the numbers. `random()` is the same on
# every platform and in every version of Python.
generator, header, data = random.Random(params["seed"]), {}, array.array("f")
for name, shape in sorted(shapes.items()):
    start, count = 4 * len(data), shape[0] * (shape[1] if len(shape) == 2 else 1)
    scale = 1.5 / shape[-1] ** 0.5
    data.extend(1.0 if len(shape) == 1 else scale * (2 * generator.random() - 1) for _ in range(count))
    header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, 4 * len(data)]}
if sys.byteorder == "big":
    data.byteswap()
text = json.dumps(header).encode()
text += b" " * (-len(text) % 8)
with open(os.path.join(folder, "model.safetensors"), "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text + data.tobytes())

print(json.dumps({"event": "summary", "name": "parameters", "value": str(len(data))}))
print(json.dumps({"event": "done"}))
