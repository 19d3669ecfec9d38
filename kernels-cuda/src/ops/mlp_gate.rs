//! Launchers of `mlp_gate`.
