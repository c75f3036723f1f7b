"""The plugin protocol of lora-flow, version 1, in one file of the standard library.

Copy this file beside your program (`lora-flow plugin new NAME --lang python` does):

    import lora_flow_plugin

    def shout(task):
        text = open(task.input("files").path("words.txt"), encoding="utf-8").read()
        with open(task.output("files").path("loud.txt"), "w", encoding="utf-8") as out:
            out.write(text.upper() + task.params["suffix"])

    lora_flow_plugin.main({"shout": shout})

Standard output belongs to the protocol; while a task runs, `print` goes to standard error, which
the engine keeps in the task's log.
"""

import json
import os
import sys
import time
import traceback

PROTOCOL = 1


class PluginError(Exception):
    """Fails the task with a message (lower case, no final period) and what to do about it."""

    def __init__(self, message, hint=None):
        super().__init__(message)
        self.message, self.hint = message, hint


class Folder:
    """An input or an output: a folder of files. `kind` is the artifact's, `meta` an input's facts."""

    def __init__(self, fields):
        self.folder, self.kind = fields["path"], fields["kind"]
        self.reference, self.meta = fields.get("reference"), fields.get("meta")

    def path(self, name=""):
        return os.path.join(self.folder, name)

    def files(self):
        """Paths of all files below the folder, in the order of their names."""
        found = [os.path.join(at, name) for at, _, names in os.walk(self.folder) for name in names]
        return sorted(found)


class Task:
    """One request: `params`, `scratch`, `state`, `threads`, `network` as docs/plugins.md has them."""

    def __init__(self, request, stream):
        self._stream, self._last_progress = stream, 0.0
        self.name, self.params = request["task"], request["params"]
        self.scratch, self.state = request["scratch"], request["state"]
        self.threads, self.network = request["threads"], request["network"]
        self._inputs = {port: [Folder(f) for f in found] for port, found in request["inputs"].items()}
        self._outputs = {name: Folder(fields) for name, fields in request["outputs"].items()}

    def input(self, port):
        """The one artifact of an input port."""
        found = self.inputs(port)
        if len(found) != 1:
            raise PluginError(f"input `{port}` must be one artifact, found {len(found)}")
        return found[0]

    def inputs(self, port):
        """The artifacts of an input port: none where it is not given, many where it takes many."""
        return self._inputs.get(port, [])

    def output(self, name):
        """The folder to fill for an output."""
        if name not in self._outputs:
            raise PluginError(f"there is no output `{name}`", "declare it in `plugin.yaml`")
        return self._outputs[name]

    def progress(self, done, total=None, unit="", message=""):
        """How far the task is; sent at most ten times a second."""
        now = time.monotonic()
        if now - self._last_progress >= 0.1 or done == total:
            self._last_progress = now
            fields = {"done": done, "unit": unit, "message": message}
            self._emit("progress", **fields, **({} if total is None else {"total": total}))

    def log(self, message, level="info"):
        """A line for the reader; `level` is `debug`, `info`, `warn` or `error`."""
        self._emit("log", level=level, message=str(message))

    def metric(self, name, value, step=0):
        # JSON has no NaN and no infinity.
        finite = value == value and abs(value) != float("inf")
        self._emit("metric", name=name, value=value if finite else None, step=step)

    def summary(self, name, value):
        """A headline of the run's final table."""
        self._emit("summary", name=name, value=str(value))

    def report(self, text):
        """Text that is printed when the task ends."""
        self._emit("report", text=text)

    def meta(self, output, value):
        """Small facts of an output; they enter its digest."""
        self._emit("meta", output=output, value=value)

    def _emit(self, event, **fields):
        self._stream.write(json.dumps({"event": event, **fields}, allow_nan=False) + "\n")
        self._stream.flush()


def main(tasks):
    """Runs the task that standard input asks for. `tasks` is kind → function of a `Task`."""
    stream, sys.stdout = sys.stdout, sys.stderr
    ended = {"event": "done"}
    try:
        request = json.load(sys.stdin)
        if request.get("protocol") != PROTOCOL:
            raise PluginError(f"the request is of protocol {request.get('protocol')}, this plugin speaks {PROTOCOL}")
        task = Task(request, stream)
        if task.name not in tasks:
            raise PluginError(f"this plugin has no task `{task.name}`", f"it has {', '.join(tasks)}")
        tasks[task.name](task)
    except PluginError as error:
        ended = {"event": "error", "message": error.message}
        if error.hint:
            ended["hint"] = error.hint
    except Exception as error:  # whatever it is, the user must hear of it
        traceback.print_exc()
        ended = {"event": "error", "message": f"{type(error).__name__}: {error}", "hint": "the task's log has the traceback"}
    stream.write(json.dumps(ended) + "\n")
    stream.flush()
    sys.exit(0 if ended["event"] == "done" else 1)
