//! Sizes as qemu-img reads them, and as people read them.

/// Parses `20G`, `512M`, `64k`, `1.5T`, bytes; suffixes are powers of 1024.
pub fn parse(text: &str) -> Result<u64, String> {
    let wrong = || format!("'{text}' is not a size: bytes, or a number with k, M, G, T, P or E");
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
    u64::try_from(bytes)
        .ok()
        .filter(|b| *b < 1 << 63)
        .ok_or_else(|| format!("'{text}' is too large"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_qemu_img_reads_them() {
        assert_eq!(parse("64K"), Ok(65536));
        assert_eq!(parse("1.5G"), Ok(3 << 29));
        assert_eq!(parse("512"), Ok(512));
        for bad in ["", "G", "-1", "1x", "1..5", "9E9", "16E", "1.G5"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
