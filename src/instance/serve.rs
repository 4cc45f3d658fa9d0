//! What a keeper does when it is asked over its control socket.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::keeper::{Shared, send, terminate};
use super::link::Wish;
use super::record::Phase;
use crate::change::merge::Progress;
use crate::control::{Named, Order, Request, Service};
use crate::error::{Error, ErrorKind, Result};

/// How often who asked is told that it goes on.
const BEAT: Duration = Duration::from_millis(100);
/// How long what is ended may take to close its disk, before its process is killed.
const TO_CLOSE: Duration = Duration::from_secs(30);
/// How long the end of that process may take.
const TO_DIE: Duration = Duration::from_secs(30);

/// The orders that reach a keeper.
pub(super) struct Orders(pub(super) Arc<Shared>);

impl Service for Orders {
    fn holds(&self, _: Named) -> bool {
        // Its disk is held by another process.
        false
    }

    fn serve(&self, request: &Request, told: &mut Progress<'_>) -> Result<Value> {
        let Request::Instance { order } = request else {
            return Err(Error::unsupported("this looks after an instance and holds no disk"));
        };
        match order {
            Order::Stop { patience, again } => {
                self.0.no_more();
                // From here on, that it has come up does not change this.
                self.0.note_again(*again)?;
                self.stop(Duration::from_millis(*patience), told)
            }
            Order::Kill { signal } => self.kill(*signal),
            Order::Pause => self.pause(true),
            Order::Resume => self.pause(false),
            Order::Ended => self.ended(told),
        }
    }
}

impl Orders {
    fn stop(&self, patience: Duration, told: &mut Progress<'_>) -> Result<Value> {
        let record = self.0.record();
        if self.0.wish(Wish::Ask { signal: record.stop_signal }).is_err()
            && let Some(turn) = record.turn
        {
            terminate(turn);
        }
        if record.phase == Phase::Paused {
            // What stands still cannot stop by itself.
            let _ = self.pause(false);
        }
        let mut forced = false;
        let status = match self.over(patience, told) {
            Some(status) => status,
            None => {
                forced = true;
                self.force(told)?
            }
        };
        Ok(json!({ "status": status, "forced": forced }))
    }

    fn force(&self, told: &mut Progress<'_>) -> Result<u8> {
        let _ = self.0.wish(Wish::Kill);
        if let Some(status) = self.over(TO_CLOSE, told) {
            return Ok(status);
        }
        if let Some(turn) = self.0.record().turn {
            send(turn, Signal::SIGKILL);
        }
        let stays = || Error::new(ErrorKind::InUse, "its process does not end");
        self.over(TO_DIE, told).ok_or_else(stays)
    }

    /// How it ended, if it does so within this time. Goes on to wait when who asked is gone.
    fn over(&self, time: Duration, told: &mut Progress<'_>) -> Option<u8> {
        let until = Instant::now() + time;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let over = self.0.over_within(left.min(BEAT));
            if over.is_some() || left.is_zero() {
                return over;
            }
            told(0, 0);
        }
    }

    fn kill(&self, signal: i32) -> Result<Value> {
        let ends = [Signal::SIGKILL as i32, Signal::SIGTERM as i32, self.0.record().stop_signal];
        if ends.contains(&signal) {
            self.0.no_more();
        }
        let wish = match signal == Signal::SIGKILL as i32 {
            true => Wish::Kill,
            false => Wish::Signal { number: signal },
        };
        self.0.wish(wish).map(|()| Value::Null)
    }

    fn pause(&self, wanted: bool) -> Result<Value> {
        self.0.wish(if wanted { Wish::Pause } else { Wish::Resume })?;
        self.0.note_paused(wanted).map(|()| Value::Null)
    }

    fn ended(&self, told: &mut Progress<'_>) -> Result<Value> {
        loop {
            if let Some(status) = self.0.over_within(BEAT) {
                return Ok(json!({ "status": status }));
            }
            if !told(0, 0) {
                return Err(Error::new(ErrorKind::Interrupted, "nobody waits any more"));
            }
        }
    }
}
