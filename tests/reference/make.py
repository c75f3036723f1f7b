"""The one entry: `python tests/reference/make.py [chat|tiny|methods|smollm2|tokenizer|all]`."""

import sys

import common

PARTS = ("tokenizer", "chat", "tiny", "methods", "smollm2")


def main() -> None:
    asked = sys.argv[1:] or ["all"]
    unknown = [a for a in asked if a not in (*PARTS, "all")]
    if unknown:
        raise SystemExit(f"unknown part `{unknown[0]}`; known: {', '.join(PARTS)}, all")
    common.single_thread()
    for part in PARTS:
        if part in asked or "all" in asked:
            __import__(f"make_{part}").make()


if __name__ == "__main__":
    main()
