//! Launchers of `token_score`.
