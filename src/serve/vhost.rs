//! vhost-user-blk: a disk as the virtio-blk device of a virtual machine that another program runs
//! (QEMU, cloud-hypervisor). Specification: "Vhost-user Protocol", and virtio 1.2, 5.2.
//!
//! The other program hands over the guest's memory and the queues over a socket; that protocol is
//! the crate `vhost-user-backend`'s. Requests are read out of the guest's memory and carried out as
//! those of our own guests are, by [`crate::virtio`]. The guest is untrusted. The program that runs it
//! shares its memory with us: by cutting it short it can end this process, and with it only what
//! it is served itself.
//!
//! A server that ends can be followed by another one under a running guest. The requests of a queue are
//! given back in their order, so those that are under way are all from the index of the used ring on, and
//! that is where the other program has the next server begin: there is nothing to keep in memory that both
//! share (`INFLIGHT_SHMFD`, which the crate does not offer either). It reads that index when it sees the
//! connection end: none is ended while a request is carried out.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{
    ShutdownHandle, VhostUserBackend, VhostUserDaemon, VringMutex, VringState, VringT,
};
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use super::socket::UnixSocket;
use crate::block::BlockDevice;
use crate::error::{Error, Result};
use crate::jail;
use crate::virtio::{self, Block, Id, Memory, Pool, Turn, VirtioDevice};

/// The most queues that a device can have.
pub const MAX_QUEUES: u16 = 64;
/// Descriptors in a queue: QEMU lets its user choose up to so many.
const MAX_QUEUE_SIZE: usize = 1024;
/// Requests after which the one who sets up the queue gets a word in.
const TURN: u64 = 64;
/// How long what is under way may take when the server stops.
const TO_END: Duration = Duration::from_secs(60);
/// How long to wait when the host has no more files or memory.
const PAUSE: Duration = Duration::from_millis(50);

type Shared = GuestMemoryAtomic<Memory>;
type Vring = VringMutex<Shared>;

/// A running server; it ends when this is [stopped](Server::stop) or dropped.
pub struct Server {
    state: Arc<State>,
    disk: Arc<dyn BlockDevice>,
    /// Closed to wake the thread that accepts.
    wake: Option<UnixStream>,
    /// The thread has ended, and gives the socket back: to remove its file may not be the thread's right.
    ended: mpsc::Receiver<UnixSocket>,
}

/// What the threads share.
#[derive(Default)]
struct State {
    stopping: AtomicBool,
    /// What ends the connection that is served now, and its device.
    connection: Mutex<Option<(ShutdownHandle, Arc<Backend>)>>,
}

impl State {
    fn connection(&self) -> MutexGuard<'_, Option<(ShutdownHandle, Arc<Backend>)>> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }
}

impl Server {
    /// Serves `disk` to the programs that connect to `socket`, one after the other.
    pub fn start(
        disk: Arc<dyn BlockDevice>,
        id: Id,
        queues: u16,
        socket: UnixSocket,
    ) -> Result<Server> {
        let failed = |e| Error::io("cannot start to serve", e);
        let queues = queues.clamp(1, MAX_QUEUES);
        let (wake, woken) = UnixStream::pair().map_err(failed)?;
        let (told, ended) = mpsc::channel();
        let state = Arc::new(State::default());
        let offer = Offer { disk: disk.clone(), id, queues };
        let own = state.clone();
        thread::Builder::new()
            .name("vhost".into())
            .spawn(move || {
                jail::narrow(jail::Thread::Connection);
                accept_all(&own, &offer, &socket, &woken);
                drop(offer);
                let _ = told.send(socket);
            })
            .map_err(failed)?;
        Ok(Server { state, disk, wake: Some(wake), ended })
    }

    /// Takes no more requests, carries out those that are under way, and makes all that was
    /// written durable.
    pub fn stop(mut self) -> Result<()> {
        self.finish();
        if self.disk.read_only() { Ok(()) } else { self.disk.flush() }
    }

    fn finish(&mut self) {
        self.state.stopping.store(true, Ordering::SeqCst);
        drop(self.wake.take());
        let connection = self.state.connection().take();
        if let Some((connection, backend)) = connection {
            backend.come_to_rest();
            connection.shutdown();
        }
        drop(self.ended.recv_timeout(TO_END));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.wake.is_some() {
            self.finish();
        }
    }
}

/// What every connection gets.
struct Offer {
    disk: Arc<dyn BlockDevice>,
    id: Id,
    queues: u16,
}

/// Serves one connection after the other, until the other end of `woken` is closed.
fn accept_all(state: &Arc<State>, offer: &Offer, socket: &UnixSocket, woken: &UnixStream) {
    loop {
        let mut ready = [
            PollFd::new(socket.listener().as_fd(), PollFlags::POLLIN),
            PollFd::new(woken.as_fd(), PollFlags::POLLIN),
        ];
        let polled = poll(&mut ready, PollTimeout::NONE);
        if state.is_stopping() {
            return;
        }
        let backend = Backend::new(state.clone(), offer);
        if polled.is_err() || backend.serve(socket).is_err() {
            thread::sleep(PAUSE);
        }
    }
}

/// The device of one connection.
struct Backend {
    state: Arc<State>,
    disk: Arc<dyn BlockDevice>,
    queues: u16,
    /// What the device is: it is never activated, as its queues are ours.
    device: Mutex<Block>,
    /// The feature bits that the driver accepted.
    features: AtomicU64,
    memory: Shared,
    /// Descriptors that the crate takes over and forgets to close.
    exits: Mutex<Vec<RawFd>>,
    /// For each queue, held while requests of it are carried out.
    kept: Vec<Mutex<Kept>>,
}

/// What is kept of a queue from turn to turn.
#[derive(Default)]
struct Kept {
    /// Whether any requests were carried out.
    begun: bool,
    /// Who carries them out, and for which features of the driver.
    requests: Option<(u64, Pool)>,
}

impl Drop for Backend {
    /// The threads that wait on these are gone by now: they hold a backend too.
    fn drop(&mut self) {
        for fd in self.exits.get_mut().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let _ = nix::unistd::close(fd);
        }
    }
}

impl Backend {
    fn new(state: Arc<State>, offer: &Offer) -> Arc<Backend> {
        let (disk, queues) = (offer.disk.clone(), offer.queues);
        let device = Mutex::new(Block::new(disk.clone(), offer.id, queues));
        let (features, memory) = (AtomicU64::new(0), Shared::new(Memory::new()));
        let exits = Mutex::default();
        let kept = (0..queues).map(|_| Mutex::default()).collect();
        Arc::new(Backend { state, disk, queues, device, features, memory, exits, kept })
    }

    fn device(&self) -> MutexGuard<'_, Block> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves the next connection to its end. How it ends is the other program's business.
    fn serve(self: &Arc<Backend>, socket: &UnixSocket) -> io::Result<()> {
        let other = |e: vhost_user_backend::Error| io::Error::other(e.to_string());
        let memory = self.memory.clone();
        let mut daemon =
            VhostUserDaemon::new("vhost-user".into(), self.clone(), memory).map_err(other)?;
        daemon.start(&mut Listener::from(socket.listener().try_clone()?)).map_err(other)?;
        *self.state.connection() = daemon.shutdown_handle().map(|handle| (handle, self.clone()));
        if self.state.is_stopping() {
            self.come_to_rest();
            daemon.request_shutdown();
        }
        let _ = daemon.wait();
        self.state.connection().take();
        // Its threads end with it.
        drop(daemon);
        if !self.disk.read_only() {
            // The next machine may be long in coming. There is nobody to be told of a failure.
            let _ = self.disk.flush();
        }
        Ok(())
    }

    /// Waits until nothing is carried out; nothing more is begun by a server that stops.
    fn come_to_rest(&self) {
        let until = Instant::now() + TO_END;
        for kept in &self.kept {
            while matches!(kept.try_lock(), Err(TryLockError::WouldBlock)) && Instant::now() < until
            {
                thread::sleep(Duration::from_millis(1));
            }
        }
    }

    /// Carries out what waits in a queue, until nothing does.
    fn drain(&self, vring: &Vring, queue: usize) -> io::Result<()> {
        loop {
            let mut ring = vring.get_mut();
            let kept = self.kept.get(queue).ok_or(io::ErrorKind::InvalidInput)?;
            let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
            if self.state.is_stopping() || !ring.is_enabled() || !ring.get_queue().ready() {
                return Ok(());
            }
            // A full counter means that the interrupt is on its way already.
            let tell = |ring: &VringState<Shared>| drop(ring.signal_used_queue());
            // Another server may have carried out the last requests and ended before it said so.
            if !std::mem::replace(&mut kept.begun, true) && ring.get_queue().next_avail() != 0 {
                tell(&ring);
            }
            // Nobody else looks at it before it is put back.
            let mut taken = std::mem::take(ring.get_queue_mut());
            let memory = self.memory.memory();
            let turn = Turn {
                queue: &mut taken,
                memory: &memory,
                stop: &self.state.stopping,
                limit: TURN,
            };
            let served = turn.drain(self.requests(&mut kept), || tell(&ring));
            *ring.get_queue_mut() = taken;
            match served {
                Ok(TURN..) => {}
                Ok(_) => return Ok(()),
                Err(virtio::Broken) => {
                    // The driver sets the queue up again, or never hears from it any more.
                    ring.set_enabled(false);
                    return Ok(());
                }
            }
        }
    }

    /// Who carries out a queue's requests, for the driver that there is now.
    fn requests<'k>(&self, kept: &'k mut Kept) -> &'k mut Pool {
        let features = self.features.load(Ordering::SeqCst);
        let made = kept.requests.take().filter(|(of, _)| *of == features);
        let made = made.unwrap_or_else(|| (features, Pool::new(self.device().executor(features))));
        &mut kept.requests.insert(made).1
    }
}

impl VhostUserBackend for Backend {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        self.queues.into()
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        self.device().features() | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn acked_features(&self, features: u64) {
        self.features.store(features, Ordering::SeqCst);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn reset_device(&self) {
        self.features.store(0, Ordering::SeqCst);
        self.device().reset();
    }

    /// The queues know it already.
    fn set_event_idx(&self, _: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        // The protocol's messages bound it.
        let mut bytes = vec![0; size as usize];
        let mut device = self.device();
        device.refresh();
        device.read_config(offset.into(), &mut bytes);
        bytes
    }

    fn set_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        self.device().write_config(offset.into(), bytes);
        Ok(())
    }

    /// It is the same one, with other contents.
    fn update_memory(&self, _: Shared) -> io::Result<()> {
        Ok(())
    }

    /// A thread for each queue.
    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.queues).map(|queue| 1 << queue).collect()
    }

    fn exit_event(&self, _: usize) -> Option<(EventConsumer, EventNotifier)> {
        let flags = EventFlag::CLOEXEC | EventFlag::NONBLOCK;
        let (consumer, notifier) = new_event_consumer_and_notifier(flags).ok()?;
        let mut exits = self.exits.lock().unwrap_or_else(PoisonError::into_inner);
        exits.push(consumer.as_raw_fd());
        Some((consumer, notifier))
    }

    /// There is a thread for each queue, and it has that queue's number.
    fn handle_event(
        &self,
        event: u16,
        _: EventSet,
        vrings: &[Vring],
        thread: usize,
    ) -> io::Result<()> {
        vrings.get(usize::from(event)).map_or(Ok(()), |vring| self.drain(vring, thread))
    }
}
