"""Takes files out of a Python package: request on stdin, events on stdout (see plugin.yaml)."""

import difflib
import fnmatch
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile


class Failure(Exception):
    """message, hint"""


def emit(event, **fields):
    print(json.dumps({"event": event, **fields}), flush=True)


def download(params, folder, network):
    """Has pip fetch the archive and returns its path."""
    wanted = f"{params['package']}=={params['version']}"
    only = "--only-binary" if params["format"] == "wheel" else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", only, ":all:"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", folder]
    command += [wanted] if network else ["--no-index", wanted]
    emit("log", level="info", message=f"pip download {wanted} ({params['format']})")
    pip = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace")
    sys.stderr.write(pip.stdout)
    if pip.returncode != 0:
        raise explain(params, pip.stdout, network)
    return os.path.join(folder, os.listdir(folder)[0])


def explain(params, output, network):
    """Turns pip's output into one clear error."""
    archive = f"{params['format']} of `{params['package']}=={params['version']}`"
    if "No module named pip" in output:
        return Failure(f"`{sys.executable}` has no pip", "install it: `python3 -m ensurepip`, or the system's package `python3-pip`")
    if re.search(r"ConnectionError|Timeout|NameResolution|ProxyError|SSLError|Max retries|connection broken", output):
        return Failure(f"pip cannot reach the package index for the {archive}",
                       "check the network, the proxy and pip's settings (`python3 -m pip config list`)")
    versions = re.search(r"\(from versions: (.*)\)", output)
    if versions and versions[1] != "none":
        near = difflib.get_close_matches(params["version"], versions[1].split(", "), 5, 0.0)
        return Failure(f"there is no {archive}", "versions near it: " + ", ".join(f"`{v}`" for v in near))
    if "No matching distribution" in output:
        other = "sdist" if params["format"] == "wheel" else "wheel"
        hint = f"check the name, whether it is there with `format: {other}`, and the network"
        return Failure(f"pip finds no {archive}", hint) if network else \
            Failure(f"pip finds no {archive} among the local archives", "run without `--offline`, or set PIP_FIND_LINKS")
    errors = re.findall(r"^ERROR: (.+)", output, re.MULTILINE) or ["it did not say why"]
    return Failure(f"pip failed on the {archive}: {errors[-1]}", "the task's log has its whole output")


class Archive:
    """Regular files of a wheel or of a source archive (without its top folder), by path."""

    def __init__(self, path):
        if zipfile.is_zipfile(path):
            file = zipfile.ZipFile(path)
            self.open, names = file.open, {i.filename: i for i in file.infolist() if not i.is_dir()}
        else:
            file = tarfile.open(path)
            self.open, names = file.extractfile, {i.name: i for i in file.getmembers() if i.isfile()}
        top = 0 if path.endswith(".whl") else 1
        self.members = {"/".join(name.split("/")[top:]): info for name, info in names.items()}

    def select(self, patterns):
        chosen = {}
        for pattern in patterns:
            found = [pattern] if pattern in self.members else sorted(fnmatch.filter(self.members, pattern))
            if not found:
                near = difflib.get_close_matches(pattern, self.members, 5, 0.4) or sorted(self.members)[:5]
                raise Failure(f"the archive has no member `{pattern}`", "members near it: " + ", ".join(f"`{n}`" for n in near))
            chosen.update({name: self.members[name] for name in found})
        return chosen


def copy(source, target):
    """Copies a stream to a file and returns its SHA-256."""
    digest = hashlib.sha256()
    with open(target, "wb") as out:
        while chunk := source.read(1 << 20):
            digest.update(chunk)
            out.write(chunk)
    return digest.hexdigest()


def check(what, expected, found):
    if expected not in (None, found):
        raise Failure(f"{what} has another SHA-256 than expected: expected {expected}, found {found}",
                      "the package was changed, or the hash belongs to another version")


def text_rows(path, max_chars):
    """Rows of a text: whole paragraphs, as many as fit into `max_chars`."""
    with open(path, encoding="utf-8") as file:
        paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", file.read())]
    texts = []
    for paragraph in filter(None, paragraphs):
        if texts and len(texts[-1]) + 2 + len(paragraph) <= max_chars:
            texts[-1] += "\n\n" + paragraph
        else:
            texts.append(paragraph)
    document = os.path.splitext(os.path.basename(path))[0]
    return [{"id": f"{document}#{i}", "document": document, "text": text} for i, text in enumerate(texts)]


def run(request):
    if request.get("protocol") != 1:
        raise Failure(f"the request is of protocol {request.get('protocol')}, this plugin speaks 1")
    params = request["params"]
    output = request["outputs"]["files"]["path"]
    downloaded, extracted = (os.path.join(request["scratch"], name) for name in ("downloaded", "extracted"))
    os.makedirs(downloaded)
    os.makedirs(extracted)
    path = download(params, downloaded, request.get("network", True))
    archive_name = os.path.basename(path)
    with open(path, "rb") as file:
        archive_sha256 = copy(file, os.devnull)
    check(f"`{archive_name}`", params.get("archive_sha256"), archive_sha256)

    archive, files = Archive(path), {}
    members = archive.select(params["members"])
    for unused in set(params["sha256"]) - set(members):
        raise Failure(f"`sha256` names `{unused}`, which is not among the members taken")
    for done, (member, info) in enumerate(members.items()):
        emit("progress", done=done, total=len(members), unit="file", message=member)
        # Only the last part of a member's path is ever used: nothing lands outside the folder.
        name = os.path.basename(member.replace("\\", "/"))
        if files.setdefault(name, member) != member or name in ("", ".", ".."):
            raise Failure(f"`{files[name]}` and `{member}` would both become the file `{name}`", "take one of them only")
        with archive.open(info) as source:
            check(f"`{member}` of `{archive_name}`", params["sha256"].get(member), copy(source, os.path.join(extracted, name)))

    if "rows" in params:
        rows = [row for name in files for row in text_rows(os.path.join(extracted, name), params["rows"]["max_chars"])]
        if params["rows"]["shuffle"]:
            rows.sort(key=lambda row: hashlib.sha256(row["id"].encode()).digest())
        with open(os.path.join(output, params["rows"]["file"]), "w", encoding="utf-8", newline="\n") as out:
            out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        emit("summary", name="rows", value=str(len(rows)))
    else:
        for name in files:
            shutil.move(os.path.join(extracted, name), os.path.join(output, name))
    emit("summary", name="files", value=str(len(files)))
    emit("meta", output="files", value={"package": params["package"], "version": params["version"], "archive_sha256": archive_sha256})


try:
    run(json.load(sys.stdin))
    emit("done")
except (Failure, OSError, ValueError, zipfile.BadZipFile, tarfile.TarError) as error:
    message = error.args[0] if isinstance(error, Failure) else f"{type(error).__name__}: {error}"
    emit("error", message=message, **({"hint": error.args[1]} if isinstance(error, Failure) and error.args[1:] else {}))
    sys.exit(1)
