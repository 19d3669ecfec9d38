//! The twin itself: primitives compute what the PTX manual says, planted faults are found, and the driver calls
//! behave as the driver's do, or stricter.

mod driver;
mod faults;
mod primitives;
mod streams;
