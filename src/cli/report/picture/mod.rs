//! Trees and maps as pictures: lines for a terminal, DOT for graphviz, SVG for everything else.
//!
//! Names come from disks and directories that may be hostile: each writer escapes them for its own
//! language. Pictures are bounded, whatever the size of what they show.

pub mod dot;
pub mod map;
pub mod rows;
pub mod svg;
pub mod tree;

/// A text without what would act on a terminal or break a line.
pub fn plain(text: &str) -> String {
    let odd = |c: char| {
        c.is_control()
            || matches!(c, '\u{200e}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    text.chars().map(|c| if odd(c) { '\u{fffd}' } else { c }).collect()
}

/// At most `most` characters of a text, with a mark where it was cut.
pub fn short(text: &str, most: usize) -> String {
    let mut chars = text.chars();
    let mut cut: String = chars.by_ref().take(most).collect();
    if chars.next().is_some() {
        cut.pop();
        cut.push('…');
    }
    cut
}
