//! Which way a merge goes: up or down, by copying or by sharing, what that costs, and the steps of it.

use std::path::Path;

use crate::change::run::fold;
use crate::change::run::fold::free_space;
use crate::change::run::step::{Direction, Fold, Method, Step, Strategy};
use crate::error::{Error, ErrorKind, Result};
use crate::family::beside::Beside;
use crate::family::cost::{cost, data_bytes, look};
use crate::family::dropped::is_shown;
use crate::family::tree::{Family, Member};
use crate::image::{Id, Kept, Role};
use crate::storage::name::directory;
use crate::storage::shares_space;

/// Bytes that are copied as fast as this many bytes are shared, at least.
const SHARING: u64 = 32;
/// Sharing is always worth it for layers up to this size.
const ALWAYS_SHARED: u64 = 1 << 30;
/// The least free space with which a fold in batches is begun.
const ELBOW_ROOM: u64 = 4 << 20;

/// The cheaper way for a layer and those that stand on it.
///
/// While the disk is in use its head stays the file that it is, and below it only what a layer hides
/// as a whole is written into another one.
pub(crate) fn choose(
    layer: &Member,
    on: &[&Member],
    share: bool,
    in_use: bool,
) -> Result<Strategy> {
    let lower = look(layer)?;
    let vouches = lower.image.details().is_some_and(|d| d.version != Some(2));
    let (mut may_hide, mut may_take) = (true, true);
    let (mut up, mut packed, mut upper, mut both) = (0, 0, 0, 0);
    for child in on {
        let above = look(child)?.image;
        // Who stands on the child knows it by an id that the layer could not vouch for.
        may_take &= vouches || !child.label.is_marked();
        may_hide &= child.label.role != Role::Head
            && above.granularity().bits() >= lower.image.cluster().bits();
        let cost = cost(&*above, &*lower.image)?;
        (up, packed) = (up + cost.only_lower, packed + cost.packed);
        (upper, both) = (upper + cost.upper, both + cost.both);
    }
    let own = data_bytes(&*lower.image)?;
    let freed = own.saturating_sub(up);
    // A shorter child would have to cut the layer.
    let longer = on.iter().all(|m| m.peek.size >= layer.peek.size);
    let may_go_down = on.len() == 1 && longer && may_take && (may_hide || !in_use);
    let worth_sharing = up <= ALWAYS_SHARED.max(upper.saturating_mul(SHARING));
    if share && (worth_sharing || !may_go_down) {
        let why = "the host lets files share bytes, so hardly any are copied, and it can be undone";
        let (moved, linked) = (packed, up - packed);
        let (direction, method) = (Direction::Up, Method::Share);
        return Ok(Strategy { direction, method, moved, linked, space: packed, freed, why });
    }
    let method = Method::Copy;
    if may_go_down && upper < up {
        let why = "what stands on it holds less than it";
        let (direction, space) = (Direction::Down, upper - both);
        return Ok(Strategy {
            direction,
            method,
            moved: upper,
            linked: 0,
            space,
            freed: both,
            why,
        });
    }
    let why = match on.len() {
        1 if may_go_down => "it holds less than what stands on it",
        1 if !longer => "what stands on it is a smaller disk",
        1 if !may_take => {
            "clones stand on what stands on it, and its format could not vouch for that"
        }
        1 => "the disk is in use",
        _ => "several layers stand on it, and each needs what it holds",
    };
    Ok(Strategy { direction: Direction::Up, method, moved: up, linked: 0, space: up, freed, why })
}

impl Strategy {
    /// Goes the same way in batches.
    pub fn in_batches(&mut self, path: &Path) -> Result<()> {
        if self.method != Method::Copy {
            return Ok(());
        }
        self.method = Method::Batches;
        // What several layers take is not all given back by the one that loses it.
        let given_back = match self.direction {
            Direction::Down => self.moved,
            Direction::Up => self.freed.saturating_add(self.moved),
        };
        self.space = fold::batch(path)?.min(self.moved) + self.moved.saturating_sub(given_back);
        Ok(())
    }
}

/// What folding a layer without a name into the one that will be left on it costs; `None` where several
/// will be, or none that is shown.
pub(crate) fn for_unnamed(
    family: &Family,
    layer: &Member,
    in_use: bool,
) -> Result<Option<Strategy>> {
    let on = family.children(layer.label.layer);
    let on: Vec<&Member> = on.into_iter().filter(|m| is_shown(family, m)).collect();
    if on.len() != 1 || !Beside::read(family)?.is_own(layer) {
        return Ok(None);
    }
    choose(layer, &on, shares_space(directory(&layer.path)), in_use).map(Some)
}

/// The same way, in batches where the host has no room for it otherwise.
///
/// # Errors
/// [`ErrorKind::NoSpace`] where it has none for that either.
pub(crate) fn within_space(mut strategy: Strategy, path: &Path) -> Result<Strategy> {
    let free = free_space(path)?;
    if strategy.space > free {
        strategy.in_batches(path)?;
        check_space(path, &strategy, free)?;
    }
    Ok(strategy)
}

/// The steps of a fold, as the family is: up or down, then away with what is needed no more.
///
/// Up: what the layer holds is copied into each of its children, which do not show anything else
/// for it; then they are moved to its parent, and it goes. Until that moment the old tree stands.
///
/// Down: what its only child holds is written into the layer, which then takes the child's place
/// and name. The child shows its own contents at every moment, so the disk is right throughout; but
/// the snapshot is no restore point from the first write on, and so is marked before it.
///
/// In batches, either way: what was copied and is durable is given back where it came from. Then
/// neither neighbour can do without the other until the merge is finished.
pub(crate) fn steps(family: &Family, fold: &Fold) -> Result<Vec<Step>> {
    let from = fold.layer;
    let member = family.layer(from)?;
    let into: Vec<Id> = family.children(from).iter().map(|m| m.label.layer).collect();
    let method = fold.strategy.method;
    // Before anything moves: from here on those on the layer can do without its bitmaps.
    let mut steps = vec![Step::TakeBitmaps { from, into: into.clone() }];
    match (fold.strategy.direction, method) {
        (Direction::Down, _) => {
            // Who may not make it what the child is had better hear it now.
            let like = |child: &Id| Step::BecomeAccessibleAs { layer: from, like: *child };
            steps.extend(into.iter().map(like));
            steps.push(Step::mark(from, Role::Merging, None));
            steps.extend(down(family, member, method == Method::Batches)?);
        }
        (Direction::Up, Method::Batches) => {
            steps.push(Step::mark(from, Role::Rising, None));
            steps.extend(rise(family, from));
        }
        (Direction::Up, _) => {
            let children = into.iter().map(|child| Kept::short(*child)).collect();
            let kept = fold.kept.clone().map(|kept| Kept { children, ..kept });
            steps.push(Step::FoldUp { from, into, method });
            steps.push(Step::mark(from, Role::Leaving, kept.clone()));
            steps.extend(leave(family, from, kept));
        }
    }
    steps.push(Step::Reload);
    Ok(steps)
}

/// What is left of the merge of a layer, by what its label says.
pub(crate) fn resume(family: &Family, layer: Id, in_use: bool) -> Result<Vec<Step>> {
    let Some(member) = family.layers.iter().find(|m| m.label.layer == layer) else {
        return Ok(Vec::new());
    };
    let mut steps = match member.label.role {
        Role::Leaving => return Ok(leave(family, layer, member.label.kept.clone())),
        Role::Rising => rise(family, layer),
        // Under its user the head stays what it is. Either way holds all that the disk shows.
        Role::Merging if in_use && stands_on(family, member) => {
            let mut steps = vec![Step::mark(layer, Role::Rising, None)];
            steps.extend(rise(family, layer));
            steps
        }
        Role::Merging => {
            let mut held = 0;
            for child in family.children(layer) {
                held += data_bytes(&*look(child)?.image)?;
            }
            down(family, member, held > free_space(&family.head.path)?)?
        }
        _ => Vec::new(),
    };
    steps.push(Step::Reload);
    Ok(steps)
}

/// Whether the head stands right on the layer.
pub(crate) fn stands_on(family: &Family, layer: &Member) -> bool {
    family.head.parent() == Some(layer.label.layer)
}

/// What the only child of a merging layer holds is written into it; then it takes the child's place.
fn down(family: &Family, layer: &Member, in_batches: bool) -> Result<Vec<Step>> {
    let into = layer.label.layer;
    let children = family.children(into);
    let [child] = &children[..] else {
        let message = "is being merged, but not exactly one layer stands on it";
        return Err(Error::corrupt(message).at_path(&layer.path));
    };
    let from = child.label.layer;
    Ok(vec![
        Step::FoldDown { from, into, in_batches },
        Step::TakeLabel { from, into },
        Step::TakeName { file: layer.path.clone(), over: child.path.clone() },
    ])
}

/// What a rising layer holds goes into those on it, batch by batch, and then they to its parent.
fn rise(family: &Family, from: Id) -> Vec<Step> {
    let into = family.children(from).iter().map(|m| m.label.layer).collect();
    let mut steps = vec![
        Step::FoldUp { from, into, method: Method::Batches },
        Step::mark(from, Role::Leaving, None),
    ];
    steps.extend(leave(family, from, None));
    steps
}

/// The children of a layer that is leaving move to its parent. Then it goes, or is kept.
fn leave(family: &Family, off: Id, kept: Option<Kept>) -> Vec<Step> {
    let children = family.children(off);
    let moves = children.iter().map(|m| Step::MoveOff { layer: m.label.layer, off });
    let mut steps: Vec<Step> = moves.collect();
    if kept.is_some() {
        steps.push(Step::mark(off, Role::Dropped, kept));
    } else {
        steps.extend([Step::Remove(off), Step::SyncNames]);
    }
    steps
}

/// Refuses a merge for which the host has no room, before anything is changed.
pub(crate) fn check_space(path: &Path, strategy: &Strategy, free: u64) -> Result<()> {
    if strategy.space.max(strategy.moved.min(ELBOW_ROOM)) <= free {
        return Ok(());
    }
    let message = format!(
        "the host has no space for the merge, which takes {} bytes of it for a time; {free} are free, \
         and nothing was changed",
        strategy.space
    );
    Err(Error::new(ErrorKind::NoSpace, message).at_path(path))
}
