//! First content follows.
