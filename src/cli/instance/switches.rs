//! What an instance's process can do to a container, and to a virtual machine.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::Signal;
use vdisk::container;
use vdisk::instance::link::{Link, Switches};
use vdisk::vm;
use vdisk::{Error, Result};

/// The exit status of a guest that was ended.
pub const KILLED: u8 = 137;
/// The socket in an instance's directory at which a guest's console, or a container's terminal, is.
pub const CONSOLE: &str = "console";

/// Makes that socket.
pub fn console(dir: &Path) -> Result<UnixListener> {
    let console = dir.join(CONSOLE);
    // An earlier turn's.
    let _ = std::fs::remove_file(&console);
    let failed = |e| Error::io("cannot show the console", e).at_path(dir);
    UnixListener::bind(&console).map_err(failed)
}

/// A container's.
pub struct OfContainer(pub container::Handle);

impl Switches for OfContainer {
    fn ask(&self, signal: i32) -> Result<()> {
        self.0.signal(signal)
    }

    fn signal(&self, number: i32) -> Result<()> {
        self.0.signal(number)
    }

    fn kill(&self) -> Result<()> {
        self.0.kill()
    }

    fn pause(&self) -> Result<()> {
        self.0.pause()
    }

    fn resume(&self) -> Result<()> {
        self.0.resume()
    }
}

/// How those outside come to a virtual machine that is an instance.
pub struct Doors {
    console: UnixListener,
    keeper: Link,
}

impl Doors {
    /// Those of the instance in this directory. Nobody is let in yet.
    pub fn open(dir: &Path) -> Result<Doors> {
        Ok(Doors { console: console(dir)?, keeper: Link::connect(dir)? })
    }
}

/// A virtual machine's.
#[derive(Clone)]
pub struct OfMachine {
    handle: vm::Handle,
    killed: Arc<AtomicBool>,
}

impl OfMachine {
    /// Those of the guest with this handle.
    pub fn of(handle: vm::Handle) -> OfMachine {
        OfMachine { handle, killed: Arc::default() }
    }

    /// Whether it was ended by one of them.
    pub fn killed(&self) -> bool {
        self.killed.load(Ordering::SeqCst)
    }

    /// Lets the keeper of the instance, and who attaches to it, reach the guest.
    pub fn serve(&self, Doors { console: listener, keeper: link }: Doors) -> Result<()> {
        let failed = |e| Error::io("cannot show the console", e);
        let handle = self.handle.clone();
        let attach = move || {
            for stream in listener.incoming().flatten() {
                // One that cannot be attached is closed.
                let _ = handle.attach(stream);
            }
        };
        std::thread::Builder::new().name("attach".into()).spawn(attach).map_err(failed)?;
        link.serve(Arc::new(self.clone()))?;
        link.started();
        Ok(())
    }
}

impl Switches for OfMachine {
    fn ask(&self, _: i32) -> Result<()> {
        self.handle.press_power_button();
        Ok(())
    }

    fn signal(&self, number: i32) -> Result<()> {
        match Signal::try_from(number) {
            Ok(Signal::SIGPWR) => self.ask(number),
            Ok(Signal::SIGTERM | Signal::SIGINT | Signal::SIGHUP | Signal::SIGQUIT) => self.kill(),
            _ => Err(Error::unsupported(
                "a virtual machine takes no signals: PWR presses its power button, TERM and KILL end it",
            )),
        }
    }

    fn kill(&self) -> Result<()> {
        self.killed.store(true, Ordering::SeqCst);
        self.handle.kill();
        Ok(())
    }

    fn pause(&self) -> Result<()> {
        self.handle.pause()
    }

    fn resume(&self) -> Result<()> {
        self.handle.resume();
        Ok(())
    }
}
