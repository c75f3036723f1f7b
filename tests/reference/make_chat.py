"""chat.json: conversations as transformers renders them, through templates of our own (templates/*.jinja, full texts and
assistant spans) and, as digests, through those of other projects.

The others' templates are not in this repository. They are read from a wheel of Axolotl 0.19.0, whose path stands in
LORA_FLOW_CHAT_TEMPLATES (`pip download axolotl==0.19.0 --no-deps`); without it only our own are made again.
"""

import json
import os
import zipfile

import jinja2
import transformers.utils.chat_template_utils as chat
from blake3 import blake3

from common import HERE, write_json

TOOLS = [
    {"type": "function", "function": {"name": "depth", "description": "Depth of the sea at a place, \"in fathoms\"", "parameters": {
        "type": "object", "properties": {"place": {"type": "string", "enum": ["reef", "pier <2>"]}, "tide": {"type": "number"}}, "required": ["place"]}}},
    {"type": "function", "function": {"name": "bell", "description": "Ring the bell", "parameters": {"type": "object", "properties": {}}}},
]


def m(role, content, **more):
    return {"role": role, "content": content, **more}


CHATS = {
    "pair": dict(messages=[m("user", "How high is the tower?"), m("assistant", "Thirty metres.")]),
    "system": dict(messages=[m("system", "  You keep a lighthouse. "), m("user", "Wind?"), m("assistant", " West, fresh.\n"), m("user", "And the sea — naïve 🌊?"), m("assistant", "It's \"calm\" & <flat>.")]),
    "prompt": dict(messages=[m("user", "Light the lamp.")], add_generation_prompt=True),
    "odd": dict(messages=[m("user", "{{ 7 * 7 }} {% if %} \\n \t<|im_end|>\n\nlast  "), m("assistant", "\n\n{'a': 1}\r\n  "), m("user", "")], add_generation_prompt=True),
    "thinking": dict(messages=[m("user", "2+2?"), m("assistant", "<think>\nfour\n</think>\n\n4"), m("user", "3+3?"), m("assistant", "<think>\nsix\n</think>\n\n6")]),
    "no_thinking": dict(messages=[m("user", "2+2?")], add_generation_prompt=True, enable_thinking=False),
    "tools": dict(
        messages=[
            m("system", "Use tools."), m("user", "How deep is the reef?"),
            m("assistant", "", tool_calls=[{"id": "abc123def", "type": "function", "function": {"name": "depth", "arguments": {"place": "reef", "tide": 1.5}}}]),
            m("tool", "{\"fathoms\": 4}", name="depth", tool_call_id="abc123def"), m("assistant", "Four fathoms."),
        ],
        tools=TOOLS,
    ),
    "tools_unused": dict(messages=[m("user", "Good evening.")], tools=TOOLS, add_generation_prompt=True),
    "twice": dict(messages=[m("user", "One."), m("user", "Two."), m("assistant", "Three.")]),
    "begins": dict(messages=[m("assistant", "I begin."), m("user", "Well.")]),
    "null": dict(messages=[m("user", "Ring."), m("assistant", None, tool_calls=[{"id": "x1", "type": "function", "function": {"name": "bell", "arguments": {}}}])], tools=TOOLS),
}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
DATE = "2024-07-26"


class Day(chat.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromisoformat(DATE)


def render(template, case, spans=False):
    more = {k: v for k, v in case.items() if k not in ("messages", "tools", "add_generation_prompt")}
    try:
        out, marks = chat.render_jinja_template(
            [case["messages"]], tools=case.get("tools"), chat_template=template,
            add_generation_prompt=case.get("add_generation_prompt", False), return_assistant_tokens_mask=spans, **TOKENS, **more,
        )
    except (jinja2.exceptions.TemplateError, TypeError, AttributeError, KeyError, IndexError) as e:
        return None, None, f"{type(e).__name__}: {e}"
    return out[0], marks[0] if marks else None, None


def make() -> None:
    chat.datetime = Day
    chat._compile_jinja_template.cache_clear()
    out = {"tokens": TOKENS, "date": DATE, "chats": CHATS, "own": {}}
    for path in sorted((HERE / "templates").glob("*.jinja")):
        source = path.read_text()
        rows = {}
        for name, case in CHATS.items():
            text, marks, error = render(source, case, spans="{% generation" in source)
            rows[name] = {"error": error} if error else {"text": text} | ({"assistant": [text[a:b] for a, b in marks]} if marks is not None else {})
        out["own"][path.stem] = rows
        print(f"chat/{path.stem}: {sum('text' in r for r in rows.values())} rendered, {sum('error' in r for r in rows.values())} refused")
    target = HERE / "chat.json"
    wheel = os.environ.get("LORA_FLOW_CHAT_TEMPLATES")
    if wheel:
        out["others"] = others(wheel)
    elif target.exists():
        out["others"] = json.loads(target.read_text())["others"]
    write_json(target, out)


def others(wheel) -> dict:
    rows, folder = {}, "axolotl/utils/chat_templates/templates/"
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(n for n in archive.namelist() if n.startswith(folder) and n.endswith(".jinja")):
            source = archive.read(name).decode()
            renderings = {}
            for chat_name, case in CHATS.items():
                text, _, error = render(source, case)
                renderings[chat_name] = "refused" if error else blake3(text.encode()).hexdigest()
            rows[name.removeprefix(folder)] = {"template": blake3(source.encode()).hexdigest(), "renderings": renderings}
    print(f"chat: {len(rows)} templates of others")
    return rows
