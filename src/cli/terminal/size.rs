//! Sizes as qemu-img reads them, and as people read them.

/// Parses `20G`, `512M`, `64k`, `1.5T`, bytes, `0x` and bytes; suffixes are powers of 1024.
pub fn parse(text: &str) -> Result<u64, String> {
    let wrong = || format!("'{text}' is not a size: bytes, or a number with k, M, G, T, P or E");
    let bounded = |bytes: Option<u64>| {
        bytes.filter(|b| *b < 1 << 63).ok_or_else(|| format!("'{text}' is too large"))
    };
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(wrong());
        }
        return bounded(u64::from_str_radix(digits, 16).ok());
    }
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        "p" | "pib" => 50,
        "e" | "eib" => 60,
        _ => return Err(wrong()),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let is_number = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || !is_number(whole) || !is_number(fraction) || fraction.len() > 15 {
        return Err(wrong());
    }
    let whole: u64 = whole.parse().map_err(|_| wrong())?;
    let part: u128 = if fraction.is_empty() { 0 } else { fraction.parse().map_err(|_| wrong())? };
    let part = (part << shift) / 10u128.pow(fraction.len() as u32);
    let bytes = (u128::from(whole) << shift) + part;
    bounded(u64::try_from(bytes).ok())
}

/// A size for people: at most three digits before the unit.
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{bytes} B")
    } else if value < 10.0 && value.fract() != 0.0 {
        format!("{value:.1} {}", UNITS[unit])
    } else {
        format!("{value:.0} {}", UNITS[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_qemu_img_reads_them() {
        assert_eq!(parse("64K"), Ok(65536));
        assert_eq!(parse("1.5G"), Ok(3 << 29));
        assert_eq!(parse("512"), Ok(512));
        assert_eq!(parse("0x1F0"), Ok(496));
        for bad in
            ["", "G", "-1", "1x", "1..5", "9E9", "16E", "1.G5", "0x", "0x1G", "0xffffffffffffffff"]
        {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_are_shown_short() {
        assert_eq!([0, 1536, 65536, 20 << 30].map(human), ["0 B", "1.5 KiB", "64 KiB", "20 GiB"]);
    }
}
