//! Secrets, and the encryption of images as options say it.

pub mod crypt;
pub mod keys;
pub mod secret;
