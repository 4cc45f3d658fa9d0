//! `vdisk run --count` and `vdisk boot --count`: many instances by one command.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use vdisk::instance::{parse_name, place};
use vdisk::{Error, ErrorKind, Result};

use super::again::Words;
use crate::cli::disk::clone::numbered;
use crate::cli::instance::start::{self, Keeping};
use crate::cli::terminal::{output, stop};

/// How many start at the same time, for each processor of the host: starting is waiting, mostly.
const FOR_EACH_PROCESSOR: usize = 4;

/// Starts `count` instances of this command line; prints their ids, in the order of their numbers.
pub fn run(keeping: &Keeping, count: u32) -> Result<u8> {
    let names = names(keeping, count)?;
    let own: Vec<OsString> = start::own_words().collect();
    let words = Words::of(&own).without("count").with("detach", None);
    let asked = stop::on_signals()?;
    let begin = |number: usize| {
        let name = names.as_ref().and_then(|names| names.get(number));
        match name {
            Some(name) => start::begin(&words.clone().with("name", Some(OsStr::new(name))).all()),
            None => start::begin(&words.all()),
        }
    };
    let done = in_parallel(count as usize, processors(), &|| asked.asked(), &begin);
    let ids = done.iter().flatten().filter_map(|one| one.as_ref().ok());
    output::text(&ids.map(|id| format!("{id}\n")).collect::<String>())?;
    tell(&done, names.as_deref())
}

/// What the instances are called, none of which may run; `None` where names are made up for them.
fn names(keeping: &Keeping, count: u32) -> Result<Option<Vec<String>>> {
    let Some(pattern) = &keeping.name else { return Ok(None) };
    let names = numbered(pattern, count)?;
    for name in &names {
        parse_name(name).map_err(|why| Error::invalid(format!("'{name}' {why}")))?;
    }
    let living = place::list()?.into_iter().filter(|record| record.lives());
    let living: HashSet<String> = living.map(|record| record.name).collect();
    match names.iter().find(|name| living.contains(*name)) {
        None => Ok(Some(names)),
        Some(taken) => {
            let text = format!("{taken} runs already, and none was started");
            Err(Error::new(ErrorKind::Exists, text))
        }
    }
}

/// How many are worked on at once.
pub fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from) * FOR_EACH_PROCESSOR
}

/// Does `work` for each number below `count`, at most `at_once` at the same time, in their order; begins no
/// more when one has failed, or when `stop` says so. What was not begun is `None`.
pub fn in_parallel<T: Send>(
    count: usize,
    at_once: usize,
    stop: &(dyn Fn() -> bool + Sync),
    work: &(dyn Fn(usize) -> Result<T> + Sync),
) -> Vec<Option<Result<T>>> {
    let results: Mutex<Vec<Option<Result<T>>>> = Mutex::new((0..count).map(|_| None).collect());
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for _ in 0..at_once.min(count) {
            scope.spawn(|| {
                while !failed.load(Ordering::SeqCst) && !stop() {
                    let number = next.fetch_add(1, Ordering::SeqCst);
                    if number >= count {
                        break;
                    }
                    let done = work(number);
                    failed.fetch_or(done.is_err(), Ordering::SeqCst);
                    let mut results = results.lock().unwrap_or_else(PoisonError::into_inner);
                    if let Some(place) = results.get_mut(number) {
                        *place = Some(done);
                    }
                }
            });
        }
    });
    results.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Says what did not start, and what runs all the same.
fn tell(done: &[Option<Result<String>>], names: Option<&[String]>) -> Result<u8> {
    let name = |number: usize| match names.and_then(|names| names.get(number)) {
        Some(name) => name.clone(),
        None => format!("number {number}"),
    };
    let count = |fits: &dyn Fn(&Option<Result<String>>) -> bool| {
        done.iter().filter(|one| fits(one)).count()
    };
    let run = count(&|one| matches!(one, Some(Ok(_))));
    if run == done.len() {
        return Ok(0);
    }
    let mut failed = done.iter().enumerate().filter_map(|(number, one)| match one {
        Some(Err(error)) => Some((number, error)),
        _ => None,
    });
    let first = failed.next();
    for (number, error) in failed {
        eprintln!("vdisk: {} did not start: {error}", name(number));
    }
    let rest = format!("{run} run, {} were not begun", count(&|one| one.is_none()));
    let kind = first.as_ref().map_or(ErrorKind::Interrupted, |(_, error)| error.kind());
    let text = match first {
        Some((number, error)) => format!("{} did not start: {error}. {rest}", name(number)),
        None => format!("interrupted: {rest}"),
    };
    Err(Error::new(kind, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_bounded_and_no_more_is_begun_when_one_has_failed() {
        let (now, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let work = |number: usize| {
            most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            std::thread::yield_now();
            now.fetch_sub(1, Ordering::SeqCst);
            if number == 20 { Err(Error::invalid("no")) } else { Ok(number) }
        };
        let done = in_parallel(100, 3, &|| false, &work);
        assert!(most.load(Ordering::SeqCst) <= 3);
        assert!(
            done[..20].iter().enumerate().all(|(n, one)| matches!(one, Some(Ok(m)) if *m == n))
        );
        assert!(matches!(done[20], Some(Err(_))));
        assert!(done[99].is_none() && done.len() == 100);
        assert!(in_parallel(9, 2, &|| true, &work).iter().all(Option::is_none));
    }
}
