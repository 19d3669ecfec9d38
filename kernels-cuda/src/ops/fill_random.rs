//! Launchers of `fill_random`.
