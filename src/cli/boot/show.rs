//! `vdisk boot --show`: what would be booted.

use serde::Serialize;
use vdisk::Result;

use super::kernel::Chosen;
use crate::cli::terminal::output;

#[derive(Serialize)]
struct Report {
    kernel: String,
    initrds: Vec<String>,
    command_line: String,
    from: String,
    partition: Option<u32>,
    passed_over: Vec<String>,
}

/// Prints it, as text or as JSON.
pub fn show(chosen: &Chosen, json: bool) -> Result<()> {
    let report = Report {
        kernel: output::path(&chosen.kernel),
        initrds: chosen.initrds.iter().map(output::path).collect(),
        command_line: chosen.command_line.clone(),
        from: chosen.from.clone(),
        partition: chosen.partition,
        passed_over: chosen.passed_over.clone(),
    };
    if json {
        return output::json(&report);
    }
    let mut text = format!("kernel: {}\n", report.kernel);
    report.initrds.iter().for_each(|path| text.push_str(&format!("initrd: {path}\n")));
    text.push_str(&format!("command line: {}\nfrom: {}\n", report.command_line, report.from));
    if let Some(number) = report.partition {
        text.push_str(&format!("partition: {number}\n"));
    }
    report.passed_over.iter().for_each(|what| text.push_str(&format!("passed over: {what}\n")));
    output::text(&text)
}
