//! Launchers of `qkv`.
