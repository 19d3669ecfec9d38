//! Launchers of `token_select`.
