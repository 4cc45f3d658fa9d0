//! The process that looks after an instance: it starts what runs, again where that is wanted, passes on
//! what is asked of it, keeps its log and writes down how it is.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind as IoErrorKind, PipeWriter, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::link::{SOCKET, Said, Switches, Wish, Wished, obey, say};
use super::log::{self, Log};
use super::place::{self, Claim};
use super::record::{Phase, Policy, Record, now};
use super::serve::Orders;
use crate::control::Server;
use crate::error::{Error, ErrorKind, Result};

/// Between the first end and the first restart; doubled with each that follows soon.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// The longest time between an end and a restart.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// What has run for so long has not ended soon.
const LONG: Duration = Duration::from_secs(10);
/// How long the last words of what has ended may take to reach the log.
const TO_LOG: Duration = Duration::from_secs(2);
/// How long an answer to a wish may take.
const TO_OBEY: Duration = Duration::from_secs(40);
/// The longest line on the link, in bytes.
const LONGEST: usize = 64 << 10;
/// sigaction(2): who sent a signal was the kernel, for a terminal.
const BY_TERMINAL: i32 = 0x80;

/// How an instance is run.
pub struct Plan<'a> {
    /// The program that runs it, told of the instance's directory.
    pub command: &'a dyn Fn(&Path) -> Command,
    /// The size of its log, where it has one.
    pub log: Option<u64>,
    /// Whether it has run before: then its record stays, also where it does not start.
    pub again: bool,
    /// Called when it runs for the first time.
    pub ready: &'a mut dyn FnMut(&Record) -> Result<()>,
    /// Called when it has ended, before anybody hears of that; and whether it ever ran.
    pub ended: &'a mut dyn FnMut(&Record, bool) -> Result<()>,
}

/// How an instance ended.
pub struct Outcome {
    /// The exit status of what ran last.
    pub status: u8,
    /// Whether it ever ran.
    pub ran: bool,
    /// The log of what never ran.
    pub last_words: Vec<u8>,
}

/// Looks after an instance to its end. To be called while the process has one thread. Its record stays
/// and says how it ended, unless it never ran or is to be removed.
///
/// # Errors
/// Where it cannot be looked after. That it does not start is an [`Outcome`].
pub fn keep(claim: Claim, plan: Plan<'_>) -> Result<Outcome> {
    let mut mask = SigSet::empty();
    mask.extend(PASSED_ON);
    mask.thread_block().map_err(|e| Error::io("cannot hold signals back", e.into()))?;
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    let signals = SignalFd::with_flags(&mask, flags)
        .map_err(|e| Error::io("cannot wait for signals", e.into()))?;
    let dir = claim.dir().to_owned();
    let failed = |e| Error::io("cannot look after the instance", e).at_path(&dir);
    // An earlier keeper's.
    let _ = std::fs::remove_file(dir.join(SOCKET));
    let listener = UnixListener::bind(dir.join(SOCKET)).map_err(failed)?;
    let logged_before = log::len(&dir);
    let (log, logged) = match plan.log {
        Some(size) => {
            keep_log(&dir, size).map(|(log, logged)| (Some(log), Some(logged))).map_err(failed)?
        }
        None => (None, None),
    };
    let name = place::socket(claim.record());
    let shared = Arc::new(Shared::of(claim, None));
    let server = Server::listen(&name, Arc::new(Orders(Arc::clone(&shared))))?;
    let mut keeper = Keeper { plan, shared, signals, listener, log, ran: false };
    let status = keeper.all_turns();
    let Keeper { plan, shared, log, ran, .. } = keeper;
    drop(log);
    if let Some(logged) = logged {
        // Somebody who lives on may hold the other end.
        let _ = logged.recv_timeout(TO_LOG);
    }
    let status = status?;
    let last_words = match ran {
        true => Vec::new(),
        false => log::all(&dir).into_iter().skip(logged_before).collect(),
    };
    (plan.ended)(&shared.record(), ran)?;
    shared.finish(status, ran || plan.again)?;
    server.end(&Ok(()));
    Ok(Outcome { status, ran, last_words })
}

const PASSED_ON: [Signal; 6] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
];

/// A thread that keeps what comes out of the pipe, and its word when there is no more.
fn keep_log(dir: &Path, size: u64) -> io::Result<(PipeWriter, Receiver<()>)> {
    let (from, to) = io::pipe()?;
    let log = Log::open(dir, size)?;
    let (done, logged) = sync_channel(1);
    let work = move || {
        log.fill(from);
        let _ = done.send(());
    };
    std::thread::Builder::new().name("log".into()).spawn(work)?;
    Ok((to, logged))
}

/// What the threads of a keeper share.
pub(super) struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// To what runs.
pub(super) enum Way {
    /// By a link to the process that runs it.
    Link(UnixStream),
    /// It is this process.
    Here(Arc<dyn Switches>),
}

struct State {
    claim: Option<Claim>,
    record: Record,
    /// To what runs, while it does.
    way: Option<Way>,
    /// Wishes so far, and what became of those that are answered.
    wishes: u64,
    answers: BTreeMap<u64, Option<String>>,
    /// Whether it is not to be started again.
    stopping: bool,
    /// How it ended, for good.
    over: Option<u8>,
}

impl State {
    fn new(claim: Claim, way: Option<Way>) -> State {
        State {
            record: claim.record().clone(),
            claim: Some(claim),
            way,
            wishes: 0,
            answers: BTreeMap::new(),
            stopping: false,
            over: None,
        }
    }

    fn note(&mut self, change: impl Fn(&mut Record)) -> Result<()> {
        change(&mut self.record);
        self.claim.as_mut().map_or(Ok(()), |claim| claim.note(change))
    }
}

impl Shared {
    pub(super) fn of(claim: Claim, way: Option<Way>) -> Shared {
        Shared { state: Mutex::new(State::new(claim, way)), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn record(&self) -> Record {
        self.lock().record.clone()
    }

    /// Keeps it from being started again.
    pub(super) fn no_more(&self) {
        self.lock().stopping = true;
        self.changed.notify_all();
    }

    /// Writes down something of it.
    pub(super) fn note(&self, change: impl Fn(&mut Record)) -> Result<()> {
        self.lock().note(change)
    }

    /// Writes down whether who stops it is about to start it again.
    pub(super) fn note_again(&self, again: bool) -> Result<()> {
        self.note(|record| record.again = again)
    }

    /// Writes down whether it stands still.
    pub(super) fn note_paused(&self, paused: bool) -> Result<()> {
        let phase = if paused { Phase::Paused } else { Phase::Running };
        self.note(|record| record.phase = phase)
    }

    /// How it ended, if it does so within this time.
    pub(super) fn over_within(&self, time: Duration) -> Option<u8> {
        let state = self.lock();
        let waited = self.changed.wait_timeout_while(state, time, |state| state.over.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.over
    }

    /// Has what runs do something, and waits until it is done.
    pub(super) fn wish(&self, wish: Wish) -> Result<()> {
        let mut state = self.lock();
        let not_there = || Error::new(ErrorKind::NotFound, "it does not run");
        state.wishes += 1;
        let id = state.wishes;
        match &state.way {
            None => return Err(not_there()),
            Some(Way::Here(switches)) => {
                let switches = Arc::clone(switches);
                drop(state);
                return obey(&*switches, wish);
            }
            Some(Way::Link(link)) => say(link, &Wished { id, wish }).map_err(|_| not_there())?,
        }
        let until = Instant::now() + TO_OBEY;
        loop {
            if let Some(failed) = state.answers.remove(&id) {
                return failed.map_or(Ok(()), |why| Err(Error::new(ErrorKind::Io, why)));
            }
            let left = until.saturating_duration_since(Instant::now());
            if state.way.is_none() {
                return Err(not_there());
            }
            if left.is_zero() {
                return Err(Error::new(ErrorKind::InUse, "what runs there does not answer"));
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    pub(super) fn finish(&self, status: u8, stays: bool) -> Result<()> {
        let mut state = self.lock();
        state.note(|record| record.phase = Phase::Exited)?;
        if (state.record.goes() || !stays)
            && let Some(claim) = state.claim.take()
        {
            claim.forget()?;
        }
        state.over = Some(status);
        self.changed.notify_all();
        Ok(())
    }
}

struct Keeper<'a> {
    plan: Plan<'a>,
    shared: Arc<Shared>,
    signals: SignalFd,
    listener: UnixListener,
    log: Option<PipeWriter>,
    ran: bool,
}

impl Keeper<'_> {
    /// Runs it until it is not to be started again; its last exit status.
    fn all_turns(&mut self) -> Result<u8> {
        let mut pause = FIRST_PAUSE;
        loop {
            let since = Instant::now();
            let status = self.turn().map_err(|e| Error::io("lost what ran", e))?;
            let policy = {
                let mut state = self.shared.lock();
                let stopping = state.stopping || !self.ran;
                state.note(|record| {
                    record.phase = Phase::Waiting;
                    (record.turn, record.ended) = (None, Some(now()));
                    record.status = Some(status);
                })?;
                if stopping { Policy::No } else { state.record.restart }
            };
            match policy {
                Policy::No => return Ok(status),
                Policy::OnFailure if status == 0 => return Ok(status),
                Policy::OnFailure | Policy::Always => {}
            }
            if since.elapsed() >= LONG {
                pause = FIRST_PAUSE;
            }
            if self.wait_for_restart(pause)? {
                return Ok(status);
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
            self.shared
                .lock()
                .note(|record| record.restarts = record.restarts.saturating_add(1))?;
        }
    }

    /// Whether it is to be stopped in that time.
    fn wait_for_restart(&self, time: Duration) -> Result<bool> {
        let until = Instant::now() + time;
        while Instant::now() < until {
            while let Ok(Some(_)) = self.signals.read_signal() {
                self.shared.no_more();
            }
            let state = self.shared.lock();
            let beat = Duration::from_millis(50).min(time);
            let waited = self.shared.changed.wait_timeout_while(state, beat, |s| !s.stopping);
            if waited.unwrap_or_else(PoisonError::into_inner).0.stopping {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Starts it and waits for its end.
    fn turn(&mut self) -> io::Result<u8> {
        let mut child = self.start()?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or(IoErrorKind::InvalidData)?;
        let end = pidfd_open(pid, PidfdFlags::empty())?;
        let noted = self.shared.lock().note(|record| {
            record.phase = Phase::Starting;
            record.turn = Some(child.id());
            record.started = Some(now());
        });
        let watched = noted.map_err(io::Error::other).and_then(|()| self.watch(&end, &child));
        self.shared.lock().way = None;
        self.shared.changed.notify_all();
        if watched.is_err() {
            // It sees that its link is gone.
            let _ = child.kill();
        }
        let ended = child.wait()?;
        watched?;
        Ok(status(ended))
    }

    fn start(&self) -> io::Result<Child> {
        let dir = place::of(&self.shared.record()).map_err(io::Error::other)?;
        let mut command = (self.plan.command)(&dir);
        if let Some(log) = &self.log {
            let output = || log.try_clone().map(|log| Stdio::from(OwnedFd::from(log)));
            command.stdin(Stdio::null()).stdout(output()?).stderr(output()?);
        }
        command.spawn()
    }

    fn watch(&mut self, end: &OwnedFd, child: &Child) -> io::Result<()> {
        let mut heard = Vec::new();
        let mut link: Option<UnixStream> = None;
        loop {
            let fds = [
                Some(end.as_fd()),
                Some(self.signals.as_fd()),
                link.is_none().then(|| self.listener.as_fd()),
                link.as_ref().map(AsFd::as_fd),
            ];
            let mut polled: Vec<_> =
                fds.iter().flatten().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
            match poll(&mut polled, PollTimeout::NONE) {
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            let mut ready = polled.iter().map(|fd| fd.any().unwrap_or(false));
            let [over, signal, caller, word] =
                fds.map(|fd| fd.is_some() && ready.next().unwrap_or(false));
            if caller {
                link = self.welcome(child)?;
            } else if word && let Some(stream) = &mut link {
                let mut buffer = [0; 4096];
                match stream.read(&mut buffer) {
                    Ok(0) | Err(_) if !over => std::thread::sleep(FIRST_PAUSE),
                    Ok(length) => heard.extend_from_slice(buffer.get(..length).unwrap_or_default()),
                    Err(_) => {}
                }
                self.hear(&mut heard)?;
            }
            if over && !word && !caller {
                return Ok(());
            }
            if over && word && link.as_ref().is_none_or(is_at_end) {
                return Ok(());
            }
            if signal {
                self.pass_on(child)?;
            }
        }
    }

    /// Who calls is what was started, or is sent away.
    fn welcome(&self, child: &Child) -> io::Result<Option<UnixStream>> {
        let (stream, _) = self.listener.accept()?;
        let peer = getsockopt(&stream, PeerCredentials)?.pid();
        if u32::try_from(peer).ok() != Some(child.id()) {
            return Ok(None);
        }
        self.shared.lock().way = Some(Way::Link(stream.try_clone()?));
        self.shared.changed.notify_all();
        Ok(Some(stream))
    }

    /// Takes the whole lines of what was heard.
    fn hear(&mut self, heard: &mut Vec<u8>) -> io::Result<()> {
        while let Some(end) = heard.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = heard.drain(..=end).collect();
            match serde_json::from_slice(&line)? {
                Said::Started => {
                    let mut state = self.shared.lock();
                    let stopping = state.stopping;
                    let runs = |record: &mut Record| {
                        record.phase = Phase::Running;
                        record.again &= stopping;
                    };
                    state.note(runs).map_err(io::Error::other)?;
                    let record = state.record.clone();
                    drop(state);
                    if !std::mem::replace(&mut self.ran, true) {
                        (self.plan.ready)(&record).map_err(io::Error::other)?;
                    }
                }
                Said::Done { id, failed } => {
                    self.shared.lock().answers.insert(id, failed);
                }
            }
            self.shared.changed.notify_all();
        }
        if heard.len() > LONGEST {
            return Err(IoErrorKind::InvalidData.into());
        }
        Ok(())
    }

    /// Does with signals what they would do to the instance, were it this process.
    fn pass_on(&self, child: &Child) -> io::Result<()> {
        while let Some(received) = self.signals.read_signal()? {
            let number = i32::try_from(received.ssi_signo).unwrap_or_default();
            let user = [Signal::SIGUSR1, Signal::SIGUSR2].iter().any(|s| *s as i32 == number);
            if !user {
                self.shared.no_more();
            }
            if received.ssi_code == BY_TERMINAL {
                // What runs is in the same group, and has got it, too.
                continue;
            }
            let wish = if number == Signal::SIGTERM as i32 {
                Wish::Ask { signal: self.shared.record().stop_signal }
            } else {
                Wish::Signal { number }
            };
            let mut state = self.shared.lock();
            state.wishes += 1;
            let id = state.wishes;
            let told = match &state.way {
                Some(Way::Link(link)) => {
                    let _ = say(link, &Wished { id, wish });
                    true
                }
                _ => false,
            };
            if !told && !user {
                terminate(child.id());
            }
        }
        Ok(())
    }
}

/// Ends a process that cannot be spoken with yet.
pub(super) fn terminate(pid: u32) {
    send(pid, Signal::SIGTERM);
}

/// Sends a signal to a process that this one has started and not waited for.
pub(super) fn send(pid: u32, signal: Signal) {
    if let Ok(pid) = i32::try_from(pid) {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal);
    }
}

/// Whether nothing more is to be heard.
fn is_at_end(stream: &UnixStream) -> bool {
    use nix::sys::socket::{MsgFlags, recv};
    use std::os::fd::AsRawFd;
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    !matches!(recv(stream.as_raw_fd(), &mut [0], flags), Ok(1..))
}

/// As a shell says it.
fn status(ended: ExitStatus) -> u8 {
    let code = ended.code().or_else(|| Some(128 + ended.signal()?));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}
