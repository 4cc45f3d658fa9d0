//! The order of versions, by the UAPI group's "Version Format Specification": what `strverscmp` does
//! with numbers, and what distributions mean by `~`, `^` and `-`.
//!
//! It knows text and nothing of kernels.

use std::cmp::Ordering;

/// Compares two versions, the newer one is the greater.
pub fn compare(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.as_bytes(), b.as_bytes());
    loop {
        (a, b) = (skip(a), skip(b));
        if let Some(order) = separated(&mut a, &mut b, b'~') {
            return order;
        }
        if a.is_empty() || b.is_empty() {
            return b.is_empty().cmp(&a.is_empty());
        }
        for separator in [b'-', b'^', b'.'] {
            if let Some(order) = separated(&mut a, &mut b, separator) {
                return order;
            }
        }
        let (order, rest_a, rest_b) = piece(a, b);
        if order != Ordering::Equal {
            return order;
        }
        (a, b) = (rest_a, rest_b);
    }
}

/// A version that goes on with a separator where the other does not is the older; where both do, it is
/// taken off.
fn separated(a: &mut &[u8], b: &mut &[u8], separator: u8) -> Option<Ordering> {
    match (a.strip_prefix(&[separator]), b.strip_prefix(&[separator])) {
        (Some(rest_a), Some(rest_b)) => {
            (*a, *b) = (rest_a, rest_b);
            None
        }
        (Some(_), None) => Some(Ordering::Less),
        (None, Some(_)) => Some(Ordering::Greater),
        (None, None) => None,
    }
}

/// Leaves out what no version is made of.
fn skip(text: &[u8]) -> &[u8] {
    let made = |byte: &u8| byte.is_ascii_alphanumeric() || b"~-^.".contains(byte);
    let start = text.iter().position(made).unwrap_or(text.len());
    &text[start..]
}

/// Compares the numbers at the front, or the letters, and gives what follows them.
fn piece<'t>(a: &'t [u8], b: &'t [u8]) -> (Ordering, &'t [u8], &'t [u8]) {
    let digits = |byte: &u8| byte.is_ascii_digit();
    let letters = |byte: &u8| byte.is_ascii_alphabetic();
    if a.first().is_some_and(digits) || b.first().is_some_and(digits) {
        let ((a, rest_a), (b, rest_b)) = (front(a, digits), front(b, digits));
        let (a, b) = (number(a), number(b));
        return (a.len().cmp(&b.len()).then(a.cmp(b)), rest_a, rest_b);
    }
    let ((a, rest_a), (b, rest_b)) = (front(a, letters), front(b, letters));
    (a.cmp(b), rest_a, rest_b)
}

fn front(text: &[u8], belongs: impl Fn(&u8) -> bool) -> (&[u8], &[u8]) {
    text.split_at(text.iter().position(|byte| !belongs(byte)).unwrap_or(text.len()))
}

/// A number without its leading zeroes.
fn number(digits: &[u8]) -> &[u8] {
    &digits[digits.iter().position(|byte| *byte != b'0').unwrap_or(digits.len())..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_stand_in_the_order_of_their_releases() {
        let rising = [
            "0-rescue-0123456789abcdef",
            "4.9.0-19-amd64",
            "4.19.0-9-amd64",
            "4.19.0-17-amd64",
            "5.14.0~rc2",
            "5.14.0",
            "5.14.0-70.el9.x86_64",
            "5.14.0-162.6.1.el9_1.x86_64",
            "6.1.0-9-cloud-amd64",
            "6.1.0-37-cloud-amd64",
            "6.8.0-31-generic",
            "6.10.3-0-virt",
        ];
        for (place, lower) in rising.iter().enumerate() {
            assert_eq!(compare(lower, lower), Ordering::Equal);
            for higher in &rising[place + 1..] {
                assert_eq!(compare(lower, higher), Ordering::Less, "{lower} {higher}");
                assert_eq!(compare(higher, lower), Ordering::Greater, "{lower} {higher}");
            }
        }
    }

    proptest::proptest! {
        #[test]
        fn any_two_texts_have_an_order_and_its_opposite(a in "[0-9a-c~^. _-]{0,9}", b in "[0-9a-c~^. _-]{0,9}") {
            assert_eq!(compare(&a, &b), compare(&b, &a).reverse());
        }
    }
}
