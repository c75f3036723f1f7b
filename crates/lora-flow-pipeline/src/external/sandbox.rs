//! What a plugin's process may touch, held by the kernel.
//!
//! On Linux a process gives up, between `fork` and `exec` and for good, what its [`Scope`] does
//! not hold: files by Landlock, sockets by a seccomp filter, because Landlock knows TCP alone.
//! Both pass to its children. What the kernel cannot take is told, not passed over.

use std::path::{Path, PathBuf};
use std::process::Command;

use lora_flow_core::Result;

/// What a process may touch besides the system's programs, libraries and settings.
#[derive(Debug, Clone)]
pub(super) struct Scope {
    /// Files and folders it may read. Those that do not exist are passed over.
    pub(super) readable: Vec<PathBuf>,
    /// Folders it may write.
    pub(super) writable: Vec<PathBuf>,
    /// Whether it may use the network, and with it sockets of all kinds.
    pub(super) network: bool,
    /// Whether it may use local sockets without the network. Behind a socket file may be a service
    /// that does what the process may not, such as one that starts containers, and the kernel
    /// holds no one to a folder there.
    pub(super) local_sockets: bool,
}

/// What a process gives up before it becomes its program; nothing by default.
#[derive(Debug, Default)]
pub(super) struct Confinement {
    #[cfg(target_os = "linux")]
    files: Option<std::os::fd::OwnedFd>,
    #[cfg(target_os = "linux")]
    sockets: Option<Box<[libc::sock_filter]>>,
}

/// How to take from a command's process what the scope does not hold, and what this system cannot
/// take, in words that go after the plugin's name.
///
/// # Errors
/// When the kernel knows how but refuses.
#[cfg(not(target_os = "linux"))]
pub(super) fn confine(_: &Command, scope: &Scope) -> Result<(Confinement, Option<&'static str>)> {
    tracing::trace!("not confined: {scope:?}");
    Ok((Confinement {}, Some("can read and write all that you can, and use the network")))
}

/// How to take from a command's process what the scope does not hold, and what this system cannot
/// take, in words that go after the plugin's name.
///
/// # Errors
/// When the kernel knows how but refuses.
#[cfg(target_os = "linux")]
pub(super) fn confine(
    command: &Command,
    scope: &Scope,
) -> Result<(Confinement, Option<&'static str>)> {
    let files = linux::files(command, scope)?;
    let sockets = (!scope.network).then(|| linux::sockets(scope.local_sockets));
    let gap = match (&files, &sockets) {
        (None, Some(None)) => Some("can read and write all that you can, and use the network"),
        (None, _) => Some("can read and write all that you can"),
        (Some(_), Some(None)) => Some("can use the network other than by TCP"),
        (Some(_), _) if linux::version() < linux::HOLDS_TRUNCATION => {
            Some("can empty all files that you can write")
        }
        (Some(_), _) => None,
    };
    Ok((Confinement { files, sockets: sockets.flatten() }, gap))
}

/// Where this system keeps what programs need to run at all.
const SYSTEM: [&str; 19] = [
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
    "/etc",
    "/opt",
    "/proc",
    "/sys",
    "/nix/store",
    "/gnu/store",
    "/snap",
    "/run/current-system",
    "/run/systemd/resolve",
    "/run/opengl-driver",
    "/var/lib/ca-certificates",
    "/var/lib/snapd",
];

/// Devices that hold nothing, and those that compute.
const DEVICES: [&str; 7] =
    ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/dri", "/dev/kfd"];

/// Parts of an install prefix beside its folder of programs.
const PREFIX: [&str; 9] =
    ["bin", "lib", "lib32", "lib64", "libexec", "etc", "ssl", "versions", "pyvenv.cfg"];

/// Files that choose a version of an interpreter for the folder they are in and all below.
const CHOICES: [&str; 5] =
    [".python-version", ".tool-versions", "rust-toolchain", "rust-toolchain.toml", ".nvmrc"];

/// Where programs lie that the command and its children may start: the folders of the `PATH`, that
/// of the program itself, and the install prefixes around them.
fn programs(command: &Command) -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> =
        std::env::split_paths(&path).filter(|p| p.is_absolute()).collect();
    let program = Path::new(command.get_program());
    let found = folders.iter().map(|folder| folder.join(program)).find(|p| p.is_file());
    folders.extend(found.as_deref().and_then(Path::parent).map(Path::to_owned));
    for link in found.iter().chain(&folders.clone()) {
        let Ok(real) = link.canonicalize() else { continue };
        folders.push(if real.is_dir() { real } else { real.parent().unwrap_or(link).to_owned() });
    }
    folders.sort();
    folders.dedup();
    let home = std::env::home_dir().unwrap_or_default();
    let mut all = Vec::new();
    for folder in folders {
        let prefix = folder.parent().filter(|p| p.parent().is_some() && *p != home);
        all.extend(prefix.iter().flat_map(|p| PREFIX.map(|part| p.join(part))));
        if folder.parent().is_some() && folder != home {
            all.push(folder);
        }
    }
    let start = command.get_current_dir().unwrap_or(Path::new("/"));
    all.extend(start.ancestors().flat_map(|a| CHOICES.map(|c| a.join(c))));
    all
}

#[cfg(target_os = "linux")]
mod linux {
    use std::collections::{HashMap, HashSet};
    use std::ffi::OsString;
    use std::os::fd::{AsRawFd, OwnedFd};
    use std::os::unix::fs::MetadataExt;
    use std::sync::{Arc, Mutex, OnceLock, PoisonError};
    use std::time::{Duration, Instant};

    use landlock::{
        ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr,
        RulesetCreated, RulesetCreatedAttr,
    };
    use lora_flow_core::ResultExt;

    use super::*;

    /// The newest Landlock this was tried with. An older kernel holds what it can.
    const NEWEST: ABI = ABI::V7;

    /// The first Landlock that keeps files from being cut off by `truncate` (Linux 6.2).
    pub(super) const HOLDS_TRUNCATION: libc::c_long = 3;

    /// The kernel's version of Landlock; none is at most 0.
    pub(super) fn version() -> libc::c_long {
        const ASK: libc::c_uint = 1; // LANDLOCK_CREATE_RULESET_VERSION
        // SAFETY: a plain system call; with this flag it reads no memory.
        unsafe {
            let nothing = std::ptr::null::<libc::c_void>();
            libc::syscall(libc::SYS_landlock_create_ruleset, nothing, 0usize, ASK)
        }
    }

    /// A Landlock ruleset for a command; none where the kernel has no Landlock.
    pub(super) fn files(command: &Command, scope: &Scope) -> Result<Option<OwnedFd>> {
        let rules = || -> Result<RulesetCreated, landlock::RulesetError> {
            let mut ruleset = Ruleset::default()
                .handle_access(AccessFs::from_all(NEWEST))?
                .scope(landlock::Scope::from_all(NEWEST))?;
            if !scope.network {
                ruleset = ruleset.handle_access(AccessNet::from_all(NEWEST))?;
            }
            let mut ruleset = ruleset.create()?;
            let read = AccessFs::from_read(NEWEST);
            let all = AccessFs::from_all(NEWEST);
            for (fd, access) in shared(command).iter() {
                ruleset = ruleset.add_rule(PathBeneath::new(fd, *access))?;
            }
            for path in &scope.readable {
                ruleset = allow(ruleset, path, read)?;
            }
            for path in &scope.writable {
                ruleset = allow(ruleset, path, all)?;
            }
            Ok(ruleset)
        };
        Ok(rules().context("cannot confine the plugin")?.into())
    }

    fn allow(
        ruleset: RulesetCreated,
        path: &Path,
        access: BitFlags<AccessFs>,
    ) -> Result<RulesetCreated, landlock::RulesetError> {
        let Ok(fd) = PathFd::new(path) else { return Ok(ruleset) };
        let access = if path.is_dir() { access } else { access & AccessFs::from_file(NEWEST) };
        ruleset.add_rule(PathBeneath::new(fd, access))
    }

    /// What is open, and what may be done with it.
    type Rule = (PathFd, BitFlags<AccessFs>);

    /// How long it is taken for granted that the same programs stand at the same places.
    const FRESH: Duration = Duration::from_secs(1);

    /// What all processes of a program may touch: the system, programs and devices. Finding that out
    /// takes hundreds of system calls, so short tasks that follow each other share the answer.
    fn shared(command: &Command) -> Arc<Vec<Rule>> {
        type Known = HashMap<(OsString, PathBuf), (Instant, Arc<Vec<Rule>>)>;
        static KNOWN: Mutex<Option<Known>> = Mutex::new(None);
        // The folders that differ from try to try are the store's own.
        let start = command.get_current_dir().unwrap_or(Path::new("/"));
        let above = start.ancestors().nth(2).unwrap_or(start).to_owned();
        let name = (command.get_program().to_owned(), above);
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        let known = known.get_or_insert_default();
        known.retain(|_, (found, _)| found.elapsed() < FRESH);
        if let Some((_, rules)) = known.get(&name) {
            return rules.clone();
        }
        let (read, all) = (AccessFs::from_read(NEWEST), AccessFs::from_all(NEWEST));
        let mut paths: Vec<PathBuf> = SYSTEM.iter().map(PathBuf::from).collect();
        paths.extend(programs(command));
        let mut seen = HashSet::new();
        let mut rules = Vec::new();
        let devices = DEVICES.iter().map(PathBuf::from).chain(nvidia().iter().cloned());
        let paths = paths.into_iter().map(|p| (p, read)).chain(devices.map(|p| (p, all)));
        for (path, access) in paths {
            let Ok(meta) = std::fs::metadata(&path) else { continue };
            if !seen.insert((meta.dev(), meta.ino())) {
                continue;
            }
            let Ok(fd) = PathFd::new(&path) else { continue };
            let access = if meta.is_dir() { access } else { access & AccessFs::from_file(NEWEST) };
            rules.push((fd, access));
        }
        let rules = Arc::new(rules);
        known.insert(name, (Instant::now(), rules.clone()));
        rules
    }

    fn nvidia() -> &'static [PathBuf] {
        static FOUND: OnceLock<Vec<PathBuf>> = OnceLock::new();
        FOUND.get_or_init(|| {
            let devices = std::fs::read_dir("/dev").into_iter().flatten().flatten();
            let named =
                |e: &std::fs::DirEntry| e.file_name().to_string_lossy().starts_with("nvidia");
            devices.filter(named).map(|e| e.path()).collect()
        })
    }

    /// The number that names this machine's system calls in a filter.
    const ARCHITECTURE: Option<u32> = if cfg!(target_arch = "x86_64") {
        Some(0xC000_003E)
    } else if cfg!(target_arch = "aarch64") {
        Some(0xC000_00B7)
    } else if cfg!(target_arch = "riscv64") {
        Some(0xC000_00F3)
    } else {
        None
    };

    /// A filter that refuses all sockets but, if `local`, those of the machine; none where the
    /// kernel or this program does not know how. Pairs of connected sockets are no way out.
    ///
    /// Calls of another architecture, also of x32, are refused whole: they have other numbers.
    /// So is io_uring, which opens sockets without the call.
    pub(super) fn sockets(local: bool) -> Option<Box<[libc::sock_filter]>> {
        let architecture = ARCHITECTURE?;
        let refuse = libc::SECCOMP_RET_ERRNO;
        // SAFETY: a plain system call that reads the action.
        let known = unsafe {
            libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, &refuse) == 0
        };
        if !known {
            return None;
        }
        const NUMBER: u32 = 0; // offsets in `struct seccomp_data`
        const ARCH: u32 = 4;
        const FIRST_ARGUMENT: u32 = 16; // its low half: all three architectures are little endian
        const X32: u32 = 0x4000_0000;
        const ALLOW: u8 = 8; // index of the instructions at the end
        const REFUSE: u8 = 9;
        let load = |offset| instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset);
        // Jumps count from the next instruction; `at` is this one's index.
        let jump = |at: u8, test: u32, value: u32, then: u8, otherwise: u8| {
            instruction(
                libc::BPF_JMP | test | libc::BPF_K,
                then - at - 1,
                otherwise - at - 1,
                value,
            )
        };
        let end = |value| instruction(libc::BPF_RET | libc::BPF_K, 0, 0, value);
        Some(Box::new([
            load(ARCH),
            jump(1, libc::BPF_JEQ, architecture, 2, REFUSE),
            load(NUMBER),
            jump(3, libc::BPF_JGE, X32, REFUSE, 4),
            jump(4, libc::BPF_JEQ, libc::SYS_io_uring_setup as u32, REFUSE, 5),
            jump(5, libc::BPF_JEQ, libc::SYS_socket as u32, 6, ALLOW),
            load(FIRST_ARGUMENT),
            jump(
                7,
                libc::BPF_JEQ,
                libc::AF_UNIX as u32,
                if local { ALLOW } else { REFUSE },
                REFUSE,
            ),
            end(libc::SECCOMP_RET_ALLOW),
            end(refuse | libc::EACCES as u32),
        ]))
    }

    fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
        libc::sock_filter { code: code as u16, jt, jf, k }
    }

    impl Confinement {
        /// Takes the rights from the calling process, which shares its memory with its parent: it
        /// makes system calls alone.
        ///
        /// # Errors
        /// The number of what the kernel refused.
        pub(in crate::external) fn enforce(&self) -> Result<(), libc::c_int> {
            let check = |result: libc::c_long| match result {
                0 => Ok(()),
                // SAFETY: the calling thread's own place.
                _ => Err(unsafe { *libc::__errno_location() }),
            };
            if self.files.is_none() && self.sockets.is_none() {
                return Ok(());
            }
            // SAFETY: plain system calls; the filter outlives the one that reads it.
            unsafe {
                // Without this the kernel takes neither: a program with more rights could be misled.
                check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).into())?;
                if let Some(files) = &self.files {
                    check(libc::syscall(libc::SYS_landlock_restrict_self, files.as_raw_fd(), 0))?;
                }
                if let Some(sockets) = &self.sockets {
                    let program = libc::sock_fprog {
                        len: sockets.len() as libc::c_ushort,
                        filter: sockets.as_ptr().cast_mut(),
                    };
                    check(libc::syscall(
                        libc::SYS_seccomp,
                        libc::SECCOMP_SET_MODE_FILTER,
                        0,
                        &program,
                    ))?;
                }
            }
            Ok(())
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests;
