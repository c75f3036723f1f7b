"""Writes rows of small tasks on random words: request on stdin, events on stdout."""

import json
import os
import random
import sys

request = json.load(sys.stdin)
params, folder = request["params"], request["outputs"]["files"]["path"]
by = params["by"]
TASKS = {
    "copy": lambda w: w,
    "upper": str.upper,
    "double": lambda w: "".join(c + c for c in w),
    "first": lambda w: w[0] * len(w),
    "shift": lambda w: "".join(chr((ord(c) - 97 + by) % 26 + 97) for c in w),
    "vowels": lambda w: "".join("*" if c in "aeiou" else c for c in w),
    "reverse": lambda w: w[::-1],
}

# `random()` is the same on every platform and in every version of Python.
generator = random.Random(params["seed"])
with open(os.path.join(folder, "rows.jsonl"), "w", encoding="utf-8") as file:
    for row in range(params["rows"]):
        task = params["tasks"][row % len(params["tasks"])]
        word = "".join(chr(97 + int(26 * generator.random())) for _ in range(4 + int(4 * generator.random())))
        prompt = f"{params['name'] or task} {word} = "
        file.write(json.dumps({"task": task, "prompt": prompt, "completion": TASKS[task](word)}) + "\n")

print(json.dumps({"event": "summary", "name": "rows", "value": str(params["rows"])}))
print(json.dumps({"event": "done"}))
