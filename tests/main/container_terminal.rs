//! `vdisk run` at a terminal.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};

use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use crate::container::{able, eventually, running, work};
use crate::host::{PATIENCE, VDISK, Work};

/// A user's terminal, 33 rows by 99 columns, and `vdisk` in it.
struct Terminal {
    master: fs::File,
    user: Option<OwnedFd>,
    vdisk: Child,
}

impl Terminal {
    fn run(work: &Work, script: &str) -> Terminal {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        unlockpt(&master).unwrap();
        let user = ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        let size = Winsize { ws_row: 33, ws_col: 99, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&user, size).unwrap();
        let stream = || Stdio::from(user.try_clone().unwrap());
        let mut command = Command::new(VDISK);
        command.args(["run", "web.qcow2", "--", "sh", "-c", script]).current_dir(work.dir());
        let vdisk = command.stdin(stream()).stdout(stream()).stderr(stream()).spawn().unwrap();
        Terminal { master: master.into(), user: Some(user), vdisk }
    }

    /// Waits for the end; the exit status, and what was shown.
    fn ends(mut self) -> (Option<i32>, String) {
        let mut status = None;
        eventually("vdisk ends", || {
            status = self.vdisk.try_wait().unwrap();
            status.is_some()
        });
        let modes = tcgetattr(self.user.as_ref().unwrap()).unwrap().local_modes;
        assert!(modes.contains(LocalModes::ICANON | LocalModes::ECHO), "left in raw mode");
        self.user = None;
        let mut shown = Vec::new();
        // A terminal ends in an error.
        let _ = self.master.read_to_end(&mut shown);
        (status.unwrap().code(), String::from_utf8_lossy(&shown).into_owned())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.vdisk.kill();
        let _ = self.vdisk.wait();
    }
}

#[test]
fn a_program_gets_a_terminal_of_its_own_and_the_users_is_given_back() {
    if !able() {
        return;
    }
    let script = "tty; stty size; echo x > /dev/tty; test -c /dev/console; exit 9";
    let (status, shown) = Terminal::run(&work(), script).ends();
    assert_eq!(shown, "/dev/pts/0\r\n33 99\r\nx\r\n");
    assert_eq!(status, Some(9));
}

#[test]
fn the_interrupt_key_ends_a_program_that_does_not_handle_it() {
    if !able() {
        return;
    }
    let work = work();
    let mut plain = Terminal::run(&work, "exec sleep 7901");
    eventually("the program starts", || !running(&["sleep", "7901"]).is_empty());
    plain.master.write_all(b"\x03").unwrap();
    assert_eq!(plain.ends().0, Some(130));

    let mut handled = Terminal::run(&work, "trap 'exit 4' INT; sleep 7902");
    eventually("the program starts", || !running(&["sleep", "7902"]).is_empty());
    handled.master.write_all(b"\x03").unwrap();
    assert_eq!(handled.ends().0, Some(4));
}

#[test]
fn a_terminal_can_be_asked_for_where_the_user_has_none() {
    if !able() {
        return;
    }
    let work = work();
    let words = "run --tty web.qcow2 -- sh -c";
    let script = "tty; cat; test -t 2 && echo all";
    let words = words.split_whitespace().chain([script]);
    let done = work.command(VDISK, words).finish(Some(b"typed\n".to_vec()), PATIENCE).succeeds();
    let out = done.out();
    // What was typed is echoed whenever the terminal gets it.
    assert!(out.contains("/dev/pts/0\r\n") && out.ends_with("all\r\n"), "{out:?}");
    assert_eq!(out.matches("typed\r\n").count(), 2, "{out:?}");
}
