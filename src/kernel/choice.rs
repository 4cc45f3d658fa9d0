//! A kernel that something in a disk names, with what belongs to it.
//!
//! It knows paths and words, not who names them.

use super::place::Place;

/// A kernel and what it is started with.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Choice {
    /// What names it: a file of the disk, and what it calls it there.
    pub from: String,
    /// Which of the places has its files.
    pub place: usize,
    /// The kernel's path there.
    pub kernel: String,
    /// Paths of its initial RAM disks, in their order.
    pub initrds: Vec<String>,
    /// What the kernel's command line is to hold.
    pub options: String,
}

impl Choice {
    /// The same with the paths at which its files are: boot loaders count them from the root of the
    /// file system, or from its directory `boot`. `None` where the kernel is not there.
    pub fn settle(mut self, place: &Place, boot: &str) -> Option<Choice> {
        let found = |path: &str| {
            let path = format!("/{}", path.trim_start_matches('/'));
            let below = format!("{boot}{path}");
            [path, below].into_iter().find(|path| place.has(path))
        };
        self.kernel = found(&self.kernel)?;
        self.initrds = self.initrds.iter().filter_map(|path| found(path)).collect();
        Some(self)
    }
}

/// The words of a command line that are left when those with unknown variables (`$name`) have been
/// replaced by what `known` says, or by nothing.
pub fn expand(text: &str, known: &dyn Fn(&str) -> Option<String>) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let (name, after) = match rest.strip_prefix('{').and_then(|rest| rest.split_once('}')) {
            Some(named) => named,
            None => {
                let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
                rest.split_at(end.unwrap_or(rest.len()))
            }
        };
        out.push_str(&known(name).unwrap_or_default());
        rest = after;
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_replaced_by_what_is_known() {
        let known = |name: &str| (name == "a_1").then(|| "x y".to_owned());
        assert_eq!(expand("q $a_1 ${a_1}z $b ${b}. $", &known), "q x y x yz  . ");
        assert_eq!(expand("${open", &known), "{open");
    }
}
