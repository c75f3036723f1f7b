"""Writes conversations at an order desk: request on stdin, events on stdout.

A customer names an article, a number, a colour and a town, not all at once, and changes them. After
each message the assistant answers with the order as it stands, in one line of JSON with null for
what has not been said.
"""

import json
import os
import random
import sys

ITEMS = "kettle lantern blanket basket candle mirror teapot ladder kennel pillow hammer bucket curtain drum saddle rug clock bench vase broom".split()
COLOURS = "red green blue white black yellow grey brown".split()
TOWNS = "Lund Bergen Turku Aarhus Oslo Visby Narvik Odense Kiruna Tartu".split()
NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()

# What opens a conversation and what it says of the order.
OPENINGS = [
    ("I'd like {n} {items}.", "n"),
    ("Do you sell {items}? I need {n}, in {colour}.", "n colour"),
    ("Hello! {N} {colour} {items}, please.", "n colour"),
    ("Please send {n} {items} to {town}.", "n town"),
    ("We need {n} {colour} {items} in {town}.", "n colour town"),
    ("Can {items} be had in {colour}?", "colour"),
    ("Good morning, I am asking about {items} in {town}.", "town"),
]
# What changes one thing.
CHANGES = {
    "n": ["Make it {n}.", "We need {n} of them.", "{N} would be better."],
    "colour": ["In {colour}, please.", "Could we have {colour} ones?", "Let us take {colour}."],
    "town": ["Send it to {town}.", "It goes to {town}.", "The address is in {town}."],
    "item": ["Sorry, I meant {items}.", "No, {items} instead."],
    "none": ["Any colour will do."],
}

request = json.load(sys.stdin)
params, folder = request["params"], request["outputs"]["files"]["path"]
# `random()` is the same on every platform and in every version of Python.
generator = random.Random(params["seed"])


def pick(values):
    return values[int(len(values) * generator.random())]


def words(template, drawn):
    number = NUMBERS[drawn["n"] - 1]
    items = drawn["item"] + ("" if "{n}" in template and drawn["n"] == 1 else "s")
    return template.format(n=number, N=number.capitalize(), items=items, colour=drawn["colour"], town=drawn["town"])


def draw():
    return {"item": pick(ITEMS), "n": 1 + int(len(NUMBERS) * generator.random()), "colour": pick(COLOURS), "town": pick(TOWNS)}


def answer(order):
    return json.dumps({"item": order["item"], "quantity": order["n"], "colour": order["colour"], "town": order["town"]})


def conversation():
    drawn = draw()
    template, said = pick(OPENINGS)
    order = {"item": drawn["item"]} | {key: drawn[key] if key in said.split() else None for key in ("n", "colour", "town")}
    messages = [{"role": "system", "content": params["system"]}]
    messages += [{"role": "user", "content": words(template, drawn)}, {"role": "assistant", "content": answer(order)}]
    for _ in range(int(params["max_turns"] * generator.random())):
        change = pick([key for key in CHANGES if key != "none" or order["colour"]])
        drawn = draw()
        order |= {"colour": None} if change == "none" else {change: drawn[change]}
        text = words(pick(CHANGES[change]), drawn)
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer(order)}]
    return messages


with open(os.path.join(folder, "chats.jsonl"), "w", encoding="utf-8") as file:
    for _ in range(params["rows"]):
        messages = conversation()
        said = [message["content"] for message in messages if message["role"] == "user"]
        row = {"messages": messages, "said": " ".join(said), "turns": len(said)}
        file.write(json.dumps(row, ensure_ascii=False) + "\n")

print(json.dumps({"event": "summary", "name": "conversations", "value": str(params["rows"])}))
print(json.dumps({"event": "done"}))
