//! How often each host cluster is referred to; memory only for the parts of the file in use.

use std::collections::BTreeMap;

/// Clusters of one page: few, so that references scattered over a huge sparse file stay cheap.
const PAGE: u64 = 64;

/// Counts by cluster number.
#[derive(Default)]
pub(in crate::qcow2) struct Counts {
    pages: BTreeMap<u64, Box<[u32]>>,
}

impl Counts {
    /// Notes `times` more references to a cluster.
    pub fn add(&mut self, cluster: u64, times: u32) {
        let page =
            self.pages.entry(cluster / PAGE).or_insert_with(|| vec![0; PAGE as usize].into());
        let count = &mut page[(cluster % PAGE) as usize];
        *count = count.saturating_add(times);
    }

    pub fn get(&self, cluster: u64) -> u64 {
        self.pages.get(&(cluster / PAGE)).map_or(0, |p| u64::from(p[(cluster % PAGE) as usize]))
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
        self.pages.iter().flat_map(|(page, counts)| {
            let numbered = counts.iter().enumerate();
            numbered
                .filter(|(_, c)| **c > 0)
                .map(move |(i, c)| (page * PAGE + i as u64, u64::from(*c)))
        })
    }
}
