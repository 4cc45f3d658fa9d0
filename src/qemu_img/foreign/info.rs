//! What `qemu-img info` says about VMDK images alone: their extents, and the files of these.

use std::path::Path;

use serde_json::{Map, Value, json};
use vdisk::formats::vmdk::{ExtentInfo, Vmdk};
use vdisk::storage::{FileOptions, FileStorage, Storage};

use crate::qemu_img::commands::info::{FileInfo, SECTOR};
use crate::qemu_img::fail::{Fail, Outcome, reason};
use crate::qemu_img::images::open::full_backing_name;
use crate::qemu_img::names::name;

/// The part of the report that only VMDK images have; `shown` is the image's name.
pub fn vmdk(image: &Vmdk, shown: &str) -> Value {
    let descriptor = image.descriptor();
    let extents: Vec<Value> = image.extents().map(|e| extent(image, &e, shown)).collect();
    json!({
        "cid": descriptor.cid.unwrap_or(0),
        "parent-cid": descriptor.parent_cid.unwrap_or(u32::MAX),
        "create-type": descriptor.create_type,
        "extents": extents,
    })
}

fn extent(image: &Vmdk, one: &ExtentInfo, shown: &str) -> Value {
    let kind = if one.file.is_some() { one.kind } else { "" };
    let mut map = Map::new();
    map.insert("virtual-size".to_owned(), json!(one.len));
    map.insert("filename".to_owned(), json!(file_name(image, one, shown)));
    map.insert("format".to_owned(), json!(kind));
    if let Some(grain) = one.grain {
        map.insert("cluster-size".to_owned(), json!(grain));
    }
    if one.compressed {
        map.insert("compressed".to_owned(), json!(true));
    }
    Value::Object(map)
}

fn file_name(image: &Vmdk, one: &ExtentInfo, shown: &str) -> String {
    let name = one.file.and_then(|file| image.descriptor().files.get(file));
    // It stands beside the image, whatever is before a colon in its name.
    let beside = |name: &vdisk::formats::vmdk::Name| match name::has_protocol(&name.text) {
        true => name::shown_path(&Path::new(shown).with_file_name(&name.text)),
        false => full_backing_name(shown, &name.text),
    };
    name.map_or_else(|| shown.to_owned(), beside)
}

/// The files of the extents with the names of their nodes, the last one first.
pub fn children(image: &Vmdk, shown: &str) -> Outcome<Vec<(String, FileInfo)>> {
    let in_files = image.extents().enumerate().filter(|(_, e)| e.file.is_some());
    let mut all = Vec::new();
    for (number, one) in in_files {
        let name = file_name(image, &one, shown);
        let failed = |e: vdisk::Error| Fail::new(format!("{name}: {}", reason(&e)));
        let options = FileOptions { access: None, write: false };
        // The name as the image has it, where no text says it.
        let mut path = Path::new(&name).to_path_buf();
        if let Some(name) = one.file.and_then(|file| image.descriptor().files.get(file))
            && !path.exists()
        {
            path = Path::new(shown).parent().unwrap_or(Path::new("")).join(&name.bytes);
        }
        let file = FileStorage::open(&path, options).map_err(failed)?;
        let length = file.len().map_err(failed)?.next_multiple_of(SECTOR);
        let allocated = Some(file.allocated().map_err(failed)?);
        all.push((
            format!("extents.{number}"),
            FileInfo { name, driver: "file", length, allocated },
        ));
    }
    all.reverse();
    Ok(all)
}
