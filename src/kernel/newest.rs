//! Kernels by the names that distributions give their files, where no boot loader says more.
//!
//! It knows names, no disk.

use super::choice::Choice;
use super::version::compare;

/// What kernels' names begin with; what follows is the version.
const KERNELS: [&str; 3] = ["vmlinuz", "vmlinux", "bzImage"];
/// What initrds' names begin and end with, the version between: Debian and Ubuntu, Fedora and Arch,
/// Alpine, SUSE, dracut elsewhere.
const INITRDS: [(&str, &str); 5] = [
    ("initrd.img-", ""),
    ("initramfs-", ".img"),
    ("initramfs-", ""),
    ("initrd-", ""),
    ("initrd-", ".img"),
];
/// Initrds that go with a kernel of no version.
const PLAIN_INITRDS: [&str; 4] = ["initrd.img", "initrd", "initramfs.img", "initramfs"];

/// The kernels among the names in a directory `boot`, the newest first.
pub fn choices(boot: &str, names: &[String]) -> Vec<Choice> {
    let mut found: Vec<(&str, Choice)> = Vec::new();
    for name in names {
        let Some(version) = KERNELS.iter().find_map(|start| version(name, start)) else { continue };
        let initrd = initrd(version, names);
        found.push((
            version,
            Choice {
                from: format!("{boot}/{name}, the newest kernel there"),
                kernel: format!("{boot}/{name}"),
                initrds: initrd.map(|name| format!("{boot}/{name}")).into_iter().collect(),
                ..Choice::default()
            },
        ));
    }
    let rank = |version: &str| (is_spare(version), version.is_empty());
    found.sort_by(|(a, _), (b, _)| rank(a).cmp(&rank(b)).then_with(|| compare(b, a)));
    found.into_iter().map(|(_, choice)| choice).collect()
}

/// The version in a kernel's name, empty where it has none.
fn version<'n>(name: &'n str, start: &str) -> Option<&'n str> {
    let rest = name.strip_prefix(start)?;
    if rest.is_empty() { Some("") } else { rest.strip_prefix('-') }
}

/// What is kept for a day on which nothing else boots.
fn is_spare(version: &str) -> bool {
    version.contains("rescue") || version.ends_with(".old") || version.ends_with(".bak")
}

fn initrd(version: &str, names: &[String]) -> Option<String> {
    let there = |name: &String| names.contains(name);
    if version.is_empty() {
        return PLAIN_INITRDS.iter().map(|name| (*name).to_owned()).find(there);
    }
    let named = INITRDS.iter().map(|(before, after)| format!("{before}{version}{after}"));
    named.into_iter().find(there)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first(names: &[&str]) -> (String, Vec<String>) {
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        let first = choices("/boot", &names).swap_remove(0);
        (first.kernel, first.initrds)
    }

    fn pair(kernel: &str, initrd: &str) -> (String, Vec<String>) {
        (format!("/boot/{kernel}"), vec![format!("/boot/{initrd}")])
    }

    #[test]
    fn each_distribution_has_its_names() {
        let debian =
            ["vmlinuz-6.1.0-9-amd64", "vmlinuz-6.1.0-37-amd64", "initrd.img-6.1.0-37-amd64"];
        assert_eq!(first(&debian), pair(debian[1], debian[2]));
        let fedora = [
            "vmlinuz-6.5.6-300.fc39.x86_64",
            "initramfs-6.5.6-300.fc39.x86_64.img",
            "vmlinuz-0-rescue-abc",
            "initramfs-0-rescue-abc.img",
        ];
        assert_eq!(first(&fedora), pair(fedora[0], fedora[1]));
        assert_eq!(
            first(&["vmlinuz-virt", "initramfs-virt"]),
            pair("vmlinuz-virt", "initramfs-virt")
        );
        let arch = ["vmlinuz-linux", "initramfs-linux-fallback.img", "initramfs-linux.img"];
        assert_eq!(first(&arch), pair(arch[0], arch[2]));
        assert_eq!(first(&["vmlinuz", "initrd.img"]), pair("vmlinuz", "initrd.img"));
        let old = ["vmlinuz-6.2.old", "vmlinuz-6.1", "initrd-6.1"];
        assert_eq!(first(&old), pair(old[1], old[2]));
        assert!(choices("/boot", &["vmlinuzz".into(), "config-6.1".into()]).is_empty());
    }
}
