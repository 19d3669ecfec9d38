//! Launchers of `lm_head`.
