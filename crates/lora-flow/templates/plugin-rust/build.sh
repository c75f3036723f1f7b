#!/bin/sh
# Builds the plugin. Nothing in the plugin's folder may change meanwhile, its content is the cache
# key: hence the target folder elsewhere, and `--locked` (`cargo generate-lockfile` makes the file).
set -eu
target="$LORA_FLOW_PLUGIN_BUILD/target"
cargo build --release --locked --target-dir "$target"
mv "$target/release/{{NAME}}" "$LORA_FLOW_PLUGIN_BUILD/{{NAME}}"
rm -r "$target"
