//! Launchers of `aux_gather`.
