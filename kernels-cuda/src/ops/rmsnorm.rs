//! Launchers of `rmsnorm`.
