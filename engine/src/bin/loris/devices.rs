//! `loris devices`: what can be computed on.

use loris::backend::cpu::Isa;
use serde_json::json;

use crate::exit::Failure;
use crate::report::Report;

pub(crate) fn devices(report: &Report) -> Result<(), Failure> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let isa = format!("{:?}", Isa::detect());
    let text = match report.is_json() {
        true => {
            let cpu = json!({ "name": "cpu", "available": true, "threads": threads, "isa": isa });
            let cuda = json!({ "name": "cuda", "available": false, "reason": "not built in yet" });
            format!("{}\n", json!({ "devices": [cpu, cuda] }))
        }
        false => format!("cpu   {threads} threads, {isa}\ncuda  not built in yet\n"),
    };
    report.print(&text)
}
