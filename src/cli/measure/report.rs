//! Two worlds side by side.

use std::ffi::OsString;
use std::path::Path;

use serde_json::{Value, json};
use vdisk::Result;

use super::world::Measured;
use crate::cli::terminal::{output, size};

/// What was seen of both.
pub struct Compared {
    disk: String,
    command: Vec<String>,
    container: Measured,
    machine: Measured,
}

impl Compared {
    pub fn new(
        disk: &Path,
        command: &[OsString],
        container: Measured,
        machine: Measured,
    ) -> Compared {
        let command = command.iter().map(output::path).collect();
        Compared { disk: output::path(disk), command, container, machine }
    }

    /// Whether the command ran in one of them.
    pub fn any(&self) -> bool {
        self.container.ran || self.machine.ran
    }

    /// Prints it.
    pub fn show(&self, as_json: bool) -> Result<()> {
        if as_json {
            let container = value(&self.container, self.container.memory);
            let machine = value(&self.machine, self.beyond());
            return output::json(&json!({
                "disk": self.disk,
                "command": self.command,
                "container": container,
                "machine": machine,
            }));
        }
        output::text(&self.table())
    }

    /// The memory of the virtual machine beyond what the same command takes as a process of the host's.
    fn beyond(&self) -> Option<u64> {
        let command = self.container.memory_of_command.filter(|_| self.container.ran)?;
        self.machine.memory.map(|memory| memory.saturating_sub(command))
    }

    fn table(&self) -> String {
        let both = |of: &dyn Fn(&Measured) -> String| [of(&self.container), of(&self.machine)];
        let seconds = |time: Option<f64>| time.map_or("-".into(), |time| format!("{time:.3} s"));
        let bytes = |bytes: Option<u64>| bytes.map_or("-".into(), size::human);
        let status = |status: Option<i32>| status.map_or("-".into(), |status| status.to_string());
        let beyond = [bytes(self.container.memory), bytes(self.beyond())];
        let rows = [
            ("start", both(&|m| seconds(m.start))),
            ("run", both(&|m| seconds(m.run))),
            ("stop", both(&|m| seconds(m.stop))),
            ("processor time", both(&|m| seconds(m.cpu))),
            ("memory beyond the command's", beyond),
            ("memory, all of it", both(&|m| bytes(all(m)))),
            ("written", both(&|m| bytes(m.written))),
            ("shared", both(&|m| bytes(m.shared))),
            ("exit status", both(&|m| status(m.exit_status))),
        ];
        let head = ("", ["container".to_owned(), "virtual machine".to_owned()]);
        let line = |(what, [container, machine]): (&str, [String; 2])| {
            format!("{what:<28}{container:>16}{machine:>18}\n")
        };
        let mut text: String = std::iter::once(head).chain(rows).map(line).collect();
        for (name, world) in [("container", &self.container), ("virtual machine", &self.machine)] {
            if let Some(why) = &world.why {
                text += &format!("no {name}: {why}\n");
            }
        }
        text
    }
}

/// All memory that was seen.
fn all(measured: &Measured) -> Option<u64> {
    measured.memory.map(|own| own + measured.memory_of_command.unwrap_or(0))
}

fn value(measured: &Measured, beyond: Option<u64>) -> Value {
    json!({
        "ran": measured.ran,
        "why": measured.why,
        "exit_status": measured.exit_status,
        "start_seconds": measured.start,
        "run_seconds": measured.run,
        "stop_seconds": measured.stop,
        "cpu_seconds": measured.cpu,
        "memory": all(measured),
        "memory_beyond": beyond,
        "written": measured.written,
        "shared": measured.shared,
    })
}
