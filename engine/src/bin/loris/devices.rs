//! `loris devices`: what can be computed on.

use loris::backend::cpu::Isa;
use loris::{CudaDevice, Error};
use serde_json::{Value, json};

use crate::exit::Failure;
use crate::open;
use crate::report::{Report, bytes};

pub(crate) fn devices(report: &Report) -> Result<(), Failure> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let isa = Isa::detect().to_string();
    let cuda = loris::cuda_devices(open::driver()).map_err(|e| match e {
        Error::NoDevice { reason, .. } => reason,
        e => e.to_string(),
    });
    let text = match report.is_json() {
        true => {
            let isas = Isa::available().into_iter().filter(|isa| !isa.is_emulated());
            let isas: Vec<String> = isas.map(|isa| isa.to_string()).collect();
            let mut devices = vec![json!({
                "name": "cpu", "available": true, "threads": threads, "isa": isa, "isas": isas,
            })];
            match &cuda {
                Ok(found) => devices.extend(found.iter().map(object)),
                Err(reason) => {
                    devices.push(json!({ "name": "cuda", "available": false, "reason": reason }));
                }
            }
            format!("{}\n", json!({ "devices": devices }))
        }
        false => {
            let mut lines = vec![format!("cpu     {threads} threads, {isa}")];
            match &cuda {
                Ok(found) => lines.extend(found.iter().map(line)),
                Err(reason) => lines.push(format!("cuda    none: {reason}")),
            }
            lines.join("\n") + "\n"
        }
    };
    report.print(&text)
}

fn object(device: &CudaDevice) -> Value {
    let (major, minor) = device.compute;
    json!({
        "name": format!("cuda:{}", device.index),
        "available": device.why_not.is_none(),
        "reason": device.why_not,
        "model": device.name,
        "compute": format!("{major}.{minor}"),
        "memory_bytes": device.memory,
    })
}

fn line(device: &CudaDevice) -> String {
    let CudaDevice { index, name, compute: (major, minor), memory, why_not } = device;
    let why_not = why_not.as_ref().map_or(String::new(), |why| format!("; not usable: {why}"));
    format!("cuda:{index}  {name}, {}, compute {major}.{minor}{why_not}", bytes(*memory))
}
