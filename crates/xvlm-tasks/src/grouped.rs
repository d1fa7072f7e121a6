//! Items of a data set that share images, brought together so that each image is encoded once.

use std::collections::HashMap;
use std::hash::Hash;

use crate::sweep::Answers;

/// An order of items in which those of one key stand together, keys in the order in which they come first.
pub(crate) struct Grouped(Vec<usize>);

impl Grouped {
    pub(crate) fn by<T, K: Hash + Eq>(items: &[T], key: impl Fn(&T) -> K) -> Self {
        let mut groups: HashMap<K, usize> = HashMap::new();
        let group: Vec<usize> = items
            .iter()
            .map(|item| {
                let next = groups.len();
                *groups.entry(key(item)).or_insert(next)
            })
            .collect();
        let mut order: Vec<usize> = (0..items.len()).collect();
        order.sort_by_key(|&item| group[item]);
        Self(order)
    }

    /// The items in this order.
    pub(crate) fn apply<T: Clone>(&self, items: &[T]) -> Vec<T> {
        self.0.iter().map(|&item| items[item].clone()).collect()
    }

    /// Answers to items in this order, in the order that these had before.
    pub(crate) fn undo<A>(&self, answers: Answers<A>) -> Answers<A> {
        let Answers { given, mut left_out } = answers;
        let mut placed: Vec<(usize, Option<A>)> = self.0.iter().copied().zip(given).collect();
        placed.sort_by_key(|(item, _)| *item);
        left_out.iter_mut().for_each(|out| out.item = self.0[out.item]);
        left_out.sort_by_key(|out| out.item);
        Answers { given: placed.into_iter().map(|(_, answer)| answer).collect(), left_out }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sweep::LeftOut;

    #[test]
    fn groups_and_back() {
        let items = ["b1", "a1", "b2", "c1", "a2"];
        let grouped = Grouped::by(&items, |item| item.as_bytes()[0]);
        let together = grouped.apply(&items);
        assert_eq!(together, ["b1", "b2", "a1", "a2", "c1"]);
        let given = together.iter().map(|item| (*item != "a1" && *item != "b2").then_some(*item)).collect();
        let left_out = [1, 2].map(|item| LeftOut { item, problem: together[item].to_owned() }).to_vec();
        let back = grouped.undo(Answers { given, left_out });
        assert_eq!(back.given, [Some("b1"), None, None, Some("c1"), Some("a2")]);
        let left_out: Vec<(usize, &str)> = back.left_out.iter().map(|out| (out.item, out.problem.as_str())).collect();
        assert_eq!(left_out, [(1, "a1"), (2, "b2")]);
    }
}
