//! How the allocator treats what is freed.

/// Has glibc keep freed blocks for the next ones of their kind. By default large ones go back to the
/// kernel and come again as pages to be zeroed: layers make and drop some of a few MB all the time,
/// and a forward pass lost a fifth of its time to that. Other allocators are left alone.
///
/// To be called before there are other threads.
pub fn keep_freed_blocks() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // Safety: sets two numbers of malloc; a refusal changes nothing.
    unsafe {
        // Blocks above this size still come from the kernel and return to it: weights.
        libc::mallopt(libc::M_MMAP_THRESHOLD, 256 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 1 << 30);
    }
}
