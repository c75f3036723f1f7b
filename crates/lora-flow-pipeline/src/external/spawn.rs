//! Starting a plugin's process.
//!
//! Between leaving this process and becoming its program a child must join a group of its own and
//! give up its rights. `std::process::Command` can do that after a `fork` alone, which copies the
//! page tables of a process that holds a plan and its results: half of what a short task costs. Here
//! the child borrows this process's memory until it becomes its program, as `posix_spawn` does,
//! while the thread that started it waits.

use std::io::{self, PipeReader, PipeWriter};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};

use super::sandbox::Confinement;

/// A process that was started as the leader of a group of its own.
#[derive(Debug)]
pub(super) struct Started {
    pub(super) id: libc::pid_t,
    pub(super) stdin: PipeWriter,
    pub(super) stdout: PipeReader,
    pub(super) stderr: PipeReader,
}

/// Starts a command, whose environment must be cleared: it gets the variables that the command names
/// and no other. On Linux it dies with the thread that calls this.
///
/// # Errors
/// When the process cannot be made, cannot give up its rights, or cannot become the program.
#[cfg(target_os = "linux")]
pub(super) fn spawn(command: &Command, confinement: &Confinement) -> io::Result<Started> {
    linux::spawn(command, confinement)
}

/// Starts a command.
///
/// # Errors
/// When the process cannot be made, or cannot become the program.
#[cfg(not(target_os = "linux"))]
pub(super) fn spawn(command: &Command, _: &Confinement) -> io::Result<Started> {
    use std::os::unix::process::CommandExt;

    let mut own = Command::new(command.get_program());
    own.args(command.get_args()).env_clear().process_group(0);
    own.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    if let Some(dir) = command.get_current_dir() {
        own.current_dir(dir);
    }
    let ((input, stdin), (stdout, output), (stderr, errors)) =
        (io::pipe()?, io::pipe()?, io::pipe()?);
    let child = own.stdin(input).stdout(output).stderr(errors).spawn()?;
    Ok(Started { id: child.id() as libc::pid_t, stdin, stdout, stderr })
}

/// Waits for a process to end, and sets its number free.
///
/// # Errors
/// When there is no such child.
pub(super) fn wait(id: libc::pid_t) -> io::Result<ExitStatus> {
    let mut status = 0;
    loop {
        // SAFETY: a plain system call that fills `status`.
        if unsafe { libc::waitpid(id, &mut status, 0) } == id {
            return Ok(ExitStatus::from_raw(status));
        }
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e);
        }
    }
}

#[cfg(target_os = "linux")]
mod linux {
    use std::ffi::{CString, OsStr, c_char, c_int, c_void};
    use std::mem::{MaybeUninit, zeroed};
    use std::os::fd::AsRawFd;
    use std::os::unix::ffi::OsStrExt;
    use std::ptr::null;

    use super::*;

    /// The child's stack in bytes. `execvpe` puts paths and, for a script without `#!`, the
    /// arguments there; all else the child does is system calls.
    const STACK: usize = 256 << 10;

    /// All that the child needs, made before it exists: it must not allocate.
    struct Child<'a> {
        program: CString,
        arguments: Vec<*const c_char>,
        environment: Vec<*const c_char>,
        folder: Option<CString>,
        /// What becomes descriptors 0, 1 and 2.
        ends: [c_int; 3],
        parent: libc::pid_t,
        confinement: &'a Confinement,
        /// Why it could not become the program, written by the child.
        error: c_int,
    }

    pub(super) fn spawn(command: &Command, confinement: &Confinement) -> io::Result<Started> {
        let program = c_string(command.get_program())?;
        let words = command.get_args().map(c_string).collect::<io::Result<Vec<_>>>()?;
        let variables = command.get_envs().filter_map(|(name, value)| Some((name, value?)));
        let variables = variables.map(|(name, value)| {
            c_string(OsStr::from_bytes(&[name.as_bytes(), b"=", value.as_bytes()].concat()))
        });
        let variables = variables.collect::<io::Result<Vec<_>>>()?;
        let folder = command.get_current_dir().map(|dir| c_string(dir.as_os_str())).transpose()?;
        let ((input, stdin), (stdout, output), (stderr, errors)) =
            (io::pipe()?, io::pipe()?, io::pipe()?);
        let words = [&program].into_iter().chain(&words).map(|w| w.as_ptr());
        let mut child = Child {
            arguments: words.chain([null()]).collect(),
            environment: variables.iter().map(|v| v.as_ptr()).chain([null()]).collect(),
            program: program.clone(),
            folder,
            ends: [input.as_raw_fd(), output.as_raw_fd(), errors.as_raw_fd()],
            parent: std::process::id() as libc::pid_t,
            confinement,
            error: 0,
        };
        let mut stack = Vec::<MaybeUninit<u8>>::with_capacity(STACK);
        // SAFETY: the child runs `become_program` on a stack of its own, aligned to 16 bytes, while
        // this thread waits (CLONE_VFORK), so that all it borrows outlives it. It makes system calls
        // alone. Signals are blocked meanwhile: a handler would run in shared memory.
        let id = unsafe {
            let top = stack.as_mut_ptr().add(STACK & !15).cast::<u8>();
            let top = top.sub(top as usize % 16).cast::<c_void>();
            let (mut all, mut before) = (zeroed::<libc::sigset_t>(), zeroed::<libc::sigset_t>());
            libc::sigfillset(&mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
            let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
            let id = libc::clone(become_program, top, flags, (&raw mut child).cast());
            let failed = io::Error::last_os_error();
            libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut());
            if id < 0 {
                return Err(failed);
            }
            id
        };
        // SAFETY: the child wrote to it, if at all, before this thread went on.
        let error = unsafe { (&raw const child.error).read_volatile() };
        if error != 0 {
            wait(id)?;
            return Err(io::Error::from_raw_os_error(error));
        }
        Ok(Started { id, stdin, stdout, stderr })
    }

    fn c_string(text: &OsStr) -> io::Result<CString> {
        let nul = |_| io::Error::new(io::ErrorKind::InvalidInput, "it holds a zero byte");
        CString::new(text.as_bytes()).map_err(nul)
    }

    /// The child's life until `exec`. It allocates nothing and cannot panic.
    extern "C" fn become_program(child: *mut c_void) -> c_int {
        // SAFETY: `spawn` passes a `Child` that outlives this, and touches it only afterwards.
        let child = unsafe { &mut *child.cast::<Child>() };
        child.error = match prepare(child) {
            Ok(()) => {
                // SAFETY: all three are lists that end with a null pointer, or a string.
                unsafe {
                    libc::execvpe(
                        child.program.as_ptr(),
                        child.arguments.as_ptr(),
                        child.environment.as_ptr(),
                    );
                }
                last_error()
            }
            Err(error) => error,
        };
        // SAFETY: unlike `exit` this runs nothing of the parent's.
        unsafe { libc::_exit(127) }
    }

    fn last_error() -> c_int {
        // SAFETY: the place is this thread's own, which the parent's thread shares and does not use
        // before the child is gone.
        unsafe { *libc::__errno_location() }
    }

    fn prepare(child: &Child) -> Result<(), c_int> {
        let check = |result: c_int| if result < 0 { Err(last_error()) } else { Ok(()) };
        // SAFETY: plain system calls on values that live on this stack or in `child`.
        unsafe {
            // What the parent handles must not run here, and nobody expects a program to start with
            // SIGPIPE ignored, as those in Rust do.
            for signal in 1..=libc::SIGRTMAX() {
                let mut action = zeroed::<libc::sigaction>();
                let known = libc::sigaction(signal, null(), &mut action) == 0;
                let handled = !matches!(action.sa_sigaction, libc::SIG_DFL | libc::SIG_IGN);
                if known && (handled || signal == libc::SIGPIPE) {
                    action = zeroed();
                    libc::sigaction(signal, &action, std::ptr::null_mut());
                }
            }
            check(libc::setpgid(0, 0))?;
            for (end, number) in child.ends.iter().zip(0..) {
                check(libc::dup2(*end, number))?;
            }
            if let Some(folder) = &child.folder {
                check(libc::chdir(folder.as_ptr()))?;
            }
            child.confinement.enforce()?;
            check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
            // The parent may have died before the request took effect.
            if libc::getppid() != child.parent {
                return Err(libc::ESRCH);
            }
            let mut none = zeroed::<libc::sigset_t>();
            libc::sigemptyset(&mut none);
            check(libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut()))?;
        }
        Ok(())
    }
}
