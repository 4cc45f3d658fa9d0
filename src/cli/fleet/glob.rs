//! Patterns of names, as a shell has them: `*`, `?`, `[a-z]` and `[!a-z]`.

/// Whether a name fits a pattern. A bracket that is not closed means itself.
pub fn fits(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) =
        (pattern.chars().collect(), name.chars().collect());
    let (mut at, mut of) = (0, 0);
    // Where the last star stands, and which part of the name it stands for: it may stand for more.
    let mut star: Option<(usize, usize)> = None;
    while let Some(&c) = name.get(of) {
        let one = match pattern.get(at) {
            Some('*') => {
                star = Some((at, of));
                at += 1;
                continue;
            }
            Some('?') => Some(1),
            Some('[') => in_brackets(pattern.get(at..).unwrap_or_default(), c),
            Some(&own) => (own == c).then_some(1),
            None => None,
        };
        match (one, star) {
            (Some(len), _) => (at, of) = (at + len, of + 1),
            (None, Some((place, from))) => {
                (at, of) = (place + 1, from + 1);
                star = Some((place, from + 1));
            }
            (None, None) => return false,
        }
    }
    pattern.get(at..).unwrap_or_default().iter().all(|c| *c == '*')
}

/// How long the brackets are that `pattern` begins with, where `c` is one of those in them.
fn in_brackets(pattern: &[char], c: char) -> Option<usize> {
    let not = matches!(pattern.get(1), Some('!' | '^'));
    let from = if not { 2 } else { 1 };
    // One that comes first is no end.
    let end = pattern.iter().skip(from + 1).position(|c| *c == ']').map(|end| end + from + 1);
    let Some(end) = end else { return (c == '[').then_some(1) };
    let set = pattern.get(from..end).unwrap_or_default();
    let (mut at, mut found) = (0, false);
    while let Some(&low) = set.get(at) {
        match (set.get(at + 1), set.get(at + 2)) {
            (Some('-'), Some(&high)) => {
                found |= (low..=high).contains(&c);
                at += 3;
            }
            _ => {
                found |= low == c;
                at += 1;
            }
        }
    }
    (found != not).then_some(end + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_patterns_as_in_a_shell() {
        for (pattern, name) in [
            ("web", "web"),
            ("web-*", "web-0001"),
            ("*", ""),
            ("*1", "web-1-1"),
            ("w*-*2", "web-12"),
            ("web-?", "web-1"),
            ("web-[0-3]", "web-2"),
            ("web-[!0-3]", "web-7"),
            ("[]x]", "]"),
            ("[a-", "[a-"),
        ] {
            assert!(fits(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in [
            ("web", "web-1"),
            ("web-*", "wob-1"),
            ("web-?", "web-"),
            ("web-[0-3]", "web-4"),
            ("web-[!0-3]", "web-2"),
            ("*a*b", "xbxa"),
            ("", "x"),
        ] {
            assert!(!fits(pattern, name), "{pattern} {name}");
        }
    }
}
