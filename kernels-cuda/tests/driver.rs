//! Finding the driver. One test: a process has one driver.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::PathBuf;
use std::process::Command;

use loris_kernels::{Device, DeviceOptions, Error, TWIN, probe};

fn why(path: &str) -> String {
    let driver = Some(PathBuf::from(path));
    match Device::open(&DeviceOptions { index: 0, driver }) {
        Err(Error::NoDriver { path: named, why }) => {
            assert_eq!(named, PathBuf::from(path));
            why
        }
        other => panic!("{path}: {other:?}"),
    }
}

#[test]
fn the_driver_is_found_by_path() {
    // Nothing of the driver is linked.
    let exe = std::env::current_exe().unwrap();
    let libraries = Command::new("ldd").arg(&exe).output().unwrap().stdout;
    assert!(!String::from_utf8(libraries).unwrap().contains("libcuda"));

    // Failures do not stick.
    assert!(why("/nonexistent/libcuda.so.1").contains("No such file"));
    assert!(why("libm.so.6").contains("no cuInit"));
    assert!(why("a\0b").contains("zero byte"));
    assert!(why(&"x".repeat(5000)).contains("too long"));

    let devices = probe(Some(TWIN.as_ref())).unwrap();
    assert_eq!(devices.len(), 1);
    assert_eq!(devices[0].compute, (8, 0));
    assert_eq!(devices[0].driver_version, (13, 0));
    assert!(devices[0].kernels.is_ok());

    // What is loaded stays.
    assert!(why("/nonexistent/libcuda.so.1").contains("already uses"));
    assert!(Device::open(&common::options()).is_ok());
}
