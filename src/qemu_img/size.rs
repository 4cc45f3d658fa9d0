//! Sizes as QEMU reads and shows them.

use crate::qemu_img::fail::{Fail, Outcome, report};

/// Why a text is no size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bad {
    /// It is no number with a known suffix.
    Syntax,
    /// It is out of range.
    Range,
}

/// Parses bytes, `0x` and bytes, or a number with `b`, `k`, `M`, `G`, `T`, `P`, `E`.
pub fn parse(text: &str) -> Result<u64, Bad> {
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(Bad::Syntax);
        }
        return u64::from_str_radix(digits, 16).map_err(|_| Bad::Range);
    }
    if let Some(positive) = text.strip_prefix('-') {
        // A plain negative number is out of range; with a suffix it is not understood at all.
        let plain = !positive.is_empty() && positive.bytes().all(|b| b.is_ascii_digit());
        return Err(if plain { Bad::Range } else { Bad::Syntax });
    }
    let end = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let shift = match suffix {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        "e" | "E" => 60,
        _ => return Err(Bad::Syntax),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    if !digits(whole) || !digits(fraction) || whole.len() + fraction.len() == 0 {
        return Err(Bad::Syntax);
    }
    let whole: u128 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| Bad::Range)? };
    let whole = whole.checked_mul(1 << shift).ok_or(Bad::Range)?;
    let total = whole.checked_add(part(fraction, shift)?).ok_or(Bad::Range)?;
    u64::try_from(total).map_err(|_| Bad::Range)
}

/// The bytes of a fraction of a unit.
fn part(fraction: &str, shift: u32) -> Result<u128, Bad> {
    let significant = fraction.trim_end_matches('0');
    if significant.is_empty() {
        return Ok(0);
    }
    if shift == 0 {
        return Err(Bad::Syntax);
    }
    // More digits than this make no byte's difference.
    let kept = &significant[..significant.len().min(18)];
    let value: u128 = kept.parse().map_err(|_| Bad::Syntax)?;
    let scale = 10u128.pow(kept.len() as u32);
    Ok(((value << shift) + scale / 2) / scale)
}

/// Parses an operand or option that is called `name`, and tells the user what is wrong with it.
pub fn operand(name: &str, text: &str) -> Outcome<u64> {
    bounded(name, text, 0, i64::MAX as u64)
}

/// The same, with bounds.
pub fn bounded(name: &str, text: &str, min: u64, max: u64) -> Outcome<u64> {
    match parse(text) {
        Err(Bad::Syntax) => {
            report(format!(
                "Invalid {name} specified. You may use k, M, G, T, P or E suffixes for"
            ));
            report("kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes.");
            Err(Fail::silent(1))
        }
        Ok(size) if (min..=max).contains(&size) => Ok(size),
        _ => Err(Fail::new(format!("Invalid {name} specified. Must be between {min} and {max}."))),
    }
}

/// A size for people, with three digits at least where it has them.
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    // The unit changes at 1000 of the one below, so that three digits always do.
    let mut unit = 0;
    while unit + 1 < UNITS.len() && bytes as f64 >= 1000.0 * 1024f64.powi(unit as i32) {
        unit += 1;
    }
    let value = bytes as f64 / 1024f64.powi(unit as i32);
    format!("{} {}B", three_digits(value), UNITS[unit])
}

/// Three significant digits, without zeroes at the end of a fraction.
pub fn three_digits(value: f64) -> String {
    let digits = match value {
        v if v >= 99.95 => 0,
        v if v >= 9.995 => 1,
        v if v >= 0.9995 => 2,
        v if v > 0.0 => 3,
        _ => 0,
    };
    let text = format!("{value:.digits$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_qemu_reads_them() {
        assert_eq!(
            (parse("1024.0b"), parse("0.5k"), parse("1.5T")),
            (Ok(1024), Ok(512), Ok(3 << 39))
        );
        assert_eq!((parse("0x10"), parse("7E")), (Ok(16), Ok(7 << 60)));
        for bad in ["", "-1k", "1kilobyte", "foobar", "1.5", ".", "0x"] {
            assert_eq!(parse(bad), Err(Bad::Syntax), "{bad}");
        }
        assert_eq!((parse("-1024"), parse("16E")), (Err(Bad::Range), Err(Bad::Range)));
    }

    #[test]
    fn sizes_are_shown_with_three_digits() {
        let shown = [0, 512, 1536, 1339392, 67108864, 1638912, 1073741824, 1048064].map(human);
        let want = ["0 B", "512 B", "1.5 KiB", "1.28 MiB", "64 MiB", "1.56 MiB", "1 GiB", "1 MiB"];
        assert_eq!(shown, want);
    }
}
