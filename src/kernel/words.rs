//! GRUB's configuration as words and ends of commands: quotes, comments, continued lines.
//!
//! It knows how the script is written, not what any word means.

/// A piece of a script.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Token {
    /// A word, its quotes taken off; variables in it are as they were written.
    Word(String),
    /// The end of a command: a line's end or `;`.
    End,
    /// `{` as a word of its own.
    Open,
    /// `}` as a word of its own.
    Close,
}

/// Splits a script.
pub fn split(text: &str) -> Vec<Token> {
    let mut tokens = Vec::new();
    let mut word: Option<String> = None;
    let mut quoted = false;
    let mut chars = text.chars().peekable();
    let finish = |word: &mut Option<String>, quoted: &mut bool, tokens: &mut Vec<Token>| {
        if let Some(word) = word.take() {
            tokens.push(match (word.as_str(), *quoted) {
                ("{", false) => Token::Open,
                ("}", false) => Token::Close,
                _ => Token::Word(word),
            });
        }
        *quoted = false;
    };
    while let Some(c) = chars.next() {
        match c {
            '\n' | ';' => {
                finish(&mut word, &mut quoted, &mut tokens);
                tokens.push(Token::End);
            }
            c if c.is_whitespace() => finish(&mut word, &mut quoted, &mut tokens),
            '#' if word.is_none() => while chars.next_if(|c| *c != '\n').is_some() {},
            '\'' => {
                quoted = true;
                let word = word.get_or_insert_default();
                word.extend(chars.by_ref().take_while(|c| *c != '\''));
            }
            '"' => {
                quoted = true;
                double(&mut chars, word.get_or_insert_default());
            }
            '\\' => match chars.next() {
                Some('\n') | None => {}
                Some(c) => word.get_or_insert_default().push(c),
            },
            c => word.get_or_insert_default().push(c),
        }
    }
    finish(&mut word, &mut quoted, &mut tokens);
    tokens
}

/// What stands to the next double quote.
fn double(chars: &mut std::iter::Peekable<std::str::Chars<'_>>, word: &mut String) {
    while let Some(c) = chars.next() {
        match c {
            '"' => return,
            '\\' => match chars.next() {
                Some(c @ ('"' | '\\' | '$')) => word.push(c),
                Some('\n') | None => {}
                Some(c) => word.extend(['\\', c]),
            },
            c => word.push(c),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_is_split_as_grub_splits_it() {
        let word = |text: &str| Token::Word(text.into());
        let text =
            "menuentry 'a \"b' --x \"c \\\"d\" {\n\tlinux /v root='x'y # no\n} ; set a=\"{\"\\\n b";
        let expected = [
            word("menuentry"),
            word("a \"b"),
            word("--x"),
            word("c \"d"),
            Token::Open,
            Token::End,
            word("linux"),
            word("/v"),
            word("root=xy"),
            Token::End,
            Token::Close,
            Token::End,
            word("set"),
            word("a={"),
            word("b"),
        ];
        assert_eq!(split(text), expected);
        assert_eq!(split("'{' \"open"), [word("{"), word("open")]);
        assert!(split("# only").is_empty());
    }
}
