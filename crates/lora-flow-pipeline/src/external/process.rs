//! Processes of plugins: started in a group of their own, heard line by line, stopped together.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender};
use std::thread;
use std::time::{Duration, Instant};

use lora_flow_core::{CancelToken, Error, Result, ResultExt};

use super::sandbox::Confinement;
use super::spawn::{self, Started};
use crate::plugin_manifest::PluginManifest;

/// Longest line of standard output in bytes. Data goes through files.
const LONGEST_EVENT: usize = 1 << 20;

/// Longest line of standard error that is kept whole, in bytes.
const LONGEST_LOG_LINE: usize = 16 << 10;

/// Time between asking a process to stop and making it.
const GRACE: Duration = Duration::from_secs(5);

/// How often the state of a process and the wish to stop it are looked at.
const TICK: Duration = Duration::from_millis(20);

/// How long output may still come after the process ended. Only a child that it left behind can
/// hold its pipes open longer.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Lines of standard error that a failure's message quotes.
const QUOTED: usize = 5;

/// What an empty pipe takes without a reader, in bytes: a page.
const ALWAYS_FITS: usize = 4096;

/// Environment variables that every plugin gets.
const ALWAYS: [&str; 3] = ["PATH", "HOME", "LANG"];

/// A line from a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Heard {
    /// Of its standard output.
    Output(String),
    /// Of its standard error.
    Error(String),
}

/// A program about to run.
pub(super) struct Program<'a> {
    pub(super) plugin: &'a str,
}

/// How a process ended.
#[derive(Debug)]
pub(super) struct End {
    status: ExitStatus,
    last_errors: VecDeque<String>,
}

/// The command that runs a task.
pub(super) fn command(
    manifest: &PluginManifest,
    products: Option<&Path>,
    scratch: &Path,
) -> Result<Command> {
    let mut words = manifest.command.iter().enumerate().map(|(i, word)| {
        let word = match (word.contains("{build}"), products) {
            (false, _) => word.clone(),
            (true, Some(products)) => word.replace("{build}", &products.to_string_lossy()),
            (true, None) => {
                return Err(Error::new(format!(
                    "the command of plugin `{}` uses `{{build}}`, but it has no `build` step",
                    manifest.name
                )));
            }
        };
        Ok(place(&manifest.dir, &word, i == 0))
    });
    let program = words.next().unwrap_or_else(|| Err(Error::new("the command is empty")))?;
    let mut command = Command::new(program);
    command.args(words.collect::<Result<Vec<_>>>()?).current_dir(scratch);
    environment(&mut command, manifest, scratch);
    Ok(command)
}

/// The command that builds a plugin.
pub(super) fn build_command(
    manifest: &PluginManifest,
    products: &Path,
    scratch: &Path,
) -> Result<Command> {
    let words = manifest.build.as_deref().unwrap_or_default();
    let word = |word: &String| word.replace("{build}", &products.to_string_lossy());
    let [program, args @ ..] = words else { return Err(Error::new("the build command is empty")) };
    let mut command = Command::new(place(&manifest.dir, &word(program), true));
    command.args(args.iter().map(word)).current_dir(&manifest.dir);
    environment(&mut command, manifest, scratch);
    Ok(command)
}

/// A word of a command: what names a file of the plugin becomes that file's path.
fn place(dir: &Path, word: &str, is_program: bool) -> OsString {
    let path = dir.join(word);
    if (is_program && word.contains('/')) || (!word.is_empty() && path.is_file()) {
        return path.into_os_string(); // `join` leaves an absolute path as it is
    }
    word.into()
}

/// Nothing but what is named, and a folder for temporary files that is cleaned up.
fn environment(command: &mut Command, manifest: &PluginManifest, scratch: &Path) {
    command.env_clear().env("TMPDIR", scratch);
    let names = ALWAYS.into_iter().chain(manifest.variables());
    for name in names.filter(|n| *n != "TMPDIR") {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
}

/// What the reading threads send.
enum Message {
    Heard(Heard),
    TooLong,
}

impl Program<'_> {
    /// Runs a command to its end, with `input` on its standard input. Each line goes to `hear`;
    /// if that fails, the process is stopped and the failure returned.
    ///
    /// # Errors
    /// When it cannot be started, [`Error::cancelled`] when it was cancelled, or what `hear` says.
    pub(super) fn run(
        &self,
        command: &Command,
        confinement: &Confinement,
        input: Vec<u8>,
        cancel: &CancelToken,
        mut hear: impl FnMut(Heard) -> Result<()>,
    ) -> Result<End> {
        let started = spawn::spawn(command, confinement);
        let started = started.map_err(|e| self.cannot_start(command, &e))?;
        let mut group = Group { id: started.id, status: None };
        let receiver = attach(started, input);

        let mut last_errors = VecDeque::new();
        let mut stopping: Option<(Instant, Error)> = None;
        let mut ended: Option<Instant> = None;
        // With its pipes closed it is about to end.
        let mut pause = Duration::from_micros(200);
        loop {
            match receiver.recv_timeout(TICK) {
                // While it is being stopped, what it says no longer counts.
                Ok(Message::Heard(Heard::Output(_)) | Message::TooLong) if stopping.is_some() => {}
                Ok(Message::Heard(heard)) => {
                    if let Heard::Error(line) = &heard {
                        last_errors.push_back(line.clone());
                        last_errors.drain(..last_errors.len().saturating_sub(QUOTED));
                    }
                    if let Err(e) = hear(heard) {
                        stopping.get_or_insert((Instant::now(), e));
                        group.signal(libc::SIGTERM);
                    }
                }
                Ok(Message::TooLong) => {
                    let message = format!(
                        "plugin `{}` wrote a line of more than {LONGEST_EVENT} bytes",
                        self.plugin
                    );
                    let hint = "data goes into the output folders, not to standard output";
                    stopping = Some((Instant::now(), Error::new(message).with_hint(hint)));
                    group.signal(libc::SIGTERM);
                }
                Err(RecvTimeoutError::Timeout) => {}
                // Both pipes are closed: all is heard.
                Err(RecvTimeoutError::Disconnected) if ended.is_some() => break,
                Err(RecvTimeoutError::Disconnected) => {
                    thread::sleep(pause);
                    pause = (pause * 2).min(TICK);
                }
            }
            if ended.is_none() && group.has_ended()? {
                ended = Some(Instant::now());
            }
            if ended.is_some_and(|t| t.elapsed() > LAST_WORDS) {
                break;
            }
            if cancel.is_cancelled() && stopping.is_none() && ended.is_none() {
                stopping = Some((Instant::now(), Error::cancelled()));
                group.signal(libc::SIGTERM);
            }
            if stopping.as_ref().is_some_and(|(since, _)| since.elapsed() > GRACE) {
                group.signal(libc::SIGKILL);
            }
        }
        let status = group.close()?;
        match stopping {
            Some((_, error)) => Err(error),
            None => Ok(End { status, last_errors }),
        }
    }

    fn cannot_start(&self, command: &Command, e: &std::io::Error) -> Error {
        let program = Path::new(command.get_program());
        let shown = program.display();
        let plugin = self.plugin;
        let error =
            |why: &str| Error::new(format!("plugin `{plugin}` cannot start `{shown}`: {why}"));
        match e.kind() {
            ErrorKind::NotFound if program.is_file() => error("its interpreter is missing")
                .with_hint("its first line, `#!…`, must name a program that exists"),
            ErrorKind::NotFound if program.is_absolute() => error("there is no such file")
                .with_hint("check `command` and `build` in its `plugin.yaml`"),
            ErrorKind::NotFound => error("it is not installed")
                .with_hint(format!("install `{shown}` so that it is found on the PATH")),
            ErrorKind::PermissionDenied => error("it is not executable")
                .with_hint(format!("`chmod +x {shown}`, or name its interpreter in `command`")),
            _ => error(&e.to_string()),
        }
    }
}

/// Threads that feed the process and listen to it. The channel closes with its pipes.
fn attach(started: Started, input: Vec<u8>) -> mpsc::Receiver<Message> {
    let Started { mut stdin, stdout, stderr, .. } = started;
    // Bounded: a process that floods its output is slowed down, not buffered.
    let (sender, receiver) = mpsc::sync_channel(256);
    // A closed pipe is no error.
    if input.len() <= ALWAYS_FITS {
        drop(stdin.write_all(&input));
        drop(stdin);
    } else {
        // It may never read: a full pipe must not hold up the rest.
        thread::spawn(move || drop(stdin.write_all(&input)));
    }
    let to_output = sender.clone();
    thread::spawn(move || listen_to_output(stdout, &to_output));
    thread::spawn(move || listen_to_errors(stderr, &sender));
    receiver
}

fn listen_to_output(pipe: impl Read, sender: &SyncSender<Message>) {
    let mut reader = BufReader::new(pipe);
    // A line that is too long is told of at once, since it may never end; what follows is read to
    // keep the pipe free.
    while let Some((line, whole)) = next_line(&mut reader, LONGEST_EVENT, Rest::Leave) {
        let message = match whole {
            true => Message::Heard(Heard::Output(line)),
            false => Message::TooLong,
        };
        if sender.send(message).is_err() {
            return;
        }
    }
}

/// The lines of a plugin's standard output; none in the place of one that is too long.
pub(super) fn output_lines(output: impl Read) -> impl Iterator<Item = Option<String>> {
    let mut reader = BufReader::new(output);
    std::iter::from_fn(move || {
        let (line, whole) = next_line(&mut reader, LONGEST_EVENT, Rest::Skip)?;
        Some(whole.then_some(line))
    })
}

fn listen_to_errors(pipe: impl Read, sender: &SyncSender<Message>) {
    let mut reader = BufReader::new(pipe);
    while let Some((line, _)) = next_line(&mut reader, LONGEST_LOG_LINE, Rest::Skip) {
        // A progress bar redraws its line; the last state is enough.
        let line = line.rsplit('\r').find(|part| !part.is_empty()).unwrap_or("").to_owned();
        if sender.send(Message::Heard(Heard::Error(line))).is_err() {
            return;
        }
    }
}

/// What to do with the rest of a line that is too long.
#[derive(Clone, Copy, PartialEq)]
enum Rest {
    /// Read on to its end.
    Skip,
    /// Return at once; the rest then counts as another line.
    Leave,
}

/// The next line without its end, at most `limit` bytes of it, and whether that is all of it.
fn next_line(reader: &mut impl BufRead, limit: usize, rest: Rest) -> Option<(String, bool)> {
    let mut line = Vec::new();
    let mut whole = true;
    loop {
        let chunk = match reader.fill_buf() {
            Ok(chunk) => chunk,
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            Err(_) => &[],
        };
        if chunk.is_empty() {
            if line.is_empty() {
                return None;
            }
            break;
        }
        let end = chunk.iter().position(|b| *b == b'\n');
        let text = &chunk[..end.unwrap_or(chunk.len())];
        let room = limit.saturating_sub(line.len());
        whole &= text.len() <= room;
        line.extend_from_slice(&text[..text.len().min(room)]);
        let used = end.map_or(chunk.len(), |e| e + 1);
        reader.consume(used);
        if end.is_some() || (!whole && rest == Rest::Leave) {
            break;
        }
    }
    if line.last() == Some(&b'\r') {
        line.pop();
    }
    Some((String::from_utf8_lossy(&line).into_owned(), whole))
}

/// A process and all it started. Whatever happens, none of them outlives this.
struct Group {
    /// Number of the process that leads it, and of the group.
    id: libc::pid_t,
    status: Option<ExitStatus>,
}

impl Group {
    fn signal(&self, signal: libc::c_int) {
        if self.status.is_none() {
            // SAFETY: a plain system call. The leader has not been waited for, so that its
            // number still names this group.
            unsafe { libc::kill(-self.id, signal) };
        }
    }

    /// Whether the leader ended. It is not waited for yet: that would set its number free.
    fn has_ended(&self) -> Result<bool> {
        // SAFETY: all zeroes is a valid `siginfo_t`, and the call fills it.
        let (result, info) = unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
            (libc::waitid(libc::P_PID, self.id as libc::id_t, &mut info, flags), info)
        };
        if result != 0 {
            let e = std::io::Error::last_os_error();
            return if e.kind() == ErrorKind::Interrupted { Ok(false) } else { Err(e.into()) };
        }
        // SAFETY: `waitid` filled this field, or left it zero when nothing ended.
        Ok(unsafe { info.si_pid() } != 0)
    }

    /// Ends what the leader left behind, and takes its status.
    fn close(&mut self) -> Result<ExitStatus> {
        self.signal(libc::SIGKILL);
        let status = spawn::wait(self.id).context("cannot wait for the plugin's process")?;
        self.status = Some(status);
        Ok(status)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if self.status.is_none() {
            let _ = self.close();
        }
    }
}

impl End {
    /// Whether a task's process ended as it should.
    pub(super) fn judge(&self, plugin: &str, said_done: bool) -> Result<()> {
        let ended = match (self.status.success(), said_done) {
            (true, true) => return Ok(()),
            (true, false) => {
                let message = format!("plugin `{plugin}` ended without saying that it is done");
                let hint = "its last line must be `{\"event\":\"done\"}` or an `error` event";
                return Err(self.quote(message).with_hint(hint));
            }
            (false, true) => format!("plugin `{plugin}` said that it is done, but {}", self.how()),
            (false, false) => format!("plugin `{plugin}` {}", self.how()),
        };
        Err(self.hint(self.quote(ended)))
    }

    /// Whether a build ended as it should.
    pub(super) fn judge_build(&self) -> Result<()> {
        if self.status.success() {
            return Ok(());
        }
        let error = self.quote(format!("the build {}", self.how()));
        Err(self.hint(error))
    }

    fn how(&self) -> String {
        match (self.status.code(), self.status.signal()) {
            (Some(code), _) => format!("exited with code {code}"),
            (None, Some(signal)) => match signal_name(signal) {
                Some(name) => format!("was killed by signal {signal} ({name})"),
                None => format!("was killed by signal {signal}"),
            },
            (None, None) => "ended in an unknown way".to_owned(),
        }
    }

    fn quote(&self, message: String) -> Error {
        let said: Vec<&str> =
            self.last_errors.iter().map(|l| l.trim()).filter(|l| !l.is_empty()).collect();
        if said.is_empty() {
            return Error::new(message);
        }
        Error::new(format!("{message}; its last words:\n{}", said.join("\n")))
    }

    fn hint(&self, error: Error) -> Error {
        match (self.status.code(), self.status.signal()) {
            (Some(127), _) => error.with_hint("a program that it needs is not installed"),
            (Some(126), _) => error.with_hint("a program that it needs is not executable"),
            (_, Some(libc::SIGKILL)) => {
                error.with_hint("the system kills processes when memory runs out")
            }
            _ => error,
        }
    }
}

fn signal_name(signal: i32) -> Option<&'static str> {
    Some(match signal {
        libc::SIGHUP => "SIGHUP",
        libc::SIGINT => "SIGINT",
        libc::SIGILL => "SIGILL",
        libc::SIGABRT => "SIGABRT",
        libc::SIGBUS => "SIGBUS",
        libc::SIGFPE => "SIGFPE",
        libc::SIGKILL => "SIGKILL",
        libc::SIGSEGV => "SIGSEGV",
        libc::SIGPIPE => "SIGPIPE",
        libc::SIGTERM => "SIGTERM",
        libc::SIGXCPU => "SIGXCPU",
        libc::SIGXFSZ => "SIGXFSZ",
        _ => return None,
    })
}
