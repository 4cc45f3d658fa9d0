//! Random chains of random layers, used at random, against the model; QEMU agrees at the end.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner};
use vdisk::internals::addr::Unit;
use vdisk::internals::chain::Chain;
use vdisk::internals::change;
use vdisk::internals::image::Backing;
use vdisk::internals::luks::{self, Passphrase};
use vdisk::internals::open;
use vdisk::internals::qcow2::{self, CreateOptions, Encryption, Method, Preallocation};
use vdisk::internals::storage::{FileOptions, FileStorage, Storage};
use vdisk::{ErrorKind, Result};

use crate::dice::{Budget, Dice, seed};
use crate::model::{Model, random_op};
use crate::processes::{have_qemu, run};

/// One layer of a case: how it is made, and what is done to the disk while it is the head.
#[derive(Debug, Clone)]
struct Spec {
    /// Raw files only stand at the bottom.
    raw: bool,
    cluster_bits: u32,
    extended: bool,
    refcount_order: u32,
    version: u32,
    /// Of the case's disk, in 64ths: bases may be shorter or longer than what stands on them.
    size: u64,
    ops: usize,
    /// Whether metadata is kept in next to no memory.
    tiny_cache: bool,
    data: Data,
    cipher: Cipher,
    dice: u64,
}

/// Where a layer's data stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Data {
    Own,
    External,
    /// Readable without the tables: not above another layer.
    Raw,
}

/// How a layer's data are encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cipher {
    None,
    Aes,
    Luks,
}

/// What opens all encrypted layers.
const PASSPHRASE: &str = "open sesame";

fn passphrase() -> Passphrase {
    Passphrase::new(PASSPHRASE.as_bytes().to_vec().into())
}

fn data() -> impl Strategy<Value = (Data, Cipher)> {
    let data = prop_oneof![6 => Just(Data::Own), 2 => Just(Data::External), 1 => Just(Data::Raw)];
    let cipher =
        prop_oneof![8 => Just(Cipher::None), 1 => Just(Cipher::Aes), 1 => Just(Cipher::Luks)];
    (data, cipher)
}

fn spec() -> impl Strategy<Value = Spec> {
    let cluster = prop_oneof![3 => 9..=12u32, 3 => 13..=16u32, 1 => 17..=21u32];
    let rest = (cluster, 0..=6u32, 32..=96u64, 0..40usize, any::<u64>());
    (any::<(bool, bool, bool)>(), rest, data()).prop_map(
        |(
            (raw, extended, tiny_cache),
            (cluster_bits, refcount_order, size, ops, dice),
            (data, cipher),
        )| {
            let extended = extended && cluster_bits >= 14;
            let plain = refcount_order == 4 && data == Data::Own && !extended;
            let version = if !plain || dice % 4 > 0 { 3 } else { 2 };
            let size = if dice % 3 == 0 { size } else { 64 };
            Spec {
                raw,
                cluster_bits,
                extended,
                refcount_order,
                version,
                size,
                ops,
                tiny_cache,
                data,
                cipher,
                dice,
            }
        },
    )
}

impl Spec {
    fn create(&self, path: &Path, size: u64, below: Option<(&Path, bool)>) -> Result<()> {
        let backing = below.map(|(path, raw)| Backing {
            name: path.file_name().unwrap().to_str().unwrap().to_owned(),
            format: Some(if raw { "raw" } else { "qcow2" }.to_owned()),
        });
        if self.is_raw(below.is_none()) {
            return open::create_raw(path, size, Preallocation::Off);
        }
        let options = CreateOptions {
            cluster: Unit::from_bits(self.cluster_bits),
            version: self.version,
            refcount_bits: if self.version == 2 { 16 } else { 1 << self.refcount_order },
            extended_l2: self.extended,
            encryption: self.method().map(|method| Encryption { passphrase: passphrase(), method }),
            backing,
            ..CreateOptions::new(size)
        };
        let raw = self.data == Data::Raw && below.is_none();
        match self.data {
            Data::Own => open::create(path, &options),
            _ => open::create_with_data(path, &data_of(path), raw, options),
        }
    }

    fn method(&self) -> Option<Method> {
        let iter_time = Duration::from_millis(1);
        match self.cipher {
            Cipher::None => None,
            Cipher::Aes => Some(Method::Aes),
            Cipher::Luks => Some(Method::Luks(luks::Options { iter_time, ..Default::default() })),
        }
    }

    fn is_raw(&self, bottom: bool) -> bool {
        self.raw && bottom
    }

    fn open(&self, path: &Path) -> Result<Chain> {
        let cache = if self.tiny_cache { 0 } else { 1 << 20 };
        open_patiently(path, &open::OpenOptions { cache, ..opening(false) })
    }

    /// Uses the disk at `path` at random, the model with it.
    fn play(&self, path: &Path, raw: bool, model: &mut Model) -> Result<()> {
        let mut dice = Dice::new(self.dice);
        let mut disk = self.open(path)?;
        for _ in 0..self.ops {
            if dice.once_in(25) {
                disk = {
                    drop(disk);
                    self.open(path)?
                };
            } else if dice.once_in(40) && !raw {
                let cut = model.size() - dice.below(model.size() / 2) / 512 * 512;
                disk.resize(cut)?;
                model.bytes.truncate(cut as usize);
            } else if dice.once_in(40) {
                let grown = model.size() + dice.below(3 << self.cluster_bits) / 512 * 512;
                disk.resize(grown)?;
                model.bytes.resize(grown as usize, 0);
            } else {
                let op = random_op(&mut dice, model.size(), 1 << self.cluster_bits);
                model.apply(&disk, &op)?;
            }
        }
        model.compare(&disk)
    }
}

fn opening(read_only: bool) -> open::OpenOptions {
    let passphrase = Some(passphrase());
    // Data files have their full names, by which QEMU finds them from any directory.
    open::OpenOptions { read_only, passphrase, follow: true, ..open::OpenOptions::default() }
}

/// The data file of the layer at `path`.
fn data_of(path: &Path) -> PathBuf {
    path.with_extension("data")
}

/// Opens a disk. A child that another test's thread is just starting holds our closed files, and
/// with them their locks, until it has become another program.
pub fn open_patiently(path: &Path, options: &open::OpenOptions) -> Result<Chain> {
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        match change::open(path, options) {
            Err(e) if e.kind() == ErrorKind::InUse && Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(1));
            }
            other => return other,
        }
    }
}

fn run_case(specs: &[Spec], with_qemu: bool) -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    let top = specs.iter().map(|s| s.cluster_bits).max().unwrap_or(16);
    // Two L2 tables of the smallest clusters; some clusters of the biggest.
    let size = (96 << 10 | 4 << top).min(6 << 20);
    let mut model = Model::default();
    let mut below: Option<(PathBuf, bool)> = None;
    for (number, spec) in specs.iter().enumerate() {
        let path = dir.path().join(format!("layer{number}"));
        let own = size * spec.size / 64 / 512 * 512;
        spec.create(&path, own, below.as_ref().map(|(p, raw)| (p.as_path(), *raw)))?;
        model.bytes.resize(own as usize, 0);
        spec.play(&path, spec.is_raw(number == 0), &mut model)?;
        below = Some((path, spec.is_raw(number == 0)));
        let head = &below.as_ref().unwrap().0;
        let disk = open_patiently(head, &opening(true))?;
        model.compare(&disk)?;
        if number == 0 && spec.data == Data::Raw && !spec.raw && spec.cipher == Cipher::None {
            let bytes = std::fs::read(data_of(head)).unwrap();
            assert!(bytes == model.bytes, "the data file is not what the disk shows");
        }
    }
    for (number, spec) in specs.iter().enumerate() {
        if !spec.is_raw(number == 0) {
            let path = dir.path().join(format!("layer{number}"));
            check_layer(&path, false)?;
            if with_qemu {
                qemu_checks(&path, &specs[..=number]);
            }
        }
    }
    match below {
        Some((head, false)) if with_qemu => qemu_reads(&head, specs, &model),
        _ => {}
    }
    Ok(())
}

pub fn check_layer(path: &Path, with_qemu: bool) -> Result<()> {
    let file = FileStorage::open(path, FileOptions { access: None, write: false })?;
    let options = FileOptions { access: None, write: false };
    let data_file = match FileStorage::open(&data_of(path), options) {
        Ok(data) => Some(Arc::new(data) as Arc<dyn Storage>),
        Err(_) => None,
    };
    let options = qcow2::OpenOptions { data_file, ..qcow2::OpenOptions::default() };
    let image = qcow2::Image::open(Arc::new(file), options)?;
    let check = image.check(qcow2::Repair::None)?;
    assert!(check.is_clean(), "{}: {:#?}", path.display(), check);
    drop(image);
    if with_qemu {
        let out = run(Command::new("qemu-img").args(["check", "-q", "-U"]).arg(path));
        assert!(out.status.success(), "qemu-img check: {}", String::from_utf8_lossy(&out.stdout));
    }
    Ok(())
}

/// The words by which QEMU opens the topmost of `specs` and all below it.
fn qemu_opens(head: &Path, specs: &[Spec]) -> [String; 4] {
    let secret = format!("secret,id=sec0,data={PASSPHRASE}");
    let mut image = format!("driver=qcow2,file.filename={}", head.display());
    for (depth, spec) in specs.iter().rev().enumerate() {
        if spec.cipher != Cipher::None && !spec.is_raw(depth + 1 == specs.len()) {
            image += &format!(",{}encrypt.key-secret=sec0", "backing.".repeat(depth));
        }
    }
    ["--object".to_owned(), secret, "--image-opts".to_owned(), image]
}

fn qemu_checks(path: &Path, specs: &[Spec]) {
    let mut check = Command::new("qemu-img");
    let out = run(check.args(["check", "-q", "-U"]).args(qemu_opens(path, specs)));
    let text = [out.stdout, out.stderr].concat();
    assert!(out.status.success(), "qemu-img check: {}", String::from_utf8_lossy(&text));
}

fn qemu_reads(head: &Path, specs: &[Spec], model: &Model) {
    let flat = head.with_extension("flat");
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-U", "-O", "raw"]).args(qemu_opens(head, specs)).arg(&flat);
    let out = run(&mut convert);
    assert!(out.status.success(), "qemu-img convert: {}", String::from_utf8_lossy(&out.stderr));
    let got = std::fs::read(&flat).unwrap();
    assert_eq!(got.len(), model.bytes.len(), "the size that QEMU sees");
    let differs = crate::model::first_difference(&got, &model.bytes);
    assert_eq!(differs, None, "the first byte that QEMU reads differently");
}

/// Runs `strategy`'s cases with a printed seed, as many as the budget allows.
fn run_cases<S: Strategy>(seconds: u64, strategy: S, test: impl Fn(S::Value, u64) -> Result<()>) {
    let seed = seed();
    let budget = Budget::new(seconds);
    let bytes: Vec<u8> = (0..4).flat_map(|i| (seed ^ i).to_le_bytes()).collect();
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let config = Config {
        cases: u32::MAX,
        failure_persistence: None,
        max_shrink_iters: 200,
        ..Config::default()
    };
    let mut runner = TestRunner::new_with_rng(config, rng);
    let mut done = 0;
    // The runner has no notion of time: cases are drawn from it one by one.
    while budget.goes_on(done) {
        let tree = strategy.new_tree(&mut runner).unwrap();
        let outcome = runner.run_one(tree, |value| {
            test(value, done).map_err(|e| TestCaseError::fail(format!("{e:?}")))
        });
        match outcome {
            Ok(_) => done += 1,
            Err(TestError::Fail(why, value)) => panic!(
                "case {done} fails: {why}\nsmallest: {value:#?}\nto run this again: VDISK_SEED={seed:#x}"
            ),
            Err(other) => panic!("{other}"),
        }
    }
    eprintln!("{done} cases, VDISK_SEED={seed:#x}");
}

#[test]
fn one_image_of_any_shape_reads_as_its_model() {
    let with_qemu = have_qemu();
    run_cases(8, spec(), |spec, _| {
        run_case(&[Spec { ops: spec.ops * 3, raw: false, ..spec }], with_qemu)
    });
}

#[test]
fn a_chain_of_any_layers_reads_as_its_model() {
    let with_qemu = have_qemu();
    run_cases(12, prop::collection::vec(spec(), 2..6), |specs, _| run_case(&specs, with_qemu));
}
