//! JSON as QEMU prints it: four spaces, one line for each member, or all in one line; members in its
//! order.

use serde_json::Value;

/// Members of an object by QEMU's order, which follows from a hash of their names.
const BUCKETS: u32 = 512;

/// The text of `value`, without a newline at the end.
pub fn pretty(value: &Value) -> String {
    let mut out = String::new();
    write(value, 0, &mut out);
    out
}

fn write(value: &Value, depth: usize, out: &mut String) {
    match value {
        Value::Object(_) => {
            let lines = members(value).into_iter().map(|(name, value)| (Some(name), value));
            enclosed('{', '}', lines, depth, out);
        }
        Value::Array(all) => {
            enclosed('[', ']', all.iter().map(|value| (None, value)), depth, out);
        }
        scalar => out.push_str(&scalar.to_string()),
    }
}

/// The text of `value` in one line.
pub fn inline(value: &Value) -> String {
    match value {
        Value::Object(_) => {
            let all = members(value).into_iter();
            let all = all
                .map(|(name, value)| format!("{}: {}", Value::from(name.as_str()), inline(value)));
            format!("{{{}}}", all.collect::<Vec<_>>().join(", "))
        }
        Value::Array(all) => {
            format!("[{}]", all.iter().map(inline).collect::<Vec<_>>().join(", "))
        }
        scalar => scalar.to_string(),
    }
}

/// The members of an object in QEMU's order; none of anything else.
pub fn members(value: &Value) -> Vec<(&String, &Value)> {
    let mut members: Vec<(&String, &Value)> =
        value.as_object().map(|map| map.iter().collect()).unwrap_or_default();
    // Of two in one place the later one comes first there; by name that holds for those we have.
    members.sort_by_key(|(name, _)| (bucket(name), std::cmp::Reverse(*name)));
    members
}

fn enclosed<'a>(
    open: char,
    close: char,
    members: impl Iterator<Item = (Option<&'a String>, &'a Value)>,
    depth: usize,
    out: &mut String,
) {
    out.push(open);
    for (number, (name, value)) in members.enumerate() {
        if number > 0 {
            out.push(',');
        }
        newline(depth + 1, out);
        if let Some(name) = name {
            out.push_str(&Value::from(name.as_str()).to_string());
            out.push_str(": ");
        }
        write(value, depth + 1, out);
    }
    newline(depth, out);
    out.push(close);
}

fn newline(depth: usize, out: &mut String) {
    out.push('\n');
    out.extend(std::iter::repeat_n(' ', depth * 4));
}

/// Where a name stands among others: scripts compare QEMU's output as text.
fn bucket(name: &str) -> u32 {
    let bytes = name.as_bytes();
    let seed = 0x238f_13af_u32.wrapping_mul(bytes.len() as u32);
    let sum = bytes
        .iter()
        .enumerate()
        .fold(seed, |sum, (at, byte)| sum.wrapping_add(u32::from(*byte) << (at * 5 % 24)));
    sum.wrapping_mul(1_103_515_243).wrapping_add(12345) % BUCKETS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_stand_in_qemus_order() {
        let value = serde_json::json!({
            "format": "qcow2", "virtual-size": 1, "children": [], "dirty-flag": false,
            "filename": "a", "cluster-size": 65536, "actual-size": 2, "backing-filename": "b",
            "full-backing-filename": "c", "format-specific": {}, "snapshots": [],
            "backing-filename-format": "raw"
        });
        let text = pretty(&value);
        let names: Vec<&str> = text
            .lines()
            .filter_map(|l| l.trim().split_once("\": "))
            .map(|(n, _)| &n[1..])
            .collect();
        assert_eq!(
            names,
            [
                "children",
                "backing-filename-format",
                "snapshots",
                "virtual-size",
                "filename",
                "cluster-size",
                "format",
                "actual-size",
                "format-specific",
                "full-backing-filename",
                "backing-filename",
                "dirty-flag"
            ]
        );
    }
}
