//! Launchers of `page_copy`.
