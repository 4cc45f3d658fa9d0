//! Where a guest's network card is plugged in: the host's network in user space, or a TAP device.

use std::sync::Arc;

use crate::virtio::{Frames, Link, Mac};

mod tap;
mod user;

pub use tap::tap;
pub use user::user;

/// A card's address and its link.
pub struct Network {
    /// The card's address.
    pub mac: Mac,
    /// Where frames are sent.
    pub link: Arc<dyn Link>,
    /// Where frames come from.
    pub frames: Box<dyn Frames>,
}
