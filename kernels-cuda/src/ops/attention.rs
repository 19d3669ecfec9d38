//! Launchers of `attention`.
