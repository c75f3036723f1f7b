#!/usr/bin/env python3
"""The engine against ninja, Snakemake and DVC: a task is a shell command that writes one line.

    python3 benches/engine.py --peers DIR --work DIR [--lora-flow BIN] [--rounds N] [--only PART …]

DIR/ninja, DIR/snakemake and DIR/dvc are virtual environments; those that are missing are made with
`pip install`. All runs of a row are taken in turns, so that what else the machine does meets all
alike. Prints Markdown: CPU seconds (user + system, children included) and wall seconds, the least
and the median of N.
"""
import argparse
import hashlib
import itertools
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

CHAIN = 10  # tasks one after the other; `wide` has none that waits for another
SLOW = ["Snakemake", "DVC"]  # seconds for each run
PARTS = ["noop", "cold", "plan", "hash"]


def measure(command, cwd, env=None, reads=False):
    """Runs to the end: wall and CPU seconds, peak memory in MB, bytes read by system calls."""
    log = open(Path(cwd) / "bench.log", "wb")
    start = time.perf_counter()
    child = subprocess.Popen(command, cwd=cwd, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                             env={**os.environ, **(env or {})})
    read = 0
    if reads:  # the process is gone only when it was waited for, and its counters with it
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        read = int(re.search(r"rchar: (\d+)", Path(f"/proc/{child.pid}/io").read_text()).group(1))
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        tail = (Path(cwd) / "bench.log").read_text(errors="replace")[-2000:]
        sys.exit(f"{' '.join(map(str, command))} failed in {cwd}:\n{tail}")
    return {"cpu": usage.ru_utime + usage.ru_stime, "wall": wall,
            "memory": usage.ru_maxrss / 1024, "read": read}


def before(form, i):
    """The task that task i waits for, if any."""
    return i - 1 if form == "chain" and i % CHAIN else None


class LoraFlow:
    name = "lora-flow"

    def __init__(self, binary):
        self.binary = binary

    def write(self, folder, form, n):
        plugin = folder / "step"
        plugin.mkdir(parents=True)
        (plugin / "plugin.yaml").write_text(
            "protocol: 1\nname: step\nversion: 0.1.0\ncommand: [./step.sh]\ntasks:\n  step:\n"
            "    summary: One line\n"
            "    inputs: { files: { kind: Files, required: false, doc: What it waits for } }\n"
            "    outputs: { files: { kind: Files, doc: The line } }\n"
            "    params: { type: object, properties: { n: { type: integer, description: A number } } }\n")
        script = plugin / "step.sh"
        script.write_text(
            "#!/bin/sh\nread -r request\nout=${request#*'\"outputs\":{\"files\":{'}\n"
            "out=${out#*'\"path\":\"'}\necho x > \"${out%%'\"'*}/text\"\necho '{\"event\":\"done\"}'\n")
        script.chmod(0o755)
        lines = ["name: bench", "plugins: [step]", "tasks:"]
        for i in range(n):
            lines += [f"  t{i}:", "    uses: step", f"    with: {{ n: {i} }}"]
            if before(form, i) is not None:
                lines.append(f"    inputs: {{ files: t{before(form, i)} }}")
        (folder / "pipeline.yaml").write_text("\n".join(lines) + "\n")

    def command(self):
        return [self.binary, "-q", "run", "pipeline.yaml", "--jobs", "2"]

    def fill(self, folder, form, n):
        measure(self.command(), folder)


class Files:
    """A peer whose tasks write the files t0, t1, …"""

    def __init__(self, binary):
        self.binary = binary

    def fill(self, folder, form, n):
        measure(self.command(), folder)


class Ninja(Files):
    name = "ninja"

    def write(self, folder, form, n):
        lines = ["rule step", "  command = echo x > $out"]
        lines += [f"build t{i}: step" + ("" if before(form, i) is None else f" t{before(form, i)}")
                  for i in range(n)]
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")

    def command(self):
        return [self.binary, "-j2"]


class Snakemake(Files):
    name = "Snakemake"

    def write(self, folder, form, n):
        rules = [f"rule all:\n    input: {', '.join(repr(f't{i}') for i in range(n))}"]
        for i in range(n):
            wait = "" if before(form, i) is None else f"    input: 't{before(form, i)}'\n"
            rules.append(f"rule r{i}:\n{wait}    output: 't{i}'\n    shell: 'echo x > {{output}}'")
        (folder / "Snakefile").write_text("\n".join(rules) + "\n")

    def command(self):
        return [self.binary, "--cores", "2", "--quiet", "all"]

    def fill(self, folder, form, n):
        # Running a thousand takes minutes. What a run leaves is what `--touch` notes.
        for i in range(n):
            (folder / f"t{i}").write_text("x\n")
        measure([*self.command(), "--touch"], folder)


class Dvc(Files):
    name = "DVC"

    def write(self, folder, form, n):
        measure([self.binary, "init", "--no-scm", "-q"], folder)
        measure([self.binary, "config", "core.analytics", "false"], folder)
        lines = ["stages:"]
        for i in range(n):
            lines += [f"  s{i}:", f"    cmd: echo x > t{i}"]
            if before(form, i) is not None:
                lines += ["    deps:", f"    - t{before(form, i)}"]
            lines += ["    outs:", f"    - t{i}:", "        cache: false"]
        (folder / "dvc.yaml").write_text("\n".join(lines) + "\n")

    def command(self):
        return [self.binary, "repro", "-q"]

    def fill(self, folder, form, n):
        # Running a thousand takes a quarter of an hour: its lock file is written here instead.
        md5 = hashlib.md5(b"x\n").hexdigest()
        entry = lambda i: f"    - path: t{i}\n      hash: md5\n      md5: {md5}\n      size: 2\n"
        text = "schema: '2.0'\nstages:\n"
        for i in range(n):
            (folder / f"t{i}").write_text("x\n")
            text += f"  s{i}:\n    cmd: echo x > t{i}\n"
            if before(form, i) is not None:
                text += "    deps:\n" + entry(before(form, i))
            text += "    outs:\n" + entry(i)
        (folder / "dvc.lock").write_text(text)


def peers(folder):
    kinds = {"ninja": Ninja, "snakemake": Snakemake, "dvc": Dvc}
    for package, kind in kinds.items():
        binary = folder / package / "bin" / package
        if not binary.exists():
            subprocess.run([sys.executable, "-m", "venv", folder / package], check=True)
            subprocess.run([folder / package / "bin" / "pip", "-q", "install", package], check=True)
        yield kind(str(binary))


def turns(rounds, runs):
    """Runs all in turns: name → list of measurements. The slow ones take part in the first."""
    results = {name: [] for name in runs}
    for i in range(rounds):
        for name, run in runs.items():
            if i == 0 or name not in SLOW:
                results[name].append(run())
    return results


def row(title, results, against="lora-flow"):
    def pair(list_, key):
        values = [m[key] for m in list_]
        return f"{min(values):.3f} / {statistics.median(values):.3f}"
    own = statistics.median(m["cpu"] for m in results[against])
    for name, list_ in results.items():
        ratio = statistics.median(m["cpu"] for m in list_) / own
        print(f"| {title} | {name} | {len(list_)} | {pair(list_, 'cpu')} | {pair(list_, 'wall')} | "
              f"{ratio:.2f} |", flush=True)


def head():
    print("\n| | program | n | CPU s, least / median | wall s, least / median | CPU ÷ lora-flow |")
    print("|---|---|---|---|---|---|", flush=True)


def prepared(work, program, form, n):
    folder = work / f"{program.name}-{form}-{n}"
    if not folder.exists():
        folder.mkdir(parents=True)
        program.write(folder, form, n)
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lora-flow", default="target/release/lora-flow")
    parser.add_argument("--before", help="an older lora-flow to compare with")
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs; made anew")
    parser.add_argument("--b3sum", default="b3sum", help="for `hash` (cargo install b3sum)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--without", nargs="*", default=[], help="peers to leave out")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    args.b3sum = str(Path(shutil.which(args.b3sum) or args.b3sum).resolve())
    own = LoraFlow(str(Path(args.lora_flow).resolve()))
    programs = [own]
    if args.before:
        older = LoraFlow(str(Path(args.before).resolve()))
        older.name = "lora-flow before"
        programs.append(older)
    if {"noop", "cold"} & set(args.only):
        found = peers(args.peers.resolve())
        programs += [p for p in found if p.name not in args.without]
    work = args.work.resolve()

    if "noop" in args.only:
        head()
        for form in ["chain", "wide"]:
            for n in args.sizes:
                runs = {}
                for program in programs:
                    folder = prepared(work, program, form, n)
                    program.fill(folder, form, n)
                    runs[program.name] = lambda p=program, f=folder: measure(p.command(), f)
                for program in programs:
                    if program.name not in SLOW:
                        runs[program.name]()  # what a first no-op remembers
                row(f"no-op, {n}, {form}", turns(args.rounds, runs))

    if "cold" in args.only:
        head()
        for n, slow in [(100, True), (1000, False)]:  # minutes and more for a slow peer
            runs = {}
            for program in programs:
                if program.name in SLOW and not slow:
                    continue
                folders = itertools.count()

                def run(program=program, n=n, folders=folders):
                    # Each time in a new folder: for minutes ext4 looks past what was deleted.
                    folder = prepared(work / f"cold-{next(folders)}", program, "chain", n)
                    return measure(program.command(), folder)
                runs[program.name] = run
            row(f"cold, {n}, chain", turns(min(args.rounds, 3), runs))

    if "plan" in args.only:
        head()
        runs = {}
        for program in [p for p in programs if isinstance(p, LoraFlow)]:
            folder = prepared(work, program, "chain", 10_000)
            command = [program.binary, "plan", "pipeline.yaml"]
            runs[program.name] = lambda c=command, f=folder: measure(c, f)
        results = turns(args.rounds, runs)
        row("plan, 10000, chain", results)
        print("\npeak memory, MB:", {n: round(max(m["memory"] for m in r)) for n, r in results.items()})

    if "hash" in args.only:
        hashing(args, [p for p in programs if isinstance(p, LoraFlow)], work)


def hashing(args, programs, work):
    """An input of 1 GiB that lies in the page cache: hashed for a plan, then known."""
    folder = work / "hash"
    folder.mkdir()
    big = folder / "rows.jsonl"
    with open(big, "wb") as file:
        block = (b'{"text": "' + b"x" * 1000 + b'"}\n') * 1024
        for i in range((1 << 30) // len(block) + 1):
            file.write(b'{"text": "%d"}\n' % i + block)
    old = os.stat(big).st_mtime - 3600
    os.utime(big, (old, old))
    time.sleep(2.5)  # a file that changed within two seconds is not remembered
    (folder / "pipeline.yaml").write_text(
        "name: hash\ntasks:\n  rows: { uses: ingest, with: { files: rows.jsonl } }\n")
    threads = {"RAYON_NUM_THREADS": str(os.cpu_count())}

    def first(program):
        shutil.rmtree(folder / ".lora-flow", ignore_errors=True)
        return measure([program.binary, "plan", "pipeline.yaml"], folder, threads, reads=True)
    b3sum = [args.b3sum, "--num-threads", str(os.cpu_count())]
    results = turns(args.rounds, {
        **{p.name: lambda p=p: first(p) for p in programs},
        "b3sum": lambda: measure([*b3sum, "rows.jsonl"], folder),
        "b3sum --no-mmap": lambda: measure([*b3sum, "--no-mmap", "rows.jsonl"], folder),
    })
    head()
    row("1 GiB input", results)
    first(programs[0])
    again = measure([programs[0].binary, "plan", "pipeline.yaml"], folder, reads=True)
    print(f"\nbytes read: {results['lora-flow'][-1]['read']}, "
          f"again {again['read']} in {again['cpu']:.3f} CPU s")


if __name__ == "__main__":
    main()
