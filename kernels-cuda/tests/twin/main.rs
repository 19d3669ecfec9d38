//! The twin itself: primitives compute what the PTX manual says, planted faults are found, and the driver calls
//! behave as the driver's do, or stricter.

#![allow(clippy::unwrap_used, clippy::macro_metavars_in_unsafe)]

mod driver;
mod faults;
mod primitives;
mod streams;
