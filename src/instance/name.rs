//! What instances are called.

/// The longest name, in bytes.
const LONGEST: usize = 64;

/// Checks a name: letters, digits, `-`, `_` and `.`, a letter or digit first.
///
/// # Errors
/// What is wrong with it.
pub fn parse(text: &str) -> Result<String, String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let starts = text.starts_with(|c: char| c.is_ascii_alphanumeric());
    if starts && text.len() <= LONGEST && text.chars().all(fits) {
        Ok(text.to_owned())
    } else {
        Err("must be at most 64 letters, digits, '-', '_' and '.', a letter or digit first".into())
    }
}

/// A name for what has none: after its disk or image, with some of its id.
pub(super) fn made(from: &str, id: &str) -> String {
    let fits = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    let stem: String = from.chars().map(fits).take(40).collect();
    let stem = match stem.trim_matches('-') {
        "" => "instance",
        stem => stem,
    };
    format!("{stem}-{}", id.get(..6).unwrap_or(id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_a_file_name_and_a_word() {
        assert!(parse("web-1.a_b").is_ok());
        for bad in ["", ".a", "-a", "a/b", "a b", &"a".repeat(65)] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        assert_eq!(made("debian:12", "abcdef012345"), "debian-12-abcdef");
        assert_eq!(made("...", "abcdef012345"), "instance-abcdef");
    }
}
