//! A disk image beside a plain copy of the bytes it should hold: what `vdisk` and QEMU are both
//! held to. Knows how to write and read an image with either, and nothing of any theme.

use serde_json::Value;

use crate::host::{Done, Work};

/// Bytes that no codec shortens and no two seeds share.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x2545_f491_4f6c_dd1d;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes()
    });
    words.flatten().take(length).collect()
}

/// An image and what it should hold.
pub struct Twin<'w> {
    work: &'w Work,
    /// The image's name in the test's directory.
    pub image: String,
    /// What it should hold.
    pub bytes: Vec<u8>,
    /// Whether it is encrypted, under the passphrase in the file [`PASSPHRASE`].
    encrypted: bool,
}

/// The name of a file that holds a passphrase.
pub const PASSPHRASE: &str = "passphrase";

impl<'w> Twin<'w> {
    /// An image that is there already and should read as `size` zeroes.
    pub fn blank(work: &'w Work, image: &str, size: usize) -> Twin<'w> {
        Twin::of(work, image, vec![0; size])
    }

    /// An image that is there already and should hold `bytes`.
    pub fn of(work: &'w Work, image: &str, bytes: Vec<u8>) -> Twin<'w> {
        Twin { work, image: image.to_owned(), bytes, encrypted: false }
    }

    /// Creates the image with `vdisk create`; `options` may be empty.
    pub fn create(work: &'w Work, image: &str, size: usize, options: &str) -> Twin<'w> {
        work.vdisk(&format!("create {image} {size} {options}")).succeeds();
        Twin::blank(work, image, size)
    }

    /// The same image, which is encrypted under the passphrase in the file [`PASSPHRASE`].
    pub fn encrypted(self) -> Twin<'w> {
        Twin { encrypted: true, ..self }
    }

    /// What `vdisk` has to be told to open it.
    fn key(&self) -> String {
        if self.encrypted { format!("--passphrase-file {PASSPHRASE}") } else { String::new() }
    }

    /// The words by which QEMU opens it and, behind it, more raw files.
    fn qemu_words(&self, raw: &[&str]) -> Vec<String> {
        let mut words: Vec<String> = ["--object", "--image-opts"].map(str::to_owned).into();
        words.insert(1, format!("secret,id=sec0,file={PASSPHRASE}"));
        let key = if self.encrypted { ",encrypt.key-secret=sec0" } else { "" };
        words.push(format!("driver=qcow2,file.filename={}{key}", self.image));
        words.extend(raw.iter().map(|name| format!("driver=raw,file.filename={name}")));
        words
    }

    fn run_qemu(&self, first: &[&str], raw: &[&str], last: &[&str]) -> Done {
        let words = self.qemu_words(raw);
        let words = words.iter().map(String::as_str);
        let all = first[1..].iter().copied().chain(words).chain(last.iter().copied());
        self.work.run(first[0], all)
    }

    /// Writes with `vdisk`.
    pub fn write(&mut self, offset: usize, bytes: &[u8]) {
        let words = format!("write {} {offset} {}", self.image, self.key());
        self.work.vdisk_fed(&words, bytes).succeeds();
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// Writes one byte many times with `qemu-io`.
    pub fn qemu_write(&mut self, offset: usize, length: usize, pattern: u8) {
        self.qemu(&format!("write -P {pattern} {offset} {length}"));
        self.bytes[offset..offset + length].fill(pattern);
    }

    /// Makes a range read as zeroes with `qemu-io`; `how` is its command for that.
    pub fn qemu_zero(&mut self, how: &str, offset: usize, length: usize) {
        self.qemu(&format!("{how} {offset} {length}"));
        self.bytes[offset..offset + length].fill(0);
    }

    fn qemu(&self, command: &str) {
        let done = if self.encrypted {
            self.run_qemu(&["qemu-io", "-t", "writeback"], &[], &["-c", command]).succeeds()
        } else {
            self.work.qemu_io(&self.image, &[command]).succeeds()
        };
        assert!(!done.text().contains("failed"), "{}: {}", done.words, done.text());
    }

    /// What `vdisk read` gives of a range.
    pub fn read(&self, offset: usize, length: usize) -> Vec<u8> {
        let words = format!("read {} {offset} {length} {}", self.image, self.key());
        self.work.vdisk(&words).succeeds().stdout
    }

    /// Requires that `vdisk` reads what should be there.
    #[track_caller]
    pub fn reads_right(&self) {
        same_bytes(&self.image, &self.read(0, self.bytes.len()), &self.bytes);
    }

    /// Requires that `vdisk` and QEMU both read what should be there, and that QEMU finds
    /// nothing wrong with the image, leaks included.
    #[track_caller]
    pub fn holds(&self) {
        self.reads_right();
        self.qemu_reads_right();
        if self.encrypted {
            self.run_qemu(&["qemu-img", "check"], &[], &[]).succeeds();
        } else {
            clean(self.work, &self.image);
        }
    }

    /// Requires that QEMU reads what should be there.
    #[track_caller]
    pub fn qemu_reads_right(&self) {
        let model = format!("{}.model", self.image);
        self.work.put(&model, &self.bytes);
        if self.encrypted {
            self.run_qemu(&["qemu-img", "compare"], &[&model], &[]).succeeds();
        } else {
            self.work.qemu_img(&format!("compare -F raw {} {model}", self.image)).succeeds();
        }
        std::fs::remove_file(self.work.path(model)).unwrap();
    }
}

/// Requires equal bytes, and names the first that differs rather than print both.
#[track_caller]
pub fn same_bytes(what: &str, found: &[u8], expected: &[u8]) {
    assert_eq!(found.len(), expected.len(), "{what}: bytes read");
    if let Some(at) = found.iter().zip(expected).position(|(a, b)| a != b) {
        panic!("{what}: byte {at:#x} is {:#x}, not {:#x}", found[at], expected[at]);
    }
}

/// Requires that `qemu-img check` finds neither corruption nor leaks.
#[track_caller]
pub fn clean(work: &Work, image: &str) {
    work.qemu_img(&format!("check {image}")).succeeds();
}

/// Requires that `qemu-img check` finds leaks at most: what an interrupted command may leave.
#[track_caller]
pub fn leaks_at_most(work: &Work, image: &str) {
    let done = work.qemu_img(&format!("check {image}"));
    assert!(matches!(done.code, Some(0 | 3)), "{}: {}", done.words, done.text());
}

/// What QEMU says of an image.
pub fn qemu_info(work: &Work, image: &str) -> Value {
    let done = work.qemu_img(&format!("info --output=json {image}")).succeeds();
    serde_json::from_slice(&done.stdout).unwrap()
}

/// Requires exit status 0 and JSON on standard output.
#[track_caller]
pub fn json(done: Done) -> Value {
    let done = done.succeeds();
    serde_json::from_slice(&done.stdout)
        .unwrap_or_else(|error| panic!("{}: {error}: {}", done.words, done.out()))
}
