//! loris
