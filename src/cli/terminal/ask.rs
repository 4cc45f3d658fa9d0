//! Asking before something is lost.

use std::io::{IsTerminal, Write};

use vdisk::{Error, ErrorKind, Result};

/// Goes on if the user agrees to lose what `loss` says: by `--yes`, or by an answer on a terminal.
pub fn confirm(loss: &str, yes: bool) -> Result<()> {
    if yes {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() {
        let message = format!("{loss}. Nothing was done: say --yes if that is meant");
        return Err(Error::new(ErrorKind::Interrupted, message));
    }
    eprint!("{loss}. Go on? [y/N] ");
    // Without a prompt the user would answer blindly: then the answer counts all the same.
    let _ = std::io::stderr().flush();
    let mut answer = String::new();
    std::io::stdin()
        .read_line(&mut answer)
        .map_err(|e| Error::io("the answer could not be read", e))?;
    if matches!(answer.trim(), "y" | "Y" | "yes") {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Interrupted, "nothing was done"))
}
