"""`evaluate-tasks` against lm-evaluation-harness: CPU seconds on the same model, rows and task files.

    python benches/eval_cpu.py LORA_FLOW DIR TASK [TASK…]

DIR is a folder of `tests/reference/make_lm_eval.py real DIR`, TASK the names of its task files. Each side runs on one thread,
one after the other in turns; what loading costs is measured apart, by a run on one row, and taken off.
Needs what make_lm_eval.py needs.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
ROUNDS = int(os.environ.get("ROUNDS", "1"))

PEER = """
import sys
sys.path.insert(0, {reference!r})
import torch
torch.set_num_threads(1)
import make_lm_eval as m
from pathlib import Path
folder = Path({folder!r})
m.evaluate(folder / "model", m.FOLDER / "real", folder / "data", {names!r}, max_length=512, batch_size=8, limit={limit})
"""

PIPELINE = """version: 1
name: bench
tasks:
  base: {{ uses: model, with: {{ source: {folder}/model }} }}
  scores:
    uses: evaluate-tasks
    inputs: {{ model: base }}
    with: {{ tasks: {tasks}, data_files: [ {folder}/data ], max_length: 512, bootstrap_iters: 2000 {limit} }}
"""


def cpu_seconds(command, **options) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def peer(folder, names, limit) -> float:
    code = PEER.format(reference=str(HERE / "tests/reference"), folder=str(folder), names=names, limit=limit)
    return cpu_seconds([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "1"})


def ours(binary, folder, names, limit) -> float:
    tasks = [str(HERE / f"tests/reference/lm_eval/real/{n}.yaml") for n in names]
    with tempfile.TemporaryDirectory() as project:
        text = PIPELINE.format(folder=folder, tasks=json.dumps(tasks), limit=f", limit: {limit}" if limit else "")
        Path(project, "p.yaml").write_text(text)
        return cpu_seconds([binary, "-q", "run", "p.yaml"], cwd=project, env=os.environ | {"RAYON_NUM_THREADS": "1"})


def main() -> None:
    binary, folder, *names = sys.argv[1:]
    folder = Path(folder).resolve()
    for name in names:
        for _ in range(ROUNDS):
            sides = {}
            for side, run in (("lora-flow", lambda limit: ours(binary, folder, [name], limit)), ("lm-eval", lambda limit: peer(folder, [name], limit))):
                whole, one = run(None), run(1)
                sides[side] = whole - one
                print(f"{name} {side}: {whole:.1f} CPU-seconds, {one:.1f} of them on one row")
            print(f"{name}: {sides['lm-eval'] / sides['lora-flow']:.2f} times the speed of the peer")


if __name__ == "__main__":
    main()
