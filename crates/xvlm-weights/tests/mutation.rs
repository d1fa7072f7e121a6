//! Damaged checkpoints: whatever happens to a file's bytes, it is read or refused, without panic and without claiming
//! memory that its size does not justify.

mod common;

use common::*;
use peak_alloc::PeakAlloc;
use proptest::prelude::*;
use proptest::sample::Index;
use xvlm_weights::Checkpoint;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// What happens to some bytes.
#[derive(Clone, Debug)]
enum Mutation {
    Flip(Index, u8),
    Set(Index, u8),
    Insert(Index, Vec<u8>),
    Delete(Index, usize),
    /// Some bytes again, somewhere else.
    Copy(Index, Index, usize),
    /// A length or an offset that is something else.
    Number(Index, u64, usize),
    Truncate(Index),
}

impl Mutation {
    fn apply(&self, bytes: &mut Vec<u8>) {
        if bytes.is_empty() {
            return;
        }
        let at = |index: &Index| index.index(bytes.len());
        match self {
            Self::Flip(index, bit) => {
                let at = at(index);
                bytes[at] ^= 1 << bit;
            }
            Self::Set(index, value) => {
                let at = at(index);
                bytes[at] = *value;
            }
            Self::Insert(index, new) => {
                let at = at(index);
                bytes.splice(at..at, new.iter().copied());
            }
            Self::Delete(index, len) => {
                let at = at(index);
                bytes.drain(at..bytes.len().min(at + len));
            }
            Self::Copy(from, to, len) => {
                let (from, to) = (at(from), at(to));
                let copy = bytes[from..bytes.len().min(from + len)].to_vec();
                bytes.splice(to..to, copy);
            }
            Self::Number(index, value, len) => {
                let at = at(index);
                let len = (*len).min(bytes.len() - at);
                bytes[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
            }
            Self::Truncate(index) => {
                let at = at(index);
                bytes.truncate(at);
            }
        }
    }
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let index = any::<Index>;
    let number = prop_oneof![Just(0), Just(u64::MAX), Just(u64::MAX >> 1), Just(1 << 31), Just(1 << 20), any::<u64>()];
    prop_oneof![
        4 => (index(), 0u8..8).prop_map(|(at, bit)| Mutation::Flip(at, bit)),
        4 => (index(), any::<u8>()).prop_map(|(at, value)| Mutation::Set(at, value)),
        1 => (index(), prop::collection::vec(any::<u8>(), 1..8)).prop_map(|(at, new)| Mutation::Insert(at, new)),
        1 => (index(), 1usize..64).prop_map(|(at, len)| Mutation::Delete(at, len)),
        1 => (index(), index(), 1usize..64).prop_map(|(from, to, len)| Mutation::Copy(from, to, len)),
        2 => (index(), number, 1usize..=8).prop_map(|(at, value, len)| Mutation::Number(at, value, len)),
        1 => index().prop_map(Mutation::Truncate),
    ]
}

/// One whole file of each form.
fn seeds() -> [Vec<u8>; 4] {
    let longs: Vec<u8> = (0..6i64).flat_map(i64::to_le_bytes).collect();
    let floats = floats(&[1., 2., 3., 4., 5., 6., 7., 8.]);
    let code = dict(&[
        (
            "model",
            ordered(&[
                ("whole", view(storage("torch.FloatStorage", "0", 8), 0, &[2, 4], &[4, 1])),
                ("transposed", view(storage("torch.FloatStorage", "0", 8), 1, &[3, 2], &[1, 3])),
                ("expanded", view(storage("torch.FloatStorage", "0", 8), 0, &[3, 8], &[0, 1])),
                ("index", view(storage("torch.LongStorage", "1", 6), 0, &[6], &[1])),
                ("size", call("torch.Size", &[ints(&[2, 3])])),
            ]),
        ),
        ("args", object("argparse.Namespace", dict(&[("lr", float(1e-4)), ("names", list(&[text("a"), none()]))]))),
    ]);
    let mut packed = entries(&code, &[]);
    packed[0] = deflated(&packed[0].name, &packed[0].bytes);
    packed.extend([deflated("net/data/0", &floats), deflated("net/data/1", &longs)]);
    let header = concat!(
        r#"{"w":{"dtype":"F32","shape":[2,4],"data_offsets":[0,32]},"#,
        r#""i":{"dtype":"I64","shape":[6],"data_offsets":[32,80]}}"#
    );
    [
        archive(&code, &[("0", floats.clone()), ("1", longs.clone())]),
        zip(&packed),
        legacy(&code, &[("0", 8, floats.clone()), ("1", 6, longs.clone())]),
        safetensors(header, &[floats, longs].concat()),
    ]
}

/// Opens a file and reads all that it lists; whether all went well.
fn read_all(bytes: &[u8]) -> bool {
    let (_folder, path) = file(bytes);
    let Ok(checkpoint) = Checkpoint::open(&path) else { return false };
    checkpoint.tensors().keys().filter(|name| checkpoint.read(name).is_err()).count() == 0
}

#[test]
fn whatever_happens_to_a_file_it_is_read_or_refused() {
    let seeds = seeds();
    assert!(seeds.iter().all(|seed| read_all(seed)));
    // Two seconds' worth; `PROPTEST_CASES` can ask for more.
    let cases = ProptestConfig::default().cases.max(2000);
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases) };
    let mutations = (0..seeds.len(), prop::collection::vec(mutation(), 1..5));
    proptest!(config, |((seed, mutations) in mutations)| {
        let mut bytes = seeds[seed].clone();
        mutations.iter().for_each(|mutation| mutation.apply(&mut bytes));
        MEMORY.reset_peak_usage();
        let before = MEMORY.current_usage();
        read_all(&bytes);
        let claimed = MEMORY.peak_usage() - before;
        prop_assert!(claimed < bytes.len() * 8 + (16 << 20), "{claimed} bytes for a file of {}", bytes.len());
    });
}
