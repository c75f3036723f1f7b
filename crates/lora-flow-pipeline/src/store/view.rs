//! A file seen as memory, without the danger of it.
//!
//! Reading a mapped file saves the copy out of the kernel, a fifth of the time of hashing it. But a
//! page that is gone, because somebody cut the file off or the disk failed, is a `SIGBUS`, which
//! ends the program. Here such a page becomes zeroes and the view remembers that it is broken.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::null_mut;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// A file's bytes, for as long as this lives.
#[derive(Debug)]
pub(super) struct View {
    start: *mut libc::c_void,
    len: usize,
    place: &'static Place,
}

// SAFETY: the memory is only read, and the place is made of atomics.
unsafe impl Sync for View {}

/// Where the handler of the signal finds a view. A free place has no end.
#[derive(Debug)]
struct Place {
    taken: AtomicBool,
    start: AtomicUsize,
    end: AtomicUsize,
    broken: AtomicBool,
}

/// As many views as there may be at once. Whoever finds no place reads the file instead.
static PLACES: [Place; 64] = [const {
    Place {
        taken: AtomicBool::new(false),
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        broken: AtomicBool::new(false),
    }
}; 64];

impl View {
    /// The first `len` bytes of a file, if they can be seen as memory here and now.
    pub(super) fn of(file: &File, len: u64) -> Option<Self> {
        let len = usize::try_from(len).ok().filter(|len| *len > 0)?;
        if !guarded() {
            return None;
        }
        let free = |p: &&Place| !p.taken.swap(true, Ordering::Acquire);
        let place = PLACES.iter().find(free)?;
        // SAFETY: a new mapping of a file that is open.
        let start = unsafe {
            let (read, private) = (libc::PROT_READ, libc::MAP_PRIVATE);
            libc::mmap(null_mut(), len, read, private, file.as_raw_fd(), 0)
        };
        if start == libc::MAP_FAILED {
            place.taken.store(false, Ordering::Release);
            return None;
        }
        place.broken.store(false, Ordering::Relaxed);
        place.start.store(start as usize, Ordering::Relaxed);
        place.end.store(start as usize + len, Ordering::Release);
        Some(Self { start, len, place })
    }

    /// The bytes. They may change while they are looked at, if somebody writes to the file: good for
    /// a digest that is then checked against the file's times, and for nothing else.
    fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping is `len` bytes long and lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.start.cast(), self.len) }
    }

    /// Some of the bytes, brought here in one step where the kernel knows how. `start` is a multiple of
    /// a page's size.
    pub(super) fn part(&self, start: usize, len: usize) -> &[u8] {
        let part = &self.bytes()[start..start + len];
        #[cfg(target_os = "linux")]
        // SAFETY: advice on memory of this mapping, which changes none of its bytes.
        unsafe {
            let at = part.as_ptr().cast_mut().cast();
            libc::madvise(at, len, libc::MADV_POPULATE_READ);
        }
        part
    }

    /// Whether all bytes that were looked at were the file's.
    pub(super) fn check(&self) -> io::Result<()> {
        match self.place.broken.load(Ordering::Acquire) {
            true => Err(io::Error::other("it was cut off, or the disk failed, while it was read")),
            false => Ok(()),
        }
    }
}

impl Drop for View {
    fn drop(&mut self) {
        self.place.end.store(0, Ordering::Release);
        self.place.taken.store(false, Ordering::Release);
        // SAFETY: nobody has the bytes any more.
        unsafe { libc::munmap(self.start, self.len) };
    }
}

static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// Whether the handler is there, which it is from the first call on.
fn guarded() -> bool {
    static GUARDED: OnceLock<bool> = OnceLock::new();
    *GUARDED.get_or_init(|| {
        // SAFETY: all zeroes is a valid `sigaction`; the handler makes system calls alone.
        unsafe {
            let mut before: libc::sigaction = std::mem::zeroed();
            if libc::sigaction(libc::SIGBUS, std::ptr::null(), &mut before) != 0 {
                return false;
            }
            let _ = BEFORE.set(before);
            let mut own: libc::sigaction = std::mem::zeroed();
            own.sa_sigaction = on_sigbus as *const () as usize;
            own.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigaction(libc::SIGBUS, &own, null_mut()) == 0
        }
    })
}

/// Puts zeroes in the place of a view's missing pages; for all other memory does what was done before.
extern "C" fn on_sigbus(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: the kernel passes the facts of the fault. What is replaced is memory of a view, which
    // lives while its bytes are looked at, as they are now.
    unsafe {
        let address = (*info).si_addr() as usize;
        for place in &PLACES {
            let end = place.end.load(Ordering::Acquire);
            let start = place.start.load(Ordering::Relaxed);
            if !(start..end).contains(&address) {
                continue;
            }
            place.broken.store(true, Ordering::Release);
            let page = usize::try_from(libc::sysconf(libc::_SC_PAGESIZE)).unwrap_or(4096);
            let from = address & !(page - 1);
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
            let at = from as *mut libc::c_void;
            if libc::mmap(at, end - from, libc::PROT_READ, flags, -1, 0) == at {
                return;
            }
        }
        let before = BEFORE.get().map_or(libc::SIG_DFL, |before| before.sa_sigaction);
        let takes_facts = BEFORE.get().is_some_and(|b| b.sa_flags & libc::SA_SIGINFO != 0);
        match before {
            libc::SIG_DFL | libc::SIG_IGN => {
                // The fault comes again when this returns, and then ends the program.
                libc::signal(signal, libc::SIG_DFL);
            }
            handler if takes_facts => {
                type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
                std::mem::transmute::<usize, Handler>(handler)(signal, info, context);
            }
            handler => {
                std::mem::transmute::<usize, extern "C" fn(libc::c_int)>(handler)(signal);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_cut_off_breaks_its_view_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, vec![7u8; 100_000]).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let view = View::of(&file, 100_000).unwrap();
        let other = View::of(&file, 4096).unwrap();
        assert!(view.bytes()[..1000].iter().all(|b| *b == 7) && view.check().is_ok());
        file.set_len(4096).unwrap();
        assert_eq!(view.bytes()[50_000..].iter().map(|b| u64::from(*b)).sum::<u64>(), 0);
        assert!(view.check().is_err());
        assert!(other.bytes().iter().all(|b| *b == 7) && other.check().is_ok());
        drop(view);
        assert!(View::of(&file, 4096).unwrap().check().is_ok(), "a new one starts anew");
    }
}
