//! Signals by name and number, as kill(1) takes them.

use nix::libc;
use nix::sys::signal::Signal;

/// The number of `TERM`, `SIGTERM`, `15`, `RTMIN+3`.
///
/// # Errors
/// What is wrong with the word.
pub fn parse(word: &str) -> Result<i32, String> {
    let wrong = || format!("{word:?} is no signal");
    if let Ok(number) = word.parse::<i32>() {
        return if (1..=libc::SIGRTMAX()).contains(&number) { Ok(number) } else { Err(wrong()) };
    }
    let upper = word.to_ascii_uppercase();
    let short = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(rest) = short.strip_prefix("RTMIN") {
        let more =
            if rest.is_empty() { Ok(0) } else { rest.trim_start_matches('+').parse::<i32>() };
        let number = more.ok().filter(|more| (0..=32).contains(more)).map(|n| libc::SIGRTMIN() + n);
        return number.filter(|number| *number <= libc::SIGRTMAX()).ok_or_else(wrong);
    }
    format!("SIG{short}").parse::<Signal>().map(|signal| signal as i32).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_has_many_names() {
        for word in ["TERM", "sigterm", "15"] {
            assert_eq!(parse(word), Ok(15));
        }
        assert_eq!(parse("SIGRTMIN+3"), Ok(libc::SIGRTMIN() + 3));
        for word in ["", "0", "65", "SIGFOO", "RTMIN+99", "RTMIN+x"] {
            assert!(parse(word).is_err(), "{word}");
        }
    }
}
