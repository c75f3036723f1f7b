#!/bin/sh
# Builds the plugin. In the workspace it shares the lock file and the target folder with
# lora-flow. Naming `lora-flow` too selects the same features of the crates that both use, so that
# only the HTML parser and this program are compiled; `--bin` keeps cargo off lora-flow itself.
set -eu
messages=$(cargo build --release --locked --package lora-flow --package rust-docs --bin rust-docs \
  --message-format=json-render-diagnostics)
# cargo says where the program lies, wherever the target folder may be.
program=$(printf '%s\n' "$messages" | sed -n 's/.*"executable":"\([^"]*\)".*/\1/p')
cp "$program" "$LORA_FLOW_PLUGIN_BUILD/rust-docs"
