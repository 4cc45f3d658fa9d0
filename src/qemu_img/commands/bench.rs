//! `qemu-img bench`: many requests to an image, some at a time, and how long they take.

use std::io::{IoSlice, IoSliceMut, Write as _};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Instant;

use vdisk::block::BlockDevice;
use vdisk::chain::Chain;

use crate::qemu_img::fail::{Fail, Outcome, os_text, reason};
use crate::qemu_img::images::open;
use crate::qemu_img::images::usage::Use;
use crate::qemu_img::jail::Opens;
use crate::qemu_img::options::args::{self, Given, flag, long, long_value, value};
use crate::qemu_img::options::format::{FORMAT, IMAGE_OPTS, OBJECT, QUIET, SHARED};
use crate::qemu_img::size;

/// Requests, their depth and their size are counted in this.
const MAX: u64 = i32::MAX as u64;
/// The most threads that wait for requests: more at a time make no host faster.
const MAX_THREADS: u64 = 64;

/// What is measured.
struct Plan {
    count: u64,
    depth: u64,
    bytes: u64,
    offset: u64,
    step: u64,
    write: bool,
    pattern: u8,
    /// Flush after this many requests; 0 never does.
    flush: u64,
    /// Wait for all others before a flush.
    drain: bool,
}

pub fn run(args: &[String]) -> Outcome {
    let known = [
        FORMAT,
        value("c"),
        value("d"),
        value("i"),
        flag("n"),
        value("o"),
        QUIET,
        value("s"),
        value("S"),
        value("t"),
        flag("w"),
        SHARED,
        OBJECT,
        IMAGE_OPTS,
        long_value("pattern"),
        long_value("flush-interval"),
        long("no-drain"),
    ];
    let given = args::parse(args, &known)?;
    let plan = Plan::read(&given)?;
    check_io(&given)?;
    let name = given.only_name()?;
    if plan.flush > 0 && !plan.write {
        return Err(Fail::new("--flush-interval is only available in write tests"));
    }
    if plan.flush > 0 && plan.flush < plan.depth {
        return Err(Fail::new("Flush interval can't be smaller than depth"));
    }
    let failed = |why: &str| Fail::new(format!("Could not open '{name}': {why}"));
    if plan.write && given.has("U") {
        return Err(failed("force-share=on can only be used with read-only images"));
    }
    let direct = matches!(given.get("t"), Some("none" | "off" | "directsync"));
    if (given.has("n") || given.get("i") == Some("native")) && !direct {
        return Err(failed(
            "aio=native was specified, but it requires cache.direct=on, which was not specified.",
        ));
    }
    let using = if plan.write { Use::writing() } else { given.reading() };
    let source = given.source(name)?;
    let opens = Opens::new();
    if plan.write { opens.changed(&source) } else { opens.read(&source) }.close();
    let chain = open::chain(&source, using)?;
    println!(
        "Sending {} {} requests, {} bytes each, {} in parallel (starting at offset {}, step size {})",
        plan.count,
        if plan.write { "write" } else { "read" },
        plan.bytes,
        plan.depth,
        plan.offset,
        plan.step
    );
    if plan.flush > 0 {
        println!("Sending flush every {} requests", plan.flush);
    }
    let _ = std::io::stdout().flush();
    let begin = Instant::now();
    Bench::new(&chain, &plan).run()?;
    println!("Run completed in {:3.3} seconds.", begin.elapsed().as_secs_f64());
    Ok(0)
}

impl Plan {
    fn read(given: &Given) -> Outcome<Plan> {
        let number = |key: &str, name: &str, min, max, default| match given.get(key) {
            Some(text) => number(name, text, min, max),
            None => Ok(default),
        };
        let size = |key: &str, name: &str, min, max| {
            given.get(key).map(|text| size::bounded(name, text, min, max)).transpose()
        };
        let bytes = size("s", "buffer size", 1, MAX)?.unwrap_or(4096);
        let step = size("S", "step size", 0, MAX)?.filter(|step| *step > 0);
        Ok(Plan {
            count: number("c", "request count", 1, MAX, 75_000)?,
            depth: number("d", "queue depth", 1, MAX, 64)?,
            bytes,
            offset: size("o", "offset", 0, i64::MAX as u64)?.unwrap_or(0),
            step: step.unwrap_or(bytes),
            write: given.has("w"),
            pattern: number("pattern", "pattern byte", 0, 255, 0)? as u8,
            flush: number("flush-interval", "flush interval", 0, MAX, 0)?,
            drain: !given.has("no-drain"),
        })
    }
}

/// A number without suffix.
fn number(name: &str, text: &str, min: u64, max: u64) -> Outcome<u64> {
    let bad = || Fail::new(format!("Invalid {name} specified: '{text}'."));
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => i128::from_str_radix(digits, 16),
        None => text.parse::<i128>(),
    };
    let number = parsed.map_err(|_| bad())?;
    u64::try_from(number).ok().filter(|n| (min..=max).contains(n)).ok_or_else(|| {
        Fail::new(format!("Invalid {name} specified. Must be between {min} and {max}."))
    })
}

/// How the host's files are read is the engine's own choice; what is asked for must exist.
fn check_io(given: &Given) -> Outcome<()> {
    if let Some(other) = given.get("i").filter(|i| !matches!(*i, "native" | "threads" | "io_uring"))
    {
        return Err(Fail::new(format!("Invalid aio option: {other}")));
    }
    given.check_cache("t", "cache").map_err(|_| Fail::new("Invalid cache mode"))
}

/// How far it is.
struct State {
    /// Requests that nobody has begun.
    left: u64,
    offset: u64,
    /// Requests that are under way.
    running: u64,
    /// The queue is to be empty before more is begun.
    draining: bool,
    failed: Option<Fail>,
}

struct Bench<'a> {
    chain: &'a Chain,
    plan: &'a Plan,
    size: u64,
    state: Mutex<State>,
    changed: Condvar,
}

impl<'a> Bench<'a> {
    fn new(chain: &'a Chain, plan: &'a Plan) -> Bench<'a> {
        let state = State {
            left: plan.count,
            offset: plan.offset,
            running: 0,
            draining: false,
            failed: None,
        };
        let changed = Condvar::new();
        Bench { chain, plan, size: chain.size(), state: Mutex::new(state), changed }
    }

    fn run(self) -> Outcome<()> {
        let threads = self.plan.depth.min(self.plan.count).min(MAX_THREADS);
        std::thread::scope(|scope| {
            (1..threads).for_each(|_| drop(scope.spawn(|| self.work())));
            self.work();
        });
        let state = self.state.into_inner().unwrap_or_else(|e| e.into_inner());
        state.failed.map_or(Ok(()), Err)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// One thread's work; it ends where any thread fails.
    fn work(&self) {
        let mut buf = vec![self.plan.pattern; self.plan.bytes as usize];
        while let Some((offset, flushes)) = self.take() {
            let mut done = self.request(offset, &mut buf);
            if flushes && done.is_ok() {
                done = self.flush();
            }
            let mut state = self.state();
            state.running -= 1;
            if flushes {
                state.draining = false;
            }
            if let Err(e) = done {
                state.failed.get_or_insert(e);
            }
            drop(state);
            self.changed.notify_all();
        }
    }

    /// The next request's offset, and whether a flush follows it.
    fn take(&self) -> Option<(u64, bool)> {
        let mut state = self.state();
        while state.draining && state.failed.is_none() {
            state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner());
        }
        if state.left == 0 || state.failed.is_some() {
            return None;
        }
        let offset = state.offset;
        state.offset = offset.wrapping_add(self.plan.step).checked_rem(self.size).unwrap_or(0);
        state.left -= 1;
        state.running += 1;
        let flushes = self.plan.flush > 0 && state.left.is_multiple_of(self.plan.flush);
        state.draining = flushes && self.plan.drain;
        Some((offset, flushes))
    }

    fn request(&self, offset: u64, buf: &mut [u8]) -> Outcome<()> {
        let inside = offset.checked_add(self.plan.bytes).is_some_and(|end| end <= self.size);
        if !inside {
            return Err(failed(&os_text(nix::libc::EIO)));
        }
        let done = match self.plan.write {
            true => self.chain.write_at(offset, &[IoSlice::new(buf)]),
            false => self.chain.read_at(offset, &mut [IoSliceMut::new(buf)]),
        };
        done.map_err(|e| failed(&reason(&e)))
    }

    /// Flushes, behind all others where they are to be waited for.
    fn flush(&self) -> Outcome<()> {
        if self.plan.drain {
            let mut state = self.state();
            while state.running > 1 && state.failed.is_none() {
                state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner());
            }
        }
        self.chain.flush().map_err(|e| Fail::new(format!("Failed flush: {}", reason(&e))))
    }
}

fn failed(why: &str) -> Fail {
    Fail::new(format!("Failed request: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_no_suffix_and_bounds() {
        assert_eq!(number("n", "0x10", 1, 20).unwrap(), 16);
        assert_eq!(number("n", "1k", 1, 20).unwrap_err().text(), "Invalid n specified: '1k'.");
        for out in ["0", "21", "-1"] {
            let text = "Invalid n specified. Must be between 1 and 20.";
            assert_eq!(number("n", out, 1, 20).unwrap_err().text(), text);
        }
    }
}
