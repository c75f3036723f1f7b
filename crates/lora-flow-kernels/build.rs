//! With feature `cuda`: compiles the kernels to fat binaries, machine code for the usual
//! architectures and PTX of the newest for those to come.
//!
//! `NVCC` names the compiler (else `CUDA_HOME/bin/nvcc`, `nvcc` on the path, `/usr/local/cuda`);
//! `LORA_FLOW_CUDA_ARCHS` other architectures, as `80,90a`.

use std::path::{Path, PathBuf};
use std::process::Command;

const SOURCES: [&str; 6] = ["rows", "loss", "adamw", "gated", "attention", "flash"];
const ARCHS: &str = "80,86,89,90a,100";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo::rerun-if-changed=src/cuda");
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH", "LORA_FLOW_CUDA_ARCHS"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let Some(nvcc) = find_nvcc() else {
        println!(
            "cargo::error=feature `cuda` needs nvcc of a CUDA toolkit, 12.0 or newer: install one and set \
             CUDA_HOME to its folder, or NVCC to the compiler"
        );
        return;
    };
    let out = PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default());
    let archs = std::env::var("LORA_FLOW_CUDA_ARCHS").unwrap_or_else(|_| ARCHS.to_owned());
    let compile = |name: &str| compile(&nvcc, name, &archs, &out);
    // As many at a time as cargo says there is room for.
    let jobs = std::env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1usize).max(1);
    for batch in SOURCES.chunks(jobs) {
        let done: Vec<_> = std::thread::scope(|scope| {
            let running: Vec<_> =
                batch.iter().map(|name| scope.spawn(move || compile(name))).collect();
            running.into_iter().map(std::thread::ScopedJoinHandle::join).collect()
        });
        for result in done {
            if let Err(problem) = result.unwrap_or_else(|_| Err("a thread failed".into())) {
                for line in problem.lines() {
                    println!("cargo::error={line}");
                }
            }
        }
    }
}

fn find_nvcc() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(variable);
    let named = variable("NVCC").into_iter().chain(homes.map(|home| home.join("bin/nvcc")));
    let all = named.chain(["nvcc".into(), "/usr/local/cuda/bin/nvcc".into()]);
    let works = |path: &PathBuf| {
        Command::new(path).arg("--version").output().is_ok_and(|output| output.status.success())
    };
    all.into_iter().find(works)
}

fn compile(nvcc: &Path, name: &str, archs: &str, out: &Path) -> Result<(), String> {
    let mut command = Command::new(nvcc);
    command.args(["-fatbin", "-O3", "-std=c++17", "--threads", "1", "-o"]);
    command.arg(out.join(format!("{name}.fatbin"))).arg(format!("src/cuda/{name}.cu"));
    let archs: Vec<&str> = archs.split(',').map(str::trim).filter(|a| !a.is_empty()).collect();
    for arch in &archs {
        command.arg(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
    }
    if let Some(newest) = archs.last() {
        let newest: String = newest.chars().filter(char::is_ascii_digit).collect();
        command.arg(format!("-gencode=arch=compute_{newest},code=compute_{newest}"));
    }
    let output = command.output().map_err(|e| format!("cannot run {}: {e}", nvcc.display()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("nvcc failed on {name}.cu:\n{}", String::from_utf8_lossy(&output.stderr)))
}
