//! Large pages: memory that is handed out 2 MiB at a time, not 4 KiB, costs a fraction of the page faults, and of the time that
//! a process takes to give it back when it ends.

use std::mem::MaybeUninit;

/// Of a large page, on x86-64 and, with pages of 4 KiB, on ARM.
const PAGE: usize = 2 << 20;

/// Asks for large pages below a range of memory that is about to be written for the first time. What lies around it in the same
/// pages gets them too. Without effect where the system has none at hand, or the range is small.
pub(crate) fn prefer_large<T>(space: &mut [MaybeUninit<T>]) {
    let bytes = std::mem::size_of_val(space);
    // To make large pages of scattered small ones, which the system does when it has no others, takes longer than they save.
    if bytes < PAGE / 2 || at_hand() < 2 * bytes + PAGE {
        return;
    }
    #[cfg(target_os = "linux")]
    {
        let start = space.as_mut_ptr() as usize;
        let (first, end) = (start / PAGE * PAGE, (start + bytes).next_multiple_of(PAGE));
        // SAFETY: this advice changes the content of no page, whoever it belongs to; where nothing is mapped it is refused.
        unsafe { libc::madvise(first as *mut libc::c_void, end - first, libc::MADV_HUGEPAGE) };
    }
}

/// Bytes that are free in pieces of a large page or more.
fn at_hand() -> usize {
    std::fs::read_to_string("/proc/buddyinfo").map_or(0, |text| text.lines().map(in_large_pieces).sum())
}

/// The same of a line of `/proc/buddyinfo`: after `Node 0, zone Normal`, how many pieces of 4 KiB, 8 KiB, 16 KiB and so on are
/// free in a part of memory.
fn in_large_pieces(line: &str) -> usize {
    let counts = line.split_whitespace().skip(4).map(|count| count.parse::<usize>().unwrap_or(0));
    let sizes = (0..).map(|order| 4096usize << order);
    sizes.zip(counts).filter(|(size, _)| *size >= PAGE).map(|(size, count)| size * count).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_large_pieces_count() {
        let line = "Node 0, zone   Normal  37307  53338  41543  32312  21707  13273   5118   2021    587      7      3";
        assert_eq!(in_large_pieces(line), 7 * (2 << 20) + 3 * (4 << 20));
        assert_eq!(in_large_pieces("Node 0, zone DMA 1 2"), 0);
        assert_eq!(in_large_pieces(""), 0);
    }
}
