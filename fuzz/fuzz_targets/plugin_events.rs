//! Whatever a plugin writes to its standard output is an event or an error that says why not.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| lora_flow_pipeline::read_plugin_output(bytes, &mut |_| ()));
