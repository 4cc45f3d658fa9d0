//! Chains on layers that nobody uses, which are opened to take in what another layer holds.

use crate::chain::{Chain, Layer};
use crate::change::run::layer::same_contents;
use crate::error::{Error, Result};
use crate::family::tree::Member;
use crate::open::gate::same_file;
use crate::open::sameness::Rewriting;
use crate::open::walk::by_label;
use crate::open::{Walk, open_image, open_layers};

/// A chain on a layer that nobody uses.
pub(crate) struct Unused {
    // Goes first: the layer is closed when its label says what it looks like.
    chain: Chain,
    _rewriting: Rewriting,
}

impl Unused {
    /// `chain`, whose head is about to be changed so that it shows the same.
    fn new(chain: Chain) -> Result<Unused> {
        let rewriting = Rewriting::begin(&chain.head())?;
        Ok(Unused { chain, _rewriting: rewriting })
    }

    /// Opens `member` with all below it, and the layer right below.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`](crate::ErrorKind::Corrupt) where that is not `lower`.
    pub fn on(member: &Member, lower: &Member) -> Result<(Unused, Layer)> {
        let chain = open_layers(&member.path, &same_contents())?;
        let below = chain.all_layers().get(1).cloned();
        let below = below.filter(|l| same_file(&l.path, &lower.path)).ok_or_else(|| {
            Error::corrupt("does not stand on the layer that its label names").at_path(&member.path)
        })?;
        Ok((Unused::new(chain)?, below))
    }

    /// Opens `member` with all below it.
    pub fn alone(member: &Member) -> Result<Unused> {
        Unused::new(open_layers(&member.path, &same_contents())?)
    }

    /// Opens `member`, for taking over what `lower` below it holds, which is open.
    pub fn over(member: &Member, lower: &Layer) -> Result<Unused> {
        let options = same_contents();
        let mut walk = Walk::from_head(open_image(&member.path, &options)?, &options, &by_label)?;
        walk.put(lower.clone())?;
        Unused::new(walk.down_to_the_base()?)
    }

    pub fn chain(&self) -> &Chain {
        &self.chain
    }
}
