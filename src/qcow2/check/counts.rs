//! How often each host cluster is referred to; memory only for the parts of the file in use.

use std::collections::BTreeMap;

/// Clusters of one page: few, so that references scattered over a huge sparse file stay cheap.
const PAGE: u64 = 64;

/// Counts by cluster number.
#[derive(Default)]
pub(in crate::qcow2) struct Counts {
    pages: BTreeMap<u64, Page>,
    /// The page that was counted in last, out of the map: references mostly follow each other.
    current: Option<(u64, Page)>,
}

type Page = Box<[u32]>;

impl Counts {
    /// Notes `times` more references to a cluster; returns how many there are.
    pub fn add(&mut self, cluster: u64, times: u32) -> u64 {
        let page = self.turn_to(cluster / PAGE);
        let count = &mut page[(cluster % PAGE) as usize];
        *count = count.saturating_add(times);
        u64::from(*count)
    }

    /// Notes `times` more references to each of `clusters` clusters; returns the most that any of
    /// them has now.
    pub fn add_run(&mut self, first: u64, clusters: u64, times: u32) -> u64 {
        let (mut at, end, mut most) = (first, first.saturating_add(clusters), 0);
        while at < end {
            let next = ((at / PAGE + 1) * PAGE).min(end);
            let page = self.turn_to(at / PAGE);
            let from = (at % PAGE) as usize;
            for count in &mut page[from..from + (next - at) as usize] {
                *count = count.saturating_add(times);
                most = most.max(*count);
            }
            at = next;
        }
        u64::from(most)
    }

    /// Goes back to `most` references to a cluster: no refcount can say more.
    pub fn limit(&mut self, cluster: u64, most: u64) {
        let page = self.turn_to(cluster / PAGE);
        page[(cluster % PAGE) as usize] = u32::try_from(most).unwrap_or(u32::MAX);
    }

    fn turn_to(&mut self, number: u64) -> &mut Page {
        if self.current.as_ref().is_none_or(|(current, _)| *current != number) {
            self.put_back();
            let page = self.pages.remove(&number);
            self.current = Some((number, page.unwrap_or_else(|| vec![0; PAGE as usize].into())));
        }
        let (_, page) = self.current.get_or_insert_with(|| (number, Page::default()));
        page
    }

    /// Puts the page at hand back: the other calls look in the map, and at it last.
    fn put_back(&mut self) {
        self.pages.extend(self.current.take());
    }

    pub fn get(&self, cluster: u64) -> u64 {
        let number = cluster / PAGE;
        let page = match &self.current {
            Some((current, page)) if *current == number => Some(page),
            _ => self.pages.get(&number),
        };
        page.map_or(0, |page| u64::from(page[(cluster % PAGE) as usize]))
    }

    /// The counts, to be read from now on.
    pub fn finish(mut self) -> Counted {
        self.put_back();
        Counted { pages: self.pages }
    }
}

/// The counts of a walk that is done.
pub(in crate::qcow2) struct Counted {
    pages: BTreeMap<u64, Page>,
}

impl Counted {
    /// Whether the refcounts `stored` of the clusters from `first` on are what was counted.
    pub fn agree(&self, first: u64, stored: &[u64]) -> bool {
        let mut at = first;
        let mut rest = stored;
        while !rest.is_empty() {
            let from = (at % PAGE) as usize;
            let (here, behind) = rest.split_at(rest.len().min(PAGE as usize - from));
            let alike = match self.page(at) {
                Some(page) => same(here, &page[from..]),
                None => here.iter().all(|stored| *stored == 0),
            };
            if !alike {
                return false;
            }
            (at, rest) = (at + here.len() as u64, behind);
        }
        true
    }

    /// The counts around a cluster, to ask of each of its neighbours whether it is unused.
    pub fn page(&self, cluster: u64) -> Option<&[u32]> {
        self.pages.get(&(cluster / PAGE)).map(|page| &page[..])
    }

    /// Whether two clusters have the same [`page`](Counted::page).
    pub fn share_page(&self, a: u64, b: u64) -> bool {
        a / PAGE == b / PAGE
    }

    /// Whether nothing refers to a cluster with that page.
    pub fn is_unused(&self, page: Option<&[u32]>, cluster: u64) -> bool {
        page.is_none_or(|page| page[(cluster % PAGE) as usize] == 0)
    }

    /// The first clusters and counts of all pages that are in use, in order.
    pub fn pages(&self) -> impl Iterator<Item = (u64, &[u32])> {
        self.pages.iter().map(|(number, page)| (number * PAGE, &page[..]))
    }

    /// One past the last cluster in use.
    pub fn end(&self) -> u64 {
        let last = self.pages.iter().next_back();
        let used = last.and_then(|(page, counts)| {
            Some(page * PAGE + counts.iter().rposition(|c| *c > 0)? as u64 + 1)
        });
        used.unwrap_or(0)
    }

    /// All clusters in use, in order, with their counts.
    pub fn used(&self) -> impl Iterator<Item = (u64, u64)> {
        self.pages().flat_map(|(first, counts)| {
            let numbered = (first..).zip(counts);
            numbered.filter(|(_, c)| **c > 0).map(|(cluster, c)| (cluster, u64::from(*c)))
        })
    }
}

/// Whether refcounts are what was counted. All are looked at: that takes no longer.
fn same(stored: &[u64], counted: &[u32]) -> bool {
    let pairs = stored.iter().zip(counted);
    pairs.fold(0, |differ, (stored, counted)| differ | (stored ^ u64::from(*counted))) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_counted_across_pages_and_compared() {
        let mut counts = Counts::default();
        assert_eq!(counts.add_run(60, 10, 1), 1);
        assert_eq!(counts.add_run(69, 3, 2), 3);
        let counts = counts.finish();
        let used: Vec<_> = counts.used().collect();
        assert_eq!((used.len(), used[0], used[9], used[11]), (12, (60, 1), (69, 3), (71, 2)));
        let mut stored = vec![0; 200];
        used.iter().for_each(|(cluster, count)| stored[*cluster as usize] = *count);
        assert!(counts.agree(0, &stored) && counts.agree(50, &stored[50..]));
        for wrong in [59, 63, 64, 71, 72, 199] {
            stored[wrong] += 1;
            assert!(!counts.agree(0, &stored), "{wrong}");
            stored[wrong] -= 1;
        }
    }
}
