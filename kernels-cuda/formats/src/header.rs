//! What the build makes for kernels: names of those for each pair of codings, `formats.h` and `codings.h`.

use crate::{CODINGS, Coding, FORMATS, PAIRS, SKEW, STRIP, WIDE};

/// Widths of heads that there are kernels for.
pub const HEAD_DIMS: [usize; 3] = [32, 64, 128];

/// What tells kernels of a family apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Keys and values.
    Pairs,
    /// Keys, and whether anything is coded.
    Keys,
}

impl Family {
    /// What the kernel for a pair of codings and a width of heads is called, behind the family's name: `d64_kvint8`.
    /// `None` where such heads cannot be coded so.
    pub fn variant(self, pair: (Coding, Coding), head_dim: usize) -> Option<String> {
        let (k, v) = pair;
        let fits = [k, v].iter().all(|coding| head_dim.is_multiple_of(coding.unit()));
        let format = FORMATS.iter().find(|row| (row.k.coding, row.v.coding) == pair);
        let codings = match (self, format) {
            _ if !k.is_coded() && !v.is_coded() => String::new(),
            (Self::Keys, _) => format!("_k{k}"),
            (Self::Pairs, Some(row)) => format!("_kv{}", row.name.replace('-', "_")),
            (Self::Pairs, None) => format!("_kv{k}_{v}"),
        };
        fits.then(|| format!("d{head_dim}{codings}"))
    }

    /// Its kernels as a list for the preprocessor: `ROW(D, K, V, variant, ..)`.
    fn list(self, name: &str) -> String {
        let (mut list, mut variants) = (format!("#define {name}(ROW, ...)"), Vec::new());
        for (pair, head_dim) in PAIRS.iter().flat_map(|pair| HEAD_DIMS.map(|d| (pair, d))) {
            let variant = self.variant(*pair, head_dim).filter(|name| !variants.contains(name));
            let Some(variant) = variant else { continue };
            let [k, v] = [pair.0, pair.1].map(type_name);
            list += &format!(" \\\n    ROW({head_dim}, {k}, {v}, {variant}, __VA_ARGS__)");
            variants.push(variant);
        }
        list + "\n"
    }
}

/// `formats.h`: numbers and sizes of codings, as constants.
pub fn header() -> String {
    let mut header = format!(
        "// Made by build.rs from kernels-cuda/formats.\n#pragma once\n\n#include <stdint.h>\n\n\
         constexpr int WIDE_SLOTS = {WIDE}, STRIP_SLOTS = {STRIP}, CODED_SKEW = {SKEW};\n"
    );
    for what in ["CODE_BYTES", "PARAM_BYTES", "CHANNEL_BYTES"] {
        header += &format!("template <uint32_t CODING, int D>\nconstexpr int {what} = -1;\n");
    }
    for (id, coding) in CODINGS.iter().enumerate() {
        let name = coding.to_string().to_uppercase();
        header += &format!("constexpr uint32_t {name} = {id};\n");
        for d in HEAD_DIMS {
            let bytes = [
                ("CODE_BYTES", coding.code_bytes(d)),
                ("PARAM_BYTES", coding.param_bytes(d)),
                ("CHANNEL_BYTES", coding.channel_bytes(d)),
            ];
            for (what, n) in bytes {
                header += &format!("template <>\nconstexpr int {what}<{name}, {d}> = {n};\n");
            }
        }
    }
    header
}

/// `codings.h`: the codings by name, and the lists of the kernels of families.
pub fn codings() -> String {
    let (mut includes, mut names) = (Vec::new(), String::new());
    for coding in CODINGS {
        let (file, is) = coding.kernel();
        includes.push(format!("#include \"kv/{file}.cuh\"\n"));
        names += &format!("template <int D>\nusing {} = {is};\n", type_name(coding));
    }
    includes.sort();
    includes.dedup();
    let lists = Family::Pairs.list("KV_PAIRS") + &Family::Keys.list("KV_KEYS");
    format!(
        "// Made by build.rs from kernels-cuda/formats.\n#pragma once\n\n{}\n{names}{lists}",
        includes.concat()
    )
}

/// The name of a coding among kernels: `Int4Channel`.
fn type_name(coding: Coding) -> String {
    let name = coding.to_string();
    name.split('_').map(|word| word[..1].to_uppercase() + &word[1..]).collect()
}
