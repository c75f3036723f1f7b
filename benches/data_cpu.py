#!/usr/bin/env python3
"""The way of the data against its peers: `tokenize` beside the Python library `tokenizers`, `ingest` beside the parquet
crate's own reader, and the memory of `ingest` as the data grow.

    python3 benches/data_cpu.py LORA_FLOW MODEL TEXTS [PART …]

LORA_FLOW is a release binary, MODEL a folder with weights and tokenizer.json, TEXTS a folder of which all .html (freed of
tags), .md and .txt files are read: paragraphs that differ, gathered to rows of at most 2,000 characters. PART is
`tokenize`, `ingest` or `memory`; all, if none is named. `tokenize` needs `pip install tokenizers`, the others

    cargo build --release -p lora-flow-data --example read_parquet

beside LORA_FLOW. Also read: ROUNDS (3), THREADS (all; each side is held to so many processors), COPIES (40: how often
`ingest` reads the file of rows, under as many names), SIZES ("0.5 1 2": GB of Parquet for `memory`, made of one file by
hard links; as much disk is needed once more, for what `ingest` writes), WORK (a folder for it all, on a disk with room).

Sides take turns; the medians are printed as Markdown. Ours is the whole process, files read, hashed, written and put into
the store, less a run on one row; tokenizers' is its calls alone, on 1,000 texts at a time that are in memory already; the
reader throws its rows away, unless it is `read and written`: by the same crate, compressed as `ingest` does. What both read
is compressed by zstd 3, as data from outside may be, so that the crate's reading does not depend on how `ingest` writes.
Memory is the peak of resident pages, mapped files included.
"""
import html
import json
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = int(os.environ.get("ROUNDS", "3"))
CPUS = sorted(os.sched_getaffinity(0))
CPUS = CPUS[:int(os.environ.get("THREADS", len(CPUS)))]
COPIES = int(os.environ.get("COPIES", "40"))
SIZES = [float(size) for size in os.environ.get("SIZES", "0.5 1 2").split()]
ROW_CHARS, MAX_LENGTH = 2000, 512

PREPARE = """version: 1
name: prepare
tasks:
  all: { uses: ingest, with: { files: [rows.jsonl] }, publish: rows }
  one: { uses: ingest, with: { files: [one.jsonl] }, publish: one }
"""

# `split` is what `tokenize` does with texts unless told otherwise.
TOKENIZE = """version: 1
name: tokenize
tasks:
  base: {{ uses: model, with: {{ source: {model} }} }}
  rows: {{ uses: ingest, with: {{ files: [rows/*.parquet], text: text }} }}
  {name}:
    uses: tokenize
    inputs: {{ dataset: rows, model: base }}
    with: {{ max_length: {length}, overflow: {overflow}, add_eos: false {limit} }}
    publish: {name}
"""

PEER = """
import json, os, sys, time
from tokenizers import Tokenizer
file, rows, length, call = sys.argv[1:]
tokenizer = Tokenizer.from_file(file)
tokenizer.no_padding()
tokenizer.no_truncation()
if call == "encode_batch":
    tokenizer.enable_truncation(int(length))
texts = [json.loads(line)["text"] for line in open(rows)]
wall = cpu = tokens = 0
for start in range(0, len(texts), 1000):
    batch = texts[start:start + 1000]
    wall, cpu = wall - time.perf_counter(), cpu - time.process_time()
    out = getattr(tokenizer, call)(batch, add_special_tokens=False)
    wall, cpu = wall + time.perf_counter(), cpu + time.process_time()
    tokens += sum(map(len, out))
print(json.dumps({"wall": wall, "cpu": cpu, "tokens": tokens}))
"""

INGEST = """version: 1
name: ingest
tasks:
  rows: {{ uses: ingest, with: {{ files: ["{files}"], text: text {more} }} }}
"""


def measure(command, cwd) -> dict:
    """Runs to the end: wall and CPU seconds, peak memory in MB, what it said."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        child = subprocess.Popen(list(map(str, command)), cwd=cwd, stdout=out, stderr=log, stdin=subprocess.DEVNULL,
                                 env=os.environ | {"RAYON_NUM_THREADS": str(len(CPUS))},
                                 preexec_fn=lambda: os.sched_setaffinity(0, CPUS))
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0), log.seek(0)
        if child.returncode:
            sys.exit(f"{' '.join(map(str, command))} failed:\n{log.read().decode(errors='replace')[-2000:]}")
        return {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime, "memory": usage.ru_maxrss / 1024, "said": out.read().decode()}


def less(whole, start) -> dict:
    return whole | {key: whole[key] - start[key] for key in ("wall", "cpu")}


def rows_of(folder):
    """Paragraphs that differ, those of a file gathered to rows."""
    seen = set()
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".html", ".md", ".txt") or not path.is_file():
            continue
        text = path.read_text(errors="replace")
        if path.suffix == ".html":
            text = re.sub(r"(?s)<(script|style|nav)\b.*?</\1>", "", text)
            text = html.unescape(re.sub(r"(?s)<[^>]*>", "", text))
        row = ""
        for paragraph in map(str.strip, re.split(r"\n\s*\n", text)):
            if len(paragraph) < 20 or paragraph in seen:
                continue
            seen.add(paragraph)
            if row and len(row) + len(paragraph) > ROW_CHARS:
                yield row
                row = ""
            row += ("\n\n" if row else "") + paragraph
        if row:
            yield row


def write_rows(texts, work):
    """The rows as JSON lines, and the first of them alone; how many there are, and their bytes of text."""
    pieces = (row[i:i + ROW_CHARS] for row in rows_of(texts) for i in range(0, len(row), ROW_CHARS))
    rows = [piece for piece in pieces if len(piece.split()) > 1]  # what may be a single token is no document for us
    line = lambda text: json.dumps({"text": text}, ensure_ascii=False) + "\n"
    (work / "rows.jsonl").write_text("".join(map(line, rows)))
    (work / "one.jsonl").write_text(line(rows[0]))
    return len(rows), sum(len(text.encode()) for text in rows)


class Bench:
    def __init__(self, binary, model, texts, work):
        self.binary, self.model, self.work = Path(binary).resolve(), Path(model).resolve(), work
        # Apart, since a child's peak of memory begins with what its parent holds.
        with multiprocessing.Pool(1) as pool:
            self.rows, self.bytes = pool.apply(write_rows, (Path(texts), work))
        self.run("prepare", PREPARE)
        self.file, self.one = work / "rows/part-00000.parquet", work / "one/part-00000.parquet"
        self.reader = self.binary.parent / "examples/read_parquet"
        print(f"{self.rows:,} rows, {self.bytes / 1e6:.1f} MB of text, {self.file.stat().st_size / 1e6:.1f} MB of Parquet; {len(CPUS)} threads\n")

    def run(self, name, text, *options, keep=True) -> dict:
        """Our process on a pipeline; its store is new unless kept."""
        (self.work / f"{name}.yaml").write_text(text)
        store = self.work / ("store" if keep else "store-once")
        found = measure([self.binary, "-q", "run", f"{name}.yaml", "--cache-dir", store, *options], self.work)
        if not keep:
            shutil.rmtree(store)
        return found

    def table(self, head, unit, sides):
        """Medians of sides, name → (runs, amount); the first is ours, ratios are of our speed over the other's."""
        median = lambda name, key: statistics.median(run[key] for run in sides[name][0])
        ours = next(iter(sides))
        print(f"| {head} | {unit}/s | {unit}/CPU-second | peak memory, MB | our speed over it | by CPU time |\n|---|---|---|---|---|---|")
        for name, (_, amount) in sides.items():
            ratios = [median(name, key) / amount * sides[ours][1] / median(ours, key) for key in ("wall", "cpu")]
            speeds = [amount / median(name, key) for key in ("wall", "cpu")]
            told = " | ".join("" if name == ours else f"{ratio:.2f}" for ratio in ratios)
            print(f"| {name} | {speeds[0]:.1f} | {speeds[1]:.1f} | {median(name, 'memory'):.0f} | {told} |")
        print(flush=True)

    def tokenize(self):
        """Both ways: cut with the places of the tokens, which tell how much text is left; and without."""
        for overflow, call in (("truncate", "encode_batch"), ("split", "encode_batch_fast")):
            ours, peers = [], []
            pipelines = {name: TOKENIZE.format(model=self.model, name=name, length=MAX_LENGTH, overflow=overflow, limit=limit)
                         for name, limit in (("tokens", ""), ("token", ", limit: 1"))}
            self.run("token", pipelines["token"])
            for _ in range(ROUNDS):
                start = self.run("token", pipelines["token"], "--force=token")
                ours.append(less(self.run("tokens", pipelines["tokens"], "--force=tokens"), start))
                command = [sys.executable, "-c", PEER, self.model / "tokenizer.json", "rows.jsonl", MAX_LENGTH, call]
                peer = measure(command, self.work)
                peers.append(peer | json.loads(peer["said"]))
            tokens = json.loads((self.work / "tokens/tokens.json").read_text())["tokens"]
            assert tokens == peers[0]["tokens"], (tokens, peers[0]["tokens"])
            amount = self.bytes / 1e6
            self.table(f"{tokens:,} tokens, `{overflow}`", "MB", {"`tokenize`": (ours, amount), f"tokenizers, `{call}`": (peers, amount)})

    def links(self, count) -> list:
        """The rows under so many names, compressed by zstd 3."""
        file = self.work / "outside.parquet"
        if not file.exists():
            measure([self.reader, "copy-3", self.file], self.work)
            (self.work / "copy.parquet").rename(file)
        folder = self.work / "links"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for i in range(count):
            os.link(file, folder / f"{i:06}.parquet")
        return sorted(folder.iterdir())

    def ingest(self):
        files = self.links(COPIES)
        readers = {"its reading alone": "table", "parquet crate": "crate", "parquet crate, read and written": "copy-1"}
        # The row groups of these files are copied, unless there is a limit, even one that cuts nothing.
        ours = {"`ingest`": "", "`ingest`, encoded again": ", limit: 1000000000", "`ingest`, duplicates removed": ", dedup: true"}
        sides = {name: [] for name in (*ours, *readers)}
        for _ in range(ROUNDS):
            for name, more in ours.items():
                start = self.run("ingest", INGEST.format(files="one/*.parquet", more=more), keep=False)
                sides[name].append(less(self.run("ingest", INGEST.format(files="links/*.parquet", more=more), keep=False), start))
            for name, kind in readers.items():
                start = measure([self.reader, kind, self.one], self.work)
                sides[name].append(less(measure([self.reader, kind, *files], self.work), start))
        amount = self.bytes * COPIES / 1e6
        self.table(f"{amount:,.0f} MB of text in {COPIES} files", "MB", {name: (runs, amount) for name, runs in sides.items()})

    def memory(self):
        print("| Parquet, GB | text, GB | wall, s | peak memory, MB |\n|---|---|---|---|")
        for size in SIZES:
            count = round(size * 1e9 / self.links(1)[0].stat().st_size)
            self.links(count)
            run = self.run("ingest", INGEST.format(files="links/*.parquet", more=""), keep=False)
            print(f"| {size:g} | {count * self.bytes / 1e9:.1f} | {run['wall']:.1f} | {run['memory']:.0f} |", flush=True)


def main() -> None:
    binary, model, texts, *parts = sys.argv[1:]
    with tempfile.TemporaryDirectory(dir=os.environ.get("WORK")) as work:
        bench = Bench(binary, model, texts, Path(work))
        for part in parts or ["tokenize", "ingest", "memory"]:
            getattr(bench, part)()


if __name__ == "__main__":
    main()
