//! The default entry of GRUB's configuration, as far as that is plain: a menu of entries with a `linux`
//! command each, and the variables that are set on the way. Conditions are not weighed.
//!
//! It knows the script; where the files lie is its caller's.

use super::choice::{Choice, expand};
use super::environment::Environment;
use super::words::{Token, split};

/// Menus in menus.
const DEEPEST: usize = 16;

/// A menu's entry.
#[derive(Debug, Default, Clone)]
struct Entry {
    /// Titles of the menus that it stands in and its own, with the identifiers of each.
    path: Vec<Named>,
    /// Places in those menus, from 0.
    places: Vec<usize>,
    linux: Vec<String>,
    initrds: Vec<String>,
    /// The id of the file system that has the files.
    uuid: Option<String>,
}

#[derive(Debug, Default, Clone)]
struct Named {
    title: String,
    id: String,
}

/// What a configuration starts by default, and the id of the file system where its files lie, where it
/// says one. `None` where there is no entry with a kernel.
pub fn choice(text: &str, environment: &Environment) -> Option<(Choice, Option<String>)> {
    let mut menu = Menu { environment, ..Menu::new(environment) };
    menu.read(&split(text));
    let bootable = |entry: &&Entry| !entry.linux.is_empty();
    let default = menu.default.clone().unwrap_or_else(|| "0".into());
    // What a default names may be a menu, or gone: then it is the first, as in GRUB.
    let entry = menu.entries.iter().filter(bootable).find(|entry| entry.is(&default));
    let entry = entry.or_else(|| menu.entries.iter().find(bootable))?;
    let title = entry.path.iter().map(|named| named.title.as_str()).collect::<Vec<_>>().join(" > ");
    let (kernel, options) = entry.linux.split_first()?;
    let choice = Choice {
        from: title,
        kernel: on_its_own(kernel),
        initrds: entry.initrds.iter().map(|path| on_its_own(path)).collect(),
        options: options.join(" "),
        ..Choice::default()
    };
    Some((choice, entry.uuid.clone()))
}

/// A path without the device before it: `($root)/x`, `(hd0,gpt2)/x`.
fn on_its_own(path: &str) -> String {
    let after = path.strip_prefix('(').and_then(|rest| rest.split_once(')'));
    after.map_or(path, |(_, path)| path).to_owned()
}

impl Entry {
    /// Whether a default's words mean this entry: `1>0`, titles or identifiers.
    fn is(&self, default: &str) -> bool {
        let steps: Vec<_> = default.split('>').collect();
        let fits = |(at, step): (usize, &&str)| {
            let place = self.places.get(at).map(usize::to_string);
            let named = self.path.get(at);
            place.as_deref() == Some(*step)
                || named.is_some_and(|named| named.title == **step || named.id == **step)
        };
        // The first entry of a menu is what its number alone stands for.
        let rest_is_first = self.places.iter().skip(steps.len()).all(|place| *place == 0);
        rest_is_first && steps.len() <= self.path.len() && steps.iter().enumerate().all(fits)
            || steps.len() == 1 && self.path.last().is_some_and(|named| named.id == default)
    }
}

struct Menu<'e> {
    environment: &'e Environment,
    variables: Environment,
    default: Option<String>,
    entries: Vec<Entry>,
    /// The menus and the entry that are open, outermost first; braces of other kinds are `None`.
    open: Vec<Option<Named>>,
    /// How many entries each open menu has had.
    counts: Vec<usize>,
    current: Option<Entry>,
}

impl<'e> Menu<'e> {
    fn new(environment: &'e Environment) -> Menu<'e> {
        Menu {
            environment,
            variables: Environment::default(),
            default: None,
            entries: Vec::new(),
            open: Vec::new(),
            counts: vec![0],
            current: None,
        }
    }

    fn read(&mut self, tokens: &[Token]) {
        let mut command: Vec<&str> = Vec::new();
        for token in tokens {
            match token {
                Token::Word(word) => command.push(word),
                Token::End => self.execute(&std::mem::take(&mut command)),
                Token::Open => self.begin(&std::mem::take(&mut command)),
                Token::Close => {
                    self.execute(&std::mem::take(&mut command));
                    self.end();
                }
            }
        }
        self.execute(&command);
    }

    fn begin(&mut self, command: &[&str]) {
        let kind = command.first().copied().unwrap_or_default();
        let named = matches!(kind, "menuentry" | "submenu").then(|| named(command));
        if let Some(named) = &named
            && self.counts.len() < DEEPEST
        {
            let path = self.open.iter().flatten().cloned().chain([named.clone()]).collect();
            // The menus around it have been counted already.
            let (last, around) = self.counts.split_last().map_or((0, &[][..]), |(l, a)| (*l, a));
            let places = around.iter().map(|count| count - 1).chain([last]).collect();
            let entry = Entry { path, places, ..Entry::default() };
            if let Some(last) = self.counts.last_mut() {
                *last += 1;
            }
            if kind == "menuentry" {
                self.current = Some(entry);
            }
            self.counts.push(0);
        }
        self.open.push(named.filter(|_| self.counts.len() <= DEEPEST));
    }

    fn end(&mut self) {
        if let Some(Some(_)) = self.open.pop() {
            self.counts.pop();
            self.entries.extend(self.current.take());
        }
    }

    fn execute(&mut self, command: &[&str]) {
        // Words of the shell that a command may follow.
        let start = command.iter().position(|word| !matches!(*word, "then" | "else" | "do" | "if"));
        let Some((name, words)) = start.and_then(|at| command.get(at..)?.split_first()) else {
            return;
        };
        let expanded = |word: &&str| {
            expand(word, &|name| self.variables.get(name).or_else(|| self.environment.get(name)))
        };
        let words: Vec<_> = words.iter().map(expanded).filter(|word| !word.is_empty()).collect();
        match *name {
            "set" => words.iter().for_each(|word| self.set(word)),
            "linux" | "linuxefi" | "linux16" => {
                if let Some(entry) = &mut self.current {
                    entry.linux = words;
                }
            }
            "initrd" | "initrdefi" | "initrd16" => {
                if let Some(entry) = &mut self.current {
                    entry.initrds = words;
                }
            }
            "search" => {
                let by_id = words.iter().any(|word| word == "--fs-uuid" || word == "-u");
                let id = words.iter().rfind(|word| !word.starts_with('-'));
                if let Some(entry) = &mut self.current
                    && by_id
                {
                    entry.uuid = id.cloned();
                }
            }
            word => self.set(word),
        }
    }

    fn set(&mut self, word: &str) {
        let Some((name, value)) = word.split_once('=') else { return };
        match name {
            "default" if !value.is_empty() => self.default = Some(value.to_owned()),
            // What is set in an entry counts there: no plain menu sets what others use.
            _ if self.current.is_none() => self.variables.set(name, value.to_owned()),
            _ => {}
        }
    }
}

/// The title and the identifier of `menuentry TITLE ... --id ID`, which older scripts write as the
/// variable `$menuentry_id_option`.
fn named(command: &[&str]) -> Named {
    let title = command.get(1).copied().unwrap_or_default().to_owned();
    let option = |word: &&str| *word == "--id" || *word == "$menuentry_id_option";
    let id = command.iter().position(option).and_then(|at| command.get(at + 1));
    let given = command.iter().find_map(|word| word.strip_prefix("--id="));
    Named { title, id: given.or(id.copied()).unwrap_or_default().to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEBIAN: &str = r#"
if [ -s $prefix/grubenv ]; then
  set have_grubenv=true
  load_env
fi
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
   set next_entry=
   save_env next_entry
else
   set default="DEFAULT"
fi
function savedefault {
  if [ -z "${boot_once}" ]; then
    saved_entry="${chosen}"
  fi
}
set linux_gfx_mode=keep
menuentry 'Debian GNU/Linux' --class debian $menuentry_id_option 'gnulinux-simple-1' {
	search --no-floppy --fs-uuid --set=root 0b0b-1
	echo	'Loading Linux 6.1.0-37-amd64 ...'
	linux	/boot/vmlinuz-37 root=UUID=0b0b-1 ro  quiet $vt_handoff
	initrd	/boot/initrd.img-37
}
submenu 'Advanced options' $menuentry_id_option 'advanced-1' {
	menuentry 'Linux 37' $menuentry_id_option 'adv-37' {
		linux ($root)/boot/vmlinuz-37 root=/dev/vda1 single
	}
	menuentry 'Linux 9' --id adv-9 {
		linux (hd0,gpt1)/boot/vmlinuz-9 "root=LABEL=a b" quiet
		initrd /boot/ucode.img /boot/initrd.img-9
	}
}
menuentry 'UEFI Firmware Settings' { fwsetup }
"#;

    fn kernel_of(default: &str) -> String {
        let text = DEBIAN.replace("DEFAULT", default);
        choice(&text, &Environment::default()).unwrap().0.kernel
    }

    #[test]
    fn the_default_entry_of_debians_menu_is_found() {
        let text = DEBIAN.replace("DEFAULT", "0");
        let (found, uuid) = choice(&text, &Environment::default()).unwrap();
        assert_eq!((found.from.as_str(), uuid.as_deref()), ("Debian GNU/Linux", Some("0b0b-1")));
        assert_eq!(found.options, "root=UUID=0b0b-1 ro quiet");
        assert_eq!(found.initrds, ["/boot/initrd.img-37"]);
    }

    #[test]
    fn a_default_may_be_a_number_a_title_an_identifier_or_a_way_through_menus() {
        for nine in ["1>1", "Advanced options>Linux 9", "advanced-1>adv-9", "adv-9", "1>adv-9"] {
            assert_eq!(kernel_of(nine), "/boot/vmlinuz-9", "{nine}");
        }
        for first in ["0", "1", "gnulinux-simple-1", "Debian GNU/Linux", "7", "2", "no such"] {
            assert_eq!(kernel_of(first), "/boot/vmlinuz-37", "{first}");
        }
    }

    #[test]
    fn a_default_that_was_saved_counts_and_so_do_variables() {
        let mut saved = Environment::default();
        saved.set("saved_entry", "advanced-1>adv-9".into());
        saved.set("kernelopts", "root=/dev/x ro".into());
        let text = DEBIAN.replace("DEFAULT", "${saved_entry}");
        let (found, _) = choice(&text, &saved).unwrap();
        assert_eq!((found.initrds.len(), found.options.as_str()), (2, "root=LABEL=a b quiet"));
        let set = "set more='a b'\nmenuentry x { linux /v $kernelopts ${more} $none\n}";
        assert_eq!(choice(set, &saved).unwrap().0.options, "root=/dev/x ro a b");
        assert!(choice("menuentry x { reboot; }", &saved).is_none());
        assert!(choice(&"submenu x { ".repeat(100), &saved).is_none());
    }

    proptest::proptest! {
        #[test]
        fn no_script_makes_the_reader_panic(
            text in "(menuentry|submenu|linux|set|default|=|[{}]|;|\n|'|\"|\\\\|\\$| |a|>|0){0,60}"
        ) {
            let _ = choice(&text, &Environment::default());
        }
    }
}
