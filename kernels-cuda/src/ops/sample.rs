//! Launchers of `sample`.
