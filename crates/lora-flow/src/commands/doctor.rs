//! `lora-flow doctor`: what this program finds on this machine.

use std::process::Command;

use lora_flow_kernels::isa;

use crate::table::bytes;
use crate::ui::Failure;

pub fn doctor() -> Result<i32, Failure> {
    println!(
        "lora-flow {} on {}-{}",
        env!("CARGO_PKG_VERSION"),
        std::env::consts::ARCH,
        std::env::consts::OS
    );
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let limit = match std::env::var_os(isa::VARIABLE) {
        Some(_) => format!(" (limited by {})", isa::VARIABLE),
        None => String::new(),
    };
    println!("cpu        {cpus} threads, kernels for {}{limit}", isa::in_use().name());
    match memory_total() {
        Some(n) => println!("memory     {}", bytes(n)),
        None => println!("memory     unknown"),
    }
    cuda();
    println!(
        "python3    {} (external plugins in Python, such as `pip-fetch`)",
        version("python3", &["--version"])
    );
    println!("pip        {}", version("python3", &["-m", "pip", "--version"]));
    println!(
        "cargo      {} (external plugins in Rust, such as `rust-docs`)",
        version("cargo", &["--version"])
    );
    let docs = output("rustc", &["--print", "sysroot"])
        .map(|root| std::path::Path::new(&root).join("share/doc/rust/html/book"));
    println!(
        "rust-docs  {}",
        match docs {
            Some(path) if path.is_dir() => "installed",
            Some(_) => "not installed: `rustup component add rust-docs`",
            None => "no rustc",
        }
    );
    Ok(0)
}

/// The GPUs that `--device cuda:N` would take, or what is missing.
#[cfg(feature = "cuda")]
fn cuda() {
    use lora_flow_kernels::cuda::{Gpu, gpus};
    let missing = |e: lora_flow_kernels::cuda::CudaError| {
        println!("cuda       {}{}", e.message, e.hint.map_or(String::new(), |h| format!(": {h}")));
    };
    let found = match gpus() {
        Ok(found) => found,
        Err(e) => return missing(e),
    };
    for gpu in found {
        let ((major, minor), memory) = (gpu.capability, bytes(gpu.memory as u64));
        let driver = format!("{}.{}", gpu.driver / 1000, gpu.driver % 1000 / 10);
        println!(
            "cuda:{}     {}, {memory}, compute capability {major}.{minor}, driver for CUDA {driver}",
            gpu.index, gpu.name
        );
        if let Err(e) = Gpu::open(gpu.index) {
            missing(e);
        }
    }
}

#[cfg(not(feature = "cuda"))]
fn cuda() {
    let nvcc = std::env::var("NVCC").unwrap_or_else(|_| "nvcc".to_owned());
    let toolkit = match output(&nvcc, &["--version"]) {
        Some(_) => "nvcc is there",
        None => "needs nvcc of a CUDA toolkit, 12.0 or newer, which is not found",
    };
    println!("cuda       not built in: `cargo build --release --features cuda` ({toolkit})");
}

fn memory_total() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("MemTotal:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

fn version(program: &str, args: &[&str]) -> String {
    output(program, args).unwrap_or_else(|| "not found".to_owned())
}

/// First line of a program's stdout, if it ran well.
fn output(program: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).output().ok().filter(|o| o.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).lines().next()?.trim().to_owned())
}
