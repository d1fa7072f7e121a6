//! Open shards: as few as are needed at a time.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Weak};

use crate::shards::OpenShard;

/// Most files that are open at a time: far fewer than a system allows a process.
const FILES: usize = 128;

/// The open shards. Those that lie in temporary files live as long as an order is in them, but for the last few.
#[derive(Debug)]
pub(super) struct Pool {
    spooled: HashMap<usize, Weak<OpenShard>>,
    last_spooled: Recent,
    files: Recent,
}

#[derive(Debug)]
struct Recent {
    most: usize,
    shards: VecDeque<(usize, Arc<OpenShard>)>,
}

impl Pool {
    /// `spools` temporary files are kept though no order is in them.
    pub(super) fn new(spools: usize) -> Self {
        let recent = |most| Recent { most, shards: VecDeque::new() };
        Self { spooled: HashMap::new(), last_spooled: recent(spools), files: recent(FILES) }
    }

    pub(super) fn get(&mut self, part: usize) -> Option<Arc<OpenShard>> {
        self.files.get(part).or_else(|| self.spooled.get(&part)?.upgrade())
    }

    pub(super) fn put(&mut self, part: usize, shard: Arc<OpenShard>) {
        let recent = if shard.is_spooled {
            self.spooled.retain(|_, shard| shard.strong_count() > 0);
            self.spooled.insert(part, Arc::downgrade(&shard));
            &mut self.last_spooled
        } else {
            &mut self.files
        };
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
