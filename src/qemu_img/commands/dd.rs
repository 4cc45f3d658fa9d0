//! `qemu-img dd`: copies blocks of one image into another.

use std::io::{IoSlice, IoSliceMut};

use vdisk::block::BlockDevice;

use crate::qemu_img::commands::create;
use crate::qemu_img::fail::{Fail, Outcome, reason};
use crate::qemu_img::images::open;
use crate::qemu_img::images::usage::Use;
use crate::qemu_img::jail::Opens;
use crate::qemu_img::names::name::Source;
use crate::qemu_img::options::args::{self, flag, value};
use crate::qemu_img::options::chosen::Chosen;
use crate::qemu_img::options::create as options;
use crate::qemu_img::options::format::{FORMAT, IMAGE_OPTS, OBJECT, SHARED};
use crate::qemu_img::size;

/// The block size unless the user says otherwise.
const BLOCK: u64 = 512;
/// The largest block size.
const MAX_BLOCK: u64 = i32::MAX as u64;

pub fn run(args: &[String]) -> Outcome {
    let known = [FORMAT, value("O"), SHARED, flag("n"), OBJECT, IMAGE_OPTS];
    let given = args::parse(args, &known)?;
    let mut request = Request { block: BLOCK, ..Request::default() };
    for operand in &given.names {
        request.read(operand)?;
    }
    let (Some(input), Some(output)) = (&request.input, &request.output) else {
        return Err(Fail::new("Must specify both input and output files"));
    };
    let format = given.get("O").unwrap_or("raw");
    let source = given.source(input)?;
    let opens = Opens::new().read(&source);
    match given.has("n") {
        true => Source::named(output, Some(format)).iter().fold(opens, Opens::changed),
        false => {
            create::place(output).iter().fold(opens, |opens, place| opens.made(&place.protocol()))
        }
    }
    .close();
    let from = open::chain(&source, given.reading())?;
    let known = options::with_file(format)?;
    let end = request.end(from.size());
    let start = request.start().min(end);
    if request.start() > from.size() {
        crate::qemu_img::fail::report(format!("{input}: cannot skip to specified offset"));
    }
    if !given.has("n") {
        let mut chosen = Chosen::parse(known, "")?;
        chosen.add_defaults()?;
        chosen.set("size", &(end - start).to_string())?;
        let place = create::place(output)?;
        create::make(&place, format, &chosen)
            .map_err(|e| e.prefix(format!("{output}: error while creating output image: ")))?;
    }
    let to = open::chain(&Source::named(output, Some(format))?, Use::writing())?;
    if to.size() < end - start {
        return Err(Fail::new("output file is smaller than input file"));
    }
    let mut bytes = vec![0; request.block.min(end - start) as usize];
    let mut at = start;
    while at < end {
        let n = request.block.min(end - at) as usize;
        let block = &mut bytes[..n];
        from.read_at(at, &mut [IoSliceMut::new(block)]).map_err(|e| {
            Fail::new(format!("error while reading from input image file: {}", reason(&e)))
        })?;
        to.write_at(at - start, &[IoSlice::new(block)]).map_err(|e| {
            Fail::new(format!("error while writing to output image file: {}", reason(&e)))
        })?;
        at += n as u64;
    }
    to.flush().map_err(|e| Fail::new(reason(&e)))?;
    Ok(0)
}

#[derive(Default)]
struct Request {
    input: Option<String>,
    output: Option<String>,
    block: u64,
    count: Option<u64>,
    skip: u64,
}

impl Request {
    fn read(&mut self, operand: &str) -> Outcome<()> {
        let (name, value) = operand
            .split_once('=')
            .ok_or_else(|| Fail::new(format!("unrecognized operand {operand}")))?;
        let number = || size::bounded(name, value, 1, i64::MAX as u64);
        match name {
            "if" => self.input = Some(value.to_owned()),
            "of" => self.output = Some(value.to_owned()),
            "bs" => self.block = size::bounded(name, value, 1, MAX_BLOCK)?,
            "count" => self.count = Some(size::operand(name, value)?),
            "skip" => self.skip = size::operand(name, value)?,
            other => {
                let _ = number;
                return Err(Fail::new(format!("unrecognized operand {other}")));
            }
        }
        Ok(())
    }

    /// The first byte that is copied.
    fn start(&self) -> u64 {
        self.skip.saturating_mul(self.block)
    }

    /// Where copying ends.
    fn end(&self, size: u64) -> u64 {
        let most = self.count.map(|c| c.saturating_mul(self.block));
        most.map_or(size, |m| self.start().saturating_add(m).min(size))
    }
}
