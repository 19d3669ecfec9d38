//! Launchers of `embed`.
