//! virtio-net (virtio 1.2, 5.1): a network card with one pair of queues and no offloads.
//!
//! It knows Ethernet frames and queues, not the transport and not where frames go: that is a [`Link`].

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_MAC, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::Bytes;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::request::Unanswerable;
use super::ring::{Broken, Serve};
use super::worker::Worker;
use super::{Activation, ActiveQueue, Interrupt, Memory, VirtioDevice};
use crate::error::{Error, Result};

const QUEUE_SIZE: u16 = 256;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// What stands before each frame (`virtio_net_hdr`): without offloads its only meaning is that one
/// buffer holds the frame.
const HEADER: usize = 12;
const ONE_BUFFER: [u8; HEADER] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
/// The longest frame that a link carries.
pub const MAX_FRAME: usize = 65550;
/// Frames that are given to the driver before it is told, where many have come.
const BATCH: usize = 64;

/// A card's address.
pub type Mac = [u8; 6];

/// Where the card's frames go to and come from.
pub trait Link: Send + Sync {
    /// Readable while a frame may be there, writable while one may be sent.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Sends a frame. [`io::ErrorKind::WouldBlock`] while there is no room for one.
    fn send(&self, frame: &[u8]) -> io::Result<()>;
}

/// The frames that come over a link. One thread has it at a time.
pub trait Frames: Send {
    /// The next frame's length in `buffer`; `None` where none is there now.
    ///
    /// # Errors
    /// The link is gone.
    fn receive(&mut self, buffer: &mut [u8; MAX_FRAME]) -> io::Result<Option<usize>>;
}

/// A network card.
pub struct Net {
    mac: Mac,
    link: Arc<dyn Link>,
    /// Taken by the thread that receives, which gives it back when it ends.
    frames: Option<Box<dyn Frames>>,
    receiver: Option<Receiver>,
    sender: Option<Worker>,
    /// Ends a send that waits for room.
    stop: Arc<AtomicBool>,
}

impl Net {
    /// A card with this address, plugged into a link.
    pub fn new(mac: Mac, link: Arc<dyn Link>, frames: Box<dyn Frames>) -> Net {
        let stop = Arc::default();
        Net { mac, link, frames: Some(frames), receiver: None, sender: None, stop }
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        let bits = [
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_STATUS,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
        ];
        bits.into_iter().fold(0, |set, bit| set | 1 << bit)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut space = [0; 8];
        space[..6].copy_from_slice(&self.mac);
        space[6..].copy_from_slice(&(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
        super::config::read(&space, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<()> {
        let Activation { memory, queues, interrupt, .. } = activation;
        self.stop.store(false, Ordering::SeqCst);
        for active in queues {
            let (memory, interrupt) = (memory.clone(), interrupt.clone());
            match active.index {
                RECEIVE => {
                    if let Some(frames) = self.frames.take() {
                        let source = Source { link: Arc::clone(&self.link), frames };
                        self.receiver = Some(Receiver::start(source, active, memory, interrupt)?);
                    }
                }
                TRANSMIT => {
                    let (link, stop) = (Arc::clone(&self.link), Arc::clone(&self.stop));
                    let serve = Sender { link, stop, frame: Vec::new() };
                    let started = Worker::start("virtio-net", active, memory, serve, interrupt)?;
                    self.sender = Some(started);
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.sender = None;
        if let Some(frames) = self.receiver.take().and_then(Receiver::stop) {
            self.frames = Some(frames);
        }
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.reset();
    }
}

/// Takes frames from the driver.
struct Sender {
    link: Arc<dyn Link>,
    stop: Arc<AtomicBool>,
    frame: Vec<u8>,
}

impl Serve for Sender {
    fn serve<'m>(
        &mut self,
        chain: DescriptorChain<&'m Memory>,
        memory: &'m Memory,
    ) -> std::result::Result<u32, Unanswerable> {
        self.frame.clear();
        for descriptor in chain.readable() {
            let (start, len) = (self.frame.len(), descriptor.len() as usize);
            // No link carries it: it is lost, as on a wire.
            if start + len > HEADER + MAX_FRAME {
                return Ok(0);
            }
            self.frame.resize(start + len, 0);
            let piece = self.frame.get_mut(start..).unwrap_or_default();
            memory.read_slice(piece, descriptor.addr()).map_err(|_| Unanswerable)?;
        }
        let frame = self.frame.get(HEADER..).unwrap_or_default();
        while !frame.is_empty() && !self.stop.load(Ordering::SeqCst) {
            match self.link.send(frame) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let mut room = [PollFd::new(self.link.fd(), PollFlags::POLLOUT)];
                    // A moment at most: the device may be told to stop.
                    let _ = poll(&mut room, PollTimeout::from(20u8));
                }
                // What is lost on the way is for those above to send again.
                _ => break,
            }
        }
        Ok(0)
    }
}

/// Where frames for the driver come from.
struct Source {
    link: Arc<dyn Link>,
    frames: Box<dyn Frames>,
}

/// A thread that gives frames to the driver.
struct Receiver {
    stop: Arc<AtomicBool>,
    kick: EventFd,
    thread: JoinHandle<Box<dyn Frames>>,
}

impl Receiver {
    fn start(
        Source { link, frames }: Source,
        active: ActiveQueue,
        memory: Arc<Memory>,
        interrupt: Arc<dyn Interrupt>,
    ) -> Result<Receiver> {
        let failed = |error| Error::io("cannot start a network card's thread", error);
        let ActiveQueue { queue, kick, .. } = active;
        let stop = Arc::new(AtomicBool::new(false));
        let own = kick.try_clone().map_err(failed)?;
        let told = Arc::clone(&stop);
        let events = Events::new(&own, &*link).map_err(failed)?;
        let mut receiving =
            Receiving { link, frames, queue, memory, interrupt, kick: own, stop: told, events };
        let thread = std::thread::Builder::new()
            .name("virtio-net-rx".into())
            .spawn(move || {
                if receiving.run().is_err() {
                    receiving.interrupt.needs_reset();
                }
                receiving.frames
            })
            .map_err(failed)?;
        Ok(Receiver { stop, kick, thread })
    }

    /// Returns when the thread has ended; `None` where it has died of a panic.
    fn stop(self) -> Option<Box<dyn Frames>> {
        self.stop.store(true, Ordering::SeqCst);
        // A full counter wakes it as well.
        let _ = self.kick.write(1);
        let ended = self.thread.join();
        debug_assert!(ended.is_ok(), "a device's thread died");
        ended.ok()
    }
}

struct Receiving {
    link: Arc<dyn Link>,
    frames: Box<dyn Frames>,
    queue: Queue,
    memory: Arc<Memory>,
    interrupt: Arc<dyn Interrupt>,
    kick: EventFd,
    stop: Arc<AtomicBool>,
    events: Events,
}

/// What a receiver waits for.
struct Events {
    epoll: Epoll,
    /// Whether it waits for frames too, and not for buffers alone.
    framed: bool,
}

const KICK: u64 = 0;
const FRAME: u64 = 1;

impl Events {
    fn new(kick: &EventFd, link: &dyn Link) -> io::Result<Events> {
        let epoll = Epoll::new()?;
        let kicked = EpollEvent::new(EventSet::IN, KICK);
        epoll.ctl(ControlOperation::Add, kick.as_raw_fd(), kicked)?;
        let framed = EpollEvent::new(EventSet::IN, FRAME);
        epoll.ctl(ControlOperation::Add, link.fd().as_raw_fd(), framed)?;
        Ok(Events { epoll, framed: true })
    }

    /// Waits for a kick, and where `framed` for a frame; whether there was a kick.
    fn wait(&mut self, link: &dyn Link, framed: bool) -> io::Result<bool> {
        if framed != self.framed {
            let fd = link.fd().as_raw_fd();
            let operation = if framed { ControlOperation::Add } else { ControlOperation::Delete };
            self.epoll.ctl(operation, fd, EpollEvent::new(EventSet::IN, FRAME))?;
            self.framed = framed;
        }
        let mut events = [EpollEvent::default(); 2];
        let count = self.epoll.wait(-1, &mut events)?;
        Ok(events.iter().take(count).any(|event| event.data() == KICK))
    }
}

impl Receiving {
    fn run(&mut self) -> std::result::Result<(), Broken> {
        let mut buffer = Box::new([0; MAX_FRAME]);
        // A frame that waits for a buffer.
        let mut held = None;
        let mut gone = false;
        while !self.stop.load(Ordering::SeqCst) {
            let mut given = 0;
            while given < BATCH && !gone {
                if held.is_none() {
                    match self.frames.receive(&mut buffer) {
                        Ok(frame) => held = frame,
                        Err(_) => gone = true,
                    }
                }
                let Some(len) = held else { break };
                if !self.give(buffer.get(..len).unwrap_or_default())? {
                    break;
                }
                held = None;
                given += 1;
            }
            if given > 0 && self.queue.needs_notification(&*self.memory)? {
                self.interrupt.queue_used(RECEIVE);
            }
            if given < BATCH {
                self.wait(held.is_some(), gone)?;
            }
        }
        Ok(())
    }

    /// Waits for a frame, or where one waits already, for a buffer.
    fn wait(&mut self, held: bool, gone: bool) -> std::result::Result<(), Broken> {
        if held && self.queue.enable_notification(&*self.memory)? {
            // One has come meanwhile.
            return Ok(());
        }
        match self.events.wait(&*self.link, !held && !gone) {
            // Its count says nothing: buffers are looked for.
            Ok(true) => drop(self.kick.read()),
            Ok(false) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return Err(Broken),
        }
        self.queue.disable_notification(&*self.memory)?;
        Ok(())
    }

    /// Puts a frame into the next buffer; `false` where there is none.
    fn give(&mut self, frame: &[u8]) -> std::result::Result<bool, Broken> {
        let memory = &*self.memory;
        let Some(chain) = self.queue.iter(memory)?.next() else { return Ok(false) };
        let head = chain.head_index();
        let mut left: [&[u8]; 2] = [&ONE_BUFFER, frame];
        let mut written = 0;
        for descriptor in chain.writable() {
            let (mut at, mut room) = (descriptor.addr(), descriptor.len() as usize);
            for part in &mut left {
                let (now, later) = part.split_at(part.len().min(room));
                memory.write_slice(now, at).map_err(|_| Broken)?;
                at = vm_memory::GuestAddress(at.0.saturating_add(now.len() as u64));
                (*part, room, written) = (later, room - now.len(), written + now.len());
            }
        }
        // A frame that does not fit is lost; its buffer goes back empty.
        let whole = left.iter().all(|part| part.is_empty());
        self.queue.add_used(memory, head, if whole { written as u32 } else { 0 })?;
        Ok(true)
    }
}
