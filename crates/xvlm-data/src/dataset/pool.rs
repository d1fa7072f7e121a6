//! Open shards: as few as are needed at a time.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::shards::OpenShard;

/// Most files that are open at a time: far fewer than a system allows a process.
const FILES: usize = 128;

/// The open shards that were used last.
#[derive(Debug)]
pub(super) struct Pool {
    /// Temporary files.
    spooled: Recent,
    files: Recent,
}

#[derive(Debug)]
struct Recent {
    most: usize,
    shards: VecDeque<(usize, Arc<OpenShard>)>,
}

impl Pool {
    pub(super) fn new(spools: usize) -> Self {
        let recent = |most| Recent { most, shards: VecDeque::new() };
        Self { spooled: recent(spools), files: recent(FILES) }
    }

    pub(super) fn get(&mut self, part: usize) -> Option<Arc<OpenShard>> {
        self.files.get(part).or_else(|| self.spooled.get(part))
    }

    pub(super) fn put(&mut self, part: usize, shard: Arc<OpenShard>) {
        let recent = if shard.is_spooled { &mut self.spooled } else { &mut self.files };
        recent.shards.truncate(recent.most.saturating_sub(1));
        recent.shards.push_front((part, shard));
    }
}

impl Recent {
    fn get(&mut self, part: usize) -> Option<Arc<OpenShard>> {
        let at = self.shards.iter().position(|(kept, _)| *kept == part)?;
        if at > 0 {
            let found = self.shards.remove(at)?;
            self.shards.push_front(found);
        }
        self.shards.front().map(|(_, shard)| Arc::clone(shard))
    }
}
