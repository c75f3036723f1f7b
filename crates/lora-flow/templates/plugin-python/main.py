"""The program of this plugin: called once for each task. Print nothing; `print` is for events."""

import json

import lora_flow_plugin


def run(task):
    rows, text = task.params["rows"], task.params["text"]
    # An input's files: `task.input("dataset").path("part-00000.parquet")`.
    with open(task.output("files").path("rows.jsonl"), "w", encoding="utf-8", newline="\n") as out:
        for i in range(rows):
            task.progress(i, total=rows, unit="row")
            out.write(json.dumps({"id": i, "text": f"{text} {i}"}) + "\n")
    task.summary("rows", rows)


lora_flow_plugin.main({"{{NAME}}": run})
