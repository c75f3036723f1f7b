//! What the process holds, held at most, and could still get.

/// Starts the measure of [`peak_rss_bytes`] again, where the system can: what earlier tasks of the
/// process needed is given back and no longer counts.
pub fn reset_peak_rss() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // Safety: `malloc_trim` only returns free pages to the system.
        unsafe {
            libc::malloc_trim(0);
        }
    }
    // Linux: 5 resets the high-water mark (proc_pid_clear_refs(5)). Without it the peak stays that
    // of the whole process, which is the truth as well, only a less useful one.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// Most memory that the process has held since its start or [`reset_peak_rss`], in bytes; 0 where
/// the system does not say.
pub fn peak_rss_bytes() -> u64 {
    status("VmHWM:").unwrap_or_else(crate::log::max_rss_bytes)
}

/// Memory that the process holds now, in bytes, where the system says.
pub fn rss_bytes() -> Option<u64> {
    status("VmRSS:")
}

/// Memory that the process could still get without swapping, in bytes, where the system says: what
/// is available of the machine, and of the control group if that is less.
pub fn available_bytes() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let machine = kib(&meminfo, "MemAvailable:")?;
    let group = || -> Option<u64> {
        let number = |name: &str| {
            std::fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok()?.trim().parse().ok()
        };
        let (max, used): (u64, u64) = (number("memory.max")?, number("memory.current")?);
        // The page cache counts as used and is given up on demand.
        let stat = std::fs::read_to_string("/sys/fs/cgroup/memory.stat").unwrap_or_default();
        let cache = stat.lines().find_map(|l| l.strip_prefix("inactive_file ")?.parse().ok());
        Some(max.saturating_sub(used.saturating_sub(cache.unwrap_or(0))))
    };
    Some(group().map_or(machine, |group| group.min(machine)))
}

fn status(field: &str) -> Option<u64> {
    kib(&std::fs::read_to_string("/proc/self/status").ok()?, field)
}

fn kib(text: &str, field: &str) -> Option<u64> {
    let line = text.lines().find_map(|l| l.strip_prefix(field))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn the_peak_follows_what_is_held_and_starts_again() {
        let before = peak_rss_bytes();
        let block = std::hint::black_box(vec![1u8; 256 << 20]);
        assert!(peak_rss_bytes() >= before.max(256 << 20));
        drop(block);
        reset_peak_rss();
        assert!(peak_rss_bytes() < (before.max(rss_bytes().unwrap())) + (200 << 20));
        assert!(available_bytes().unwrap() > 0);
    }
}
