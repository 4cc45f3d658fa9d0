//! The jail around a command: files are read wherever names lead, as QEMU follows them, and written where
//! its command line says, as the command has read it. There is nothing to say about it, as QEMU says nothing.

use std::path::Path;

use vdisk::jail::{Mode, Work};
use vdisk::nbd::{Address, connect_beside};
use vdisk::storage::device::is_device;

use super::images::{bottom, open};
use super::names::name::{Below, Protocol, Source};
use crate::cli::open::rest::Rest;

/// What a command opens. It closes the jail before it opens the first.
pub struct Opens {
    rest: Rest,
    /// Servers that are asked: a process beside this connects to them.
    servers: Vec<Address>,
}

impl Opens {
    /// Nothing that is written.
    pub fn new() -> Opens {
        Opens { rest: Rest::new().read(Path::new("/")), servers: Vec::new() }
    }

    /// An image that is only read.
    pub fn read(mut self, source: &Source) -> Opens {
        prepare(source);
        self.servers.extend(asked(source));
        self
    }

    /// An image that is changed, and what it stands on is told.
    pub fn changed(self, source: &Source) -> Opens {
        let own = own_files(source);
        let opens = self.read(source);
        Opens { rest: own.into_iter().fold(opens.rest, Rest::disk), ..opens }
    }

    /// An image that is changed with all that it stands on.
    pub fn changed_with_bases(self, source: &Source) -> Opens {
        let own = own_files(source);
        let opens = self.read(source);
        let opens = Opens { rest: own.into_iter().fold(opens.rest, Rest::chain), ..opens };
        match &source.below {
            Below::Given(below) => opens.changed_with_bases(below),
            _ => opens,
        }
    }

    /// A file that is made, whatever stood there.
    pub fn made(mut self, at: &Protocol) -> Opens {
        bottom::prepare(at);
        self.servers.extend(servers(at).into_iter().cloned());
        let make = |rest: Rest, path: &Path| match is_device(path) {
            true => rest.disk(path),
            false => rest.made(path),
        };
        Opens { rest: files(at).into_iter().fold(self.rest, make), ..self }
    }

    /// What an image is to stand on, by its full name: it is told so.
    pub fn told(self, full: &str) -> Opens {
        // Who cannot read the name opens nothing by it.
        let Ok(source) = Source::named(full, None) else { return self };
        let own = own_files(&source);
        let opens = self.read(&source);
        Opens { rest: own.into_iter().fold(opens.rest, Rest::base), ..opens }
    }

    /// Closes the jail.
    pub fn close(self) {
        let Opens { mut rest, mut servers } = self;
        // Which servers are meant is known only when the images are read.
        if open::trusts_names() {
            return;
        }
        if !servers.is_empty() {
            servers.dedup();
            if connect_beside(servers).is_err() {
                return;
            }
            rest = rest.with_work(Work::Connected);
        }
        let _ = rest.close_as(Mode::Best);
    }
}

/// The files that an image itself is in.
fn own_files(source: &Source) -> Vec<&Path> {
    [Some(&source.protocol), source.data_file.as_ref()]
        .into_iter()
        .flatten()
        .flat_map(files)
        .collect()
}

fn files(protocol: &Protocol) -> Vec<&Path> {
    match protocol {
        Protocol::File(path) => vec![path],
        Protocol::Faulty { image, .. } => files(image),
        Protocol::Part { of, .. } => files(of),
        Protocol::Quorum(parts) => parts.iter().flat_map(files).collect(),
        Protocol::Null(_) | Protocol::Nbd(_) => Vec::new(),
    }
}

/// Makes what an image needs that is in no file, with all that is named below it.
fn prepare(source: &Source) {
    [Some(&source.protocol), source.data_file.as_ref()]
        .into_iter()
        .flatten()
        .for_each(bottom::prepare);
    if let Below::Given(below) = &source.below {
        prepare(below);
    }
}

/// The servers that an image is asked of, with all that is named below it.
fn asked(source: &Source) -> Vec<Address> {
    let own = [Some(&source.protocol), source.data_file.as_ref()].into_iter().flatten();
    let mut all: Vec<Address> = own.flat_map(servers).cloned().collect();
    if let Below::Given(below) = &source.below {
        all.extend(asked(below));
    }
    all
}

fn servers(protocol: &Protocol) -> Vec<&Address> {
    match protocol {
        Protocol::Nbd(target) => vec![&target.address],
        Protocol::Faulty { image, .. } => servers(image),
        Protocol::Part { of, .. } => servers(of),
        Protocol::Quorum(parts) => parts.iter().flat_map(servers).collect(),
        Protocol::File(_) | Protocol::Null(_) => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(text: &str) -> Source {
        Source::parse(text, None, text.starts_with("driver=")).unwrap()
    }

    #[test]
    fn the_files_of_an_image_are_found_however_it_is_named() {
        let has = |text: &str, paths: &[&str]| {
            let wanted: Vec<&Path> = paths.iter().map(Path::new).collect();
            assert_eq!(own_files(&source(text)), wanted, "{text}");
        };
        has("file:a=b", &["a=b"]);
        has(
            "driver=qcow2,file.filename=/a,data-file.driver=file,data-file.filename=/b",
            &["/a", "/b"],
        );
        has(
            r#"json:{"driver":"qcow2","file":{"driver":"blkdebug","image":{"filename":"c"}}}"#,
            &["c"],
        );
        has("null-co://", &[]);
    }

    #[test]
    fn who_asks_a_server_is_found_wherever_it_is_named() {
        for text in [
            "nbd:localhost:1",
            "driver=raw,file.driver=nbd,file.host=h,file.port=1",
            r#"json:{"driver":"qcow2","file":{"filename":"a"},"backing":{"driver":"raw","file":{"driver":"nbd","host":"h","port":"1"}}}"#,
        ] {
            assert_eq!(asked(&source(text)).len(), 1, "{text}");
        }
        // A file that is only called so.
        let none = ["./nbd:a", "a=nbd"].map(|text| asked(&source(text)));
        assert!(none.iter().all(Vec::is_empty));
    }
}
