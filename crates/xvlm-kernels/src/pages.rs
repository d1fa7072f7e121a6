//! Large pages: memory that is handed out 2 MiB at a time, not 4 KiB, costs a fraction of the page faults, and of the time that
//! a process takes to give it back when it ends.

use std::mem::MaybeUninit;

/// Asks for large pages below a range of memory that is about to be written for the first time. What lies around it in the same
/// pages gets them too. Without effect where the system has none, or the range is small.
pub(crate) fn prefer_large<T>(space: &mut [MaybeUninit<T>]) {
    #[cfg(target_os = "linux")]
    {
        /// Of a large page, on x86-64 and, with pages of 4 KiB, on ARM.
        const PAGE: usize = 2 << 20;
        let bytes = std::mem::size_of_val(space);
        if bytes < PAGE / 2 {
            return;
        }
        let start = space.as_mut_ptr() as usize;
        let (first, end) = (start / PAGE * PAGE, (start + bytes).next_multiple_of(PAGE));
        // SAFETY: this advice changes the content of no page, whoever it belongs to; where nothing is mapped it is refused.
        unsafe { libc::madvise(first as *mut libc::c_void, end - first, libc::MADV_HUGEPAGE) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = space;
}
