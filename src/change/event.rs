//! The layers that one event drops, and that come back together: the steps from its first mark on, which
//! decides, whether a plan goes on or whoever heals what was left.

use crate::change::run::step::Step;
use crate::family::dropped::{events, was_of};
use crate::family::standing::Standing;
use crate::family::tree::{Family, Member};
use crate::image::{Id, Kept, Role, Was};

/// Marks the layers that go with `first`, which is [`Role::Dropping`] and says `kept`, and then that one.
pub(crate) fn drop_rest(family: &Family, first: Id, kept: &Kept) -> Vec<Step> {
    let target = match kept.was {
        Was::Head => family
            .layers
            .iter()
            .find(|m| kept.children.first() == Some(&Kept::short(m.label.layer))),
        _ => family.member(first),
    };
    let Some(target) = target else {
        return vec![Step::mark(first, Role::Dropped, Some(kept.clone()))];
    };
    let above = family.descendants(target.label.layer).into_iter().chain([target]);
    let named: Vec<&Member> = above.filter(|m| m.is_snapshot() && m.label.layer != first).collect();
    // A clone may have been made of one since it was last looked at: that one stays what it is.
    let goes = |m: &&Member| Standing::by_label(&m.path, &m.label, None).is_nobody();
    let going: Vec<&Member> = named.iter().copied().filter(goes).collect();
    let fewer = named.len().saturating_sub(going.len());
    let layers = kept.layers.saturating_sub(u16::try_from(fewer).unwrap_or(u16::MAX));
    let mark = |m: &Member| {
        let kept = Kept { was: Was::Snapshot, children: Vec::new(), layers, ..kept.clone() };
        Step::mark(m.label.layer, Role::Dropped, Some(kept))
    };
    let mut steps: Vec<Step> = going.into_iter().map(mark).collect();
    steps.push(Step::mark(first, Role::Dropped, Some(Kept { layers, ..kept.clone() })));
    steps
}

/// What is left of an undo whose first layer is [`Role::Returning`]. Under the user of a disk the head
/// stays: he would see another disk.
pub(crate) fn finish(family: &Family, in_use: bool) -> Vec<Step> {
    let Some(first) = family.members().find(|m| m.label.role == Role::Returning) else {
        return Vec::new();
    };
    let Some(kept) = &first.label.kept else { return Vec::new() };
    let all = events(family);
    let event = all.iter().find(|e| e.kept.event == kept.event);
    let others: Vec<&Member> = event.map_or(Vec::new(), |event| event.layers.clone());
    if in_use && kept.was == Was::Head {
        return others.iter().map(|m| Step::restore(m.label.layer)).collect();
    }
    bring_back(family, first, &others)
}

/// Brings back what goes with the layer `first`: the others before, it last.
pub(crate) fn bring_back(family: &Family, first: &Member, others: &[&Member]) -> Vec<Step> {
    let mut steps: Vec<Step> = others.iter().map(|m| Step::restore(m.label.layer)).collect();
    let id = first.label.layer;
    match was_of(first) {
        Some(Was::Head) => {
            let (file, over) = (first.path.clone(), family.head.path.clone());
            if id != family.head.label.layer {
                steps.push(Step::TakeName { file, over });
            }
            steps.push(Step::BecomeHead);
        }
        Some(Was::Merged) => {
            let moved = moved_off(family, first);
            steps.extend(moved.iter().map(|m| Step::MoveBack { layer: m.label.layer, onto: id }));
            steps.push(Step::restore(id));
        }
        Some(Was::Snapshot) => steps.push(Step::restore(id)),
        None => {}
    }
    steps
}

/// The layers that stood on a merged snapshot and now stand on its parent.
pub(crate) fn moved_off<'a>(family: &'a Family, merged: &Member) -> Vec<&'a Member> {
    let own = merged.label.kept.iter().flat_map(|k| &k.children).collect::<Vec<_>>();
    let is_own = |m: &&Member| own.contains(&&Kept::short(m.label.layer));
    let same_parent =
        |m: &&Member| m.parent() == merged.parent() || m.parent() == Some(merged.label.layer);
    family.members().filter(is_own).filter(same_parent).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::run::step::Relabel;
    use crate::family::frozen_path;
    use crate::image::{Identity, Label, Parent};
    use crate::open::disk::Peek;
    use std::path::Path;

    /// The layers of a disk, each with the one that it stands on.
    fn member(path: &Path, name: &str, id: u128, on: u128) -> Member {
        let parent = Parent { layer: Id::from_u128(on), content: Id::nil(), stamp: None };
        let role = if name.is_empty() { Role::Head } else { Role::Snapshot };
        let (layer, name) = (Id::from_u128(id), name.to_owned());
        let label = Label { layer, name, role, parent: Some(parent), ..Label::new() };
        let identity = Identity { label: Some(label.clone()), backing: None, vouched: false };
        let path = if role == Role::Head { path.into() } else { frozen_path(path, layer) };
        Member { path, label, peek: Peek { identity, size: 0, allocated: 0 } }
    }

    /// `one`, on that `two` and the head, on `two` `three`.
    fn family() -> Family {
        let path = Path::new("/d/disk.qcow2");
        let head = member(path, "", 9 << 100, 1 << 100);
        let mut family = Family::of_one(path, head.label, head.peek);
        family.put(member(path, "one", 1 << 100, 0));
        family.put(member(path, "two", 2 << 100, 1 << 100));
        family.put(member(path, "three", 3 << 100, 2 << 100));
        family
    }

    fn apply(family: &mut Family, step: &Step) {
        let Step::Label(Relabel { layer, role, kept, .. }) = step else { panic!("{step:?}") };
        let member = family.member(*layer).unwrap().clone();
        let label = Label { role: *role, kept: kept.clone(), ..member.label };
        family.put(Member { label, ..member });
    }

    fn kept(layers: u16) -> Kept {
        let (since, until, children) = (1, u64::MAX, Vec::new());
        Kept { event: 7, layers, was: Was::Snapshot, since, until, uptime: None, children }
    }

    /// The layers that steps are about, and what they are to be.
    fn told(steps: &[Step]) -> Vec<(u128, Role)> {
        let told = steps.iter().map(|step| match step {
            Step::Label(to) => (to.layer.as_u128() >> 100, to.role),
            other => panic!("{other:?}"),
        });
        told.collect()
    }

    #[test]
    fn a_delete_that_stops_at_any_step_is_finished_by_the_steps_that_were_left() {
        let first = Id::from_u128(2 << 100);
        let mut family = family();
        apply(&mut family, &Step::mark(first, Role::Dropping, Some(kept(2))));
        let all = drop_rest(&family, first, &kept(2));
        assert_eq!(told(&all), [(3, Role::Dropped), (2, Role::Dropped)]);
        for done in 0..all.len() {
            assert_eq!(told(&drop_rest(&family, first, &kept(2))), told(&all[done..]));
            apply(&mut family, &all[done]);
        }
        let event = &events(&family)[0];
        assert!(event.is_whole() && event.lowest().unwrap().label.name == "two");
    }

    #[test]
    fn an_undo_that_stops_at_any_step_is_finished_by_the_steps_that_were_left() {
        let first = Id::from_u128(2 << 100);
        let mut family = family();
        for step in drop_rest(&family, first, &kept(2)) {
            apply(&mut family, &step);
        }
        apply(&mut family, &Step::mark(first, Role::Returning, Some(kept(2))));
        let all = finish(&family, false);
        assert_eq!(told(&all), [(3, Role::Snapshot), (2, Role::Snapshot)]);
        for done in 0..all.len() {
            assert_eq!(told(&finish(&family, false)), told(&all[done..]));
            apply(&mut family, &all[done]);
        }
        assert!(finish(&family, false).is_empty());
        assert!(family.layers.iter().all(Member::is_snapshot));
    }
}
