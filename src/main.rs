//! The `vdisk` command.

fn main() -> std::process::ExitCode {
    vdisk::cli::main()
}
