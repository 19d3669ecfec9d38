//! Launchers of `linear`.
