//! The default entry of SYSLINUX's configuration, `extlinux.conf`: what Alpine Linux boots by.
//!
//! It knows the text; where the files lie is its caller's.

use super::choice::Choice;

/// Where the configuration may be in a directory `boot`.
pub const FILES: [&str; 3] = ["extlinux.conf", "extlinux/extlinux.conf", "syslinux/syslinux.cfg"];

#[derive(Default)]
struct Entry {
    label: String,
    default: bool,
    kernel: String,
    initrds: Vec<String>,
    options: String,
}

/// What a configuration starts by default: `None` where it names no kernel.
pub fn choice(text: &str) -> Option<Choice> {
    let mut default = None;
    let mut global = String::new();
    let mut entries: Vec<Entry> = Vec::new();
    for line in text.lines() {
        let line = line.trim();
        let (key, value) = line.split_once(|c: char| c.is_ascii_whitespace()).unwrap_or((line, ""));
        let value = value.trim();
        match (key.to_ascii_lowercase().as_str(), entries.last_mut()) {
            ("default", _) => default = Some(value),
            ("label", _) => entries.push(Entry { label: value.into(), ..Entry::default() }),
            ("append", None) => global = value.to_owned(),
            ("append", Some(entry)) => entry.options = value.to_owned(),
            ("menu", Some(entry)) => entry.default |= value.eq_ignore_ascii_case("default"),
            ("linux" | "kernel", Some(entry)) => entry.kernel = value.to_owned(),
            ("initrd", Some(entry)) => entry.initrds = list(value),
            _ => {}
        }
    }
    entries.retain(|entry| !entry.kernel.is_empty());
    let marked = entries.iter().position(|entry| entry.default);
    let named = entries.iter().position(|entry| Some(entry.label.as_str()) == default);
    let at = marked.or(named).unwrap_or(0);
    if at >= entries.len() {
        return None;
    }
    let entry = entries.swap_remove(at);
    let options = match entry.options.as_str() {
        "" => global,
        // "-" stands for nothing at all.
        "-" => String::new(),
        _ => entry.options,
    };
    Some(of(entry.label, (entry.kernel, entry.initrds), &options))
}

/// An initrd may also stand among the kernel's own words.
fn of(label: String, (kernel, mut initrds): (String, Vec<String>), options: &str) -> Choice {
    let words = options.split_ascii_whitespace();
    let (own, rest): (Vec<_>, Vec<_>) = words.partition(|word| word.starts_with("initrd="));
    initrds.extend(own.iter().flat_map(|word| list(word.trim_start_matches("initrd="))));
    Choice { from: label, kernel, initrds, options: rest.join(" "), ..Choice::default() }
}

fn list(value: &str) -> Vec<String> {
    value.split(',').filter(|path| !path.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_label_of_alpines_configuration_is_found() {
        let text = "DEFAULT menu.c32\nTIMEOUT 10\nLABEL lts\n  MENU DEFAULT\n  LINUX vmlinuz-lts\n  \
                    INITRD initramfs-lts\n  APPEND root=UUID=1 modules=ext4 quiet\nLABEL virt\n  \
                    KERNEL vmlinuz-virt\n  APPEND initrd=a,b ro\n";
        let found = choice(text).unwrap();
        assert_eq!((found.kernel.as_str(), found.initrds.len()), ("vmlinuz-lts", 1));
        assert_eq!(found.options, "root=UUID=1 modules=ext4 quiet");
        let virt =
            choice(&text.replace("  MENU DEFAULT\n", "").replace("menu.c32", "virt")).unwrap();
        assert_eq!((virt.kernel.as_str(), virt.options.as_str()), ("vmlinuz-virt", "ro"));
        assert_eq!(virt.initrds, ["a", "b"]);
        assert!(choice("LABEL x\n").is_none());
    }
}
