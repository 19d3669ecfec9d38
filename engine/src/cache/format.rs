//! What a KV page looks like in memory.
//!
//! A page holds `page_len` tokens of K and V for all kv heads of one layer, head-major
//! (`[K|V][kv_head][slot][head_dim]`), so that one head's tile is one contiguous run.

use std::fmt;
use std::str::FromStr;

use crate::error::Error;

/// Number format of keys and values in the cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvFormat {
    /// bfloat16, rounded to nearest even when a token is appended.
    #[default]
    Bf16,
    /// float32: exact, for checking; twice the memory.
    F32,
}

impl KvFormat {
    /// Bytes an element takes.
    pub fn bytes(self) -> usize {
        match self {
            Self::Bf16 => 2,
            Self::F32 => 4,
        }
    }
}

impl fmt::Display for KvFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
        })
    }
}

impl FromStr for KvFormat {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self, Error> {
        match s {
            "bf16" => Ok(Self::Bf16),
            "f32" => Ok(Self::F32),
            _ => Err(Error::option("kv", s, "bf16 or f32")),
        }
    }
}

/// Shape of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageLayout {
    /// Key and value heads.
    pub n_kv_heads: usize,
    /// Tokens a page holds.
    pub page_len: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Number format.
    pub format: KvFormat,
}

/// K or V: the outermost axis of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Keys, rotated to their absolute position.
    K = 0,
    /// Values.
    V = 1,
}

impl PageLayout {
    /// Elements a page holds.
    pub fn elements(&self) -> usize {
        2 * self.n_kv_heads * self.page_len * self.head_dim
    }

    /// Bytes a page takes.
    pub fn bytes(&self) -> usize {
        self.elements() * self.format.bytes()
    }

    /// Element index of slot 0 of a head: `page_len` runs of `head_dim` start here.
    pub fn head(&self, side: Side, kv_head: usize) -> usize {
        (side as usize * self.n_kv_heads + kv_head) * self.page_len * self.head_dim
    }
}
