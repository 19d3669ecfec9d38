//! What the files beside `tokenizer.json` say of the tokenizer: `tokenizer_config.json`, `special_tokens_map.json` and
//! `added_tokens.json`.
//!
//! They are read as `transformers` 5.24 reads them for a folder that has a `tokenizer.json`: special_tokens_map.json and
//! added_tokens.json count only where tokenizer_config.json has no `added_tokens_decoder`, and then
//! special_tokens_map.json wins; tokens that tokenizer.json lacks are added, and flags of those that it has are
//! replaced. An id that a file gives must be the one that the token gets: the reference takes another in silence, and
//! then the token is one that the model never saw.
//!
//! In one thing tokenizer.json is followed and not the reference. For some values of `tokenizer_class`
//! (`LlamaTokenizer`, `Qwen2Tokenizer`, `GPT2Tokenizer`) `transformers` 5 takes only vocabulary, merges and
//! post-processor from tokenizer.json and makes normaliser, pre-tokenizer and decoder up anew. Llama 2's own file puts a
//! space before every piece of text, as the model was trained; the made-up one only before the first, so that
//! `<s>[INST]` becomes other ids than in training. Here the author's file is the tokenizer. Of what those classes
//! take from tokenizer_config.json, `add_prefix_space` is applied to it, and the special tokens that a class has
//! where no file names them are known to templates.
//!
//! `add_bos_token` and `add_eos_token` mean nothing beside a tokenizer.json, whose post-processor says what is put
//! around a prompt; the reference drops them too. [`REFUSED`] lists what would change a prompt and is not done; every
//! other key is one that the reference does not look at either, or that has no meaning here (padding, truncation,
//! paths, names).

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tokenizers::{
    AddedToken, DecoderWrapper, ModelWrapper, NormalizerWrapper, PreTokenizerWrapper,
    Tokenizer as Inner,
};

use crate::config::CONFIG;
use crate::error::Error;
use crate::json;
use crate::keys::Keys;
use crate::memory;

/// The file with the texts of the named special tokens.
pub const SPECIAL_TOKENS_MAP: &str = "special_tokens_map.json";
/// The file with the ids of tokens that were added to a vocabulary.
pub const ADDED_TOKENS: &str = "added_tokens.json";
/// The file that says how the tokenizer is used, and holds a chat template where no other does.
pub const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
/// The tokenizer's file.
pub const TOKENIZER: &str = "tokenizer.json";

const MAX_COMPANION_BYTES: u64 = 32 << 20;
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// Memory that adding tokens takes at most, for each token that the tokenizer has then and for each byte of a text.
const ADD_BYTES_OF_TOKEN: usize = 4 << 10;
const ADD_BYTES: usize = 64;

const NAMED: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Keys of tokenizer_config.json that change prompts or answers when they are true, in ways that are not done.
const REFUSED: [(&str, &str); 7] = [
    ("split_special_tokens", "false: templates write special tokens"),
    // The reference hands these to its constructor, past tokenizer.json.
    ("post_processor", "the one of tokenizer.json"),
    ("tokenizer_object", "tokenizer.json"),
    ("gguf_file", "tokenizer.json"),
    ("cls", "files without this key"),
    ("fix_mistral_regex", "false, with the pre-tokenizer that is right in tokenizer.json"),
    ("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", "false"),
];

/// The keys of a list of tokens without names.
const NEWER: &str = "extra_special_tokens";
const OLDER: &str = "additional_special_tokens";

const LLAMA: &str = "LlamaTokenizer";

/// The classes that the reference builds anew, and their named tokens where no file names them.
const REBUILT: [(&str, &[(&str, &str)]); 3] = [
    (LLAMA, &[("unk_token", "<unk>"), ("bos_token", "<s>"), ("eos_token", "</s>")]),
    (
        "Qwen2Tokenizer",
        &[
            ("unk_token", "<|endoftext|>"),
            ("eos_token", "<|endoftext|>"),
            ("pad_token", "<|endoftext|>"),
        ],
    ),
    (
        "GPT2Tokenizer",
        &[
            ("unk_token", "<|endoftext|>"),
            ("bos_token", "<|endoftext|>"),
            ("eos_token", "<|endoftext|>"),
        ],
    ),
];

/// What the companions of a tokenizer.json say.
#[derive(Debug, Default)]
pub(crate) struct Companions {
    /// tokenizer_config.json, for messages.
    path: PathBuf,
    /// `bos_token` and the like, those that every tokenizer has first.
    named: Vec<(String, AddedToken)>,
    /// Those of `named` that no file names.
    defaults: BTreeSet<String>,
    /// Special tokens without a name.
    extra: Vec<AddedToken>,
    /// Tokens with the ids that they must have.
    placed: Vec<Placed>,
    /// The class that the reference builds anew.
    class: Option<&'static str>,
    add_prefix_space: Option<bool>,
    /// Whether a space is put before every piece of text and not only before the first.
    legacy: bool,
    /// Whether spaces before punctuation are dropped from answers; not for BPE.
    clean_up: bool,
}

/// A token that a file places at an id.
#[derive(Debug)]
struct Placed {
    id: u32,
    token: AddedToken,
    /// The key that says so.
    key: String,
    file: PathBuf,
    /// Whether tokenizer.json's flags win over these.
    yields: bool,
}

impl Companions {
    /// Reads the companions of a folder's tokenizer.json.
    pub(crate) fn open(dir: &Path) -> Result<Companions, Error> {
        let read = |name: &str| -> Result<_, Error> {
            let path = dir.join(name);
            let map = json::read_object(&path, MAX_COMPANION_BYTES)?;
            Ok((path, map))
        };
        let (path, config) = read(TOKENIZER_CONFIG)?;
        let config = config.unwrap_or_default();
        let keys = Keys { file: &path, parent: "", map: &config };
        for (key, supported) in REFUSED {
            if keys.truth(key) {
                return Err(keys.unsupported(key, supported));
            }
        }
        if keys.get("model_max_length").is_some_and(|max| !max.is_number()) {
            return Err(keys.wrong("model_max_length", "a number"));
        }
        if let Some(list) = keys.list("fast_tokenizer_files")?
            && list.iter().any(|name| name.as_str() != Some(TOKENIZER))
        {
            return Err(keys.unsupported("fast_tokenizer_files", "tokenizer.json alone"));
        }

        let mut said = Said::default();
        said.read(&keys, false)?;
        let mut placed = Vec::new();
        if config.contains_key("added_tokens_decoder") {
            placed = added_tokens_decoder(&keys)?;
        } else {
            let (path, map) = read(SPECIAL_TOKENS_MAP)?;
            let map = map.unwrap_or_default();
            said.read(&Keys { file: &path, parent: "", map: &map }, true)?;
            let (path, map) = read(ADDED_TOKENS)?;
            let map = map.unwrap_or_default();
            let special = said.texts();
            placed.extend(added_tokens(&Keys { file: &path, parent: "", map: &map }, &special)?);
        }
        let class = class(dir, &keys)?;
        let defaults = said.add_defaults(class);
        let mut named: Vec<(String, AddedToken)> =
            said.named.into_iter().filter_map(|(name, token)| Some((name, token?))).collect();
        named.sort_by_key(|(name, _)| place(name));
        Ok(Companions {
            defaults,
            named,
            extra: said.extra,
            placed,
            class,
            add_prefix_space: keys.boolean("add_prefix_space")?,
            legacy: keys.boolean("legacy")?.unwrap_or(false),
            clean_up: keys.truth("clean_up_tokenization_spaces"),
            path,
        })
    }

    /// The named special tokens and their texts, which templates know as variables.
    pub(crate) fn named(&self) -> impl Iterator<Item = (&str, &str)> {
        self.named.iter().map(|(name, token)| (name.as_str(), token.content.as_str()))
    }

    /// The text of a named special token.
    pub(crate) fn text(&self, name: &str) -> Option<&str> {
        self.named().find(|(known, _)| *known == name).map(|(_, text)| text)
    }

    /// Makes a tokenizer what its companions say; `path` is its file, for messages.
    pub(crate) fn apply(&self, inner: &mut Inner, path: &Path) -> Result<(), Error> {
        if self.clean_up && !matches!(inner.get_model(), ModelWrapper::BPE(_)) {
            return Err(Error::Unsupported {
                file: self.path.clone(),
                key: "clean_up_tokenization_spaces".into(),
                actual: "true".into(),
                supported: "false, where the tokenizer is not BPE",
            });
        }
        if let (Some(on), Some(_)) = (self.add_prefix_space, self.class) {
            self.put_space(inner, on, path)?;
        }
        self.add_tokens(inner, path)?;
        for Placed { id, token, key, file, .. } in &self.placed {
            let found = inner.token_to_id(&token.content);
            if found != Some(*id) && !token.content.is_empty() {
                return Err(Error::Value {
                    file: file.clone(),
                    key: key.clone(),
                    expected: match found {
                        Some(found) => format!("id {found} for it, as in {}", path.display()),
                        None => format!("a token of {}", path.display()),
                    },
                    actual: format!("{:?} with id {id}", token.content).into(),
                });
            }
        }
        Ok(())
    }

    /// Adds the tokens that tokenizer.json lacks or has with other flags, in the reference's order.
    fn add_tokens(&self, inner: &mut Inner, path: &Path) -> Result<(), Error> {
        let known = inner.get_added_vocabulary().get_added_tokens_decoder();
        let texts: BTreeMap<&str, &AddedToken> =
            known.values().map(|token| (token.content.as_str(), token)).collect();
        let is_named: BTreeSet<&str> =
            self.named.iter().map(|(_, token)| token.content.as_str()).collect();
        // Those that no file places come after those that one does, unless they are the same text.
        let mut have: BTreeSet<&str> = texts.keys().copied().collect();
        let mut tokens = Vec::new();
        for Placed { token, yields, .. } in &self.placed {
            let known = texts.get(token.content.as_str());
            if known.is_none_or(|known| *known != token && !yields) {
                tokens.push(token.clone());
                have.insert(token.content.as_str());
            }
        }
        let mut own = BTreeSet::new();
        let mut seen = HashSet::new();
        for (name, token) in &self.named {
            let text = token.content.as_str();
            let is_new = inner.token_to_id(text).is_none();
            // A default that the vocabulary lacks is not a token that the model has.
            if (is_new && self.defaults.contains(name))
                || have.contains(text)
                || !seen.insert(token)
            {
                continue;
            }
            own.extend((is_new && place(name) == NAMED.len()).then_some(text));
            if own.len() > 1 {
                // The reference numbers them in the order of the file, which JSON has not.
                return Err(Error::Value {
                    file: self.path.clone(),
                    key: name.clone(),
                    expected: format!("a token of {}", path.display()),
                    actual: text.into(),
                });
            }
            tokens.push(token.clone());
        }
        let extra = self.extra.iter().filter(|token| !have.contains(token.content.as_str()));
        tokens.extend(extra.filter(|token| seen.insert(token)).cloned());
        for token in &mut tokens {
            token.special |= is_named.contains(token.content.as_str());
        }
        if tokens.is_empty() {
            return Ok(());
        }
        let n_bytes: usize =
            tokens.iter().chain(known.values()).map(|token| token.content.len()).sum();
        let n_tokens = ADD_BYTES_OF_TOKEN.saturating_mul(tokens.len() + known.len());
        let bytes = n_tokens.saturating_add(ADD_BYTES.saturating_mul(n_bytes));
        memory::room_for(bytes, "the tokenizer's added tokens")?;
        let refuse = |why: String| Error::Tokenizer { file: path.into(), why: why.into() };
        catch_unwind(AssertUnwindSafe(|| inner.add_tokens(tokens)))
            .map_err(|_| refuse("the tokenizer library failed on its added tokens".into()))?
            .map_err(|err| refuse(format!("its added tokens: {err}")))?;
        Ok(())
    }

    /// Puts a space before texts, or none, in whichever part of the tokenizer does that.
    fn put_space(&self, inner: &mut Inner, on: bool, path: &Path) -> Result<(), Error> {
        let refuse = |why: String| Error::Tokenizer { file: path.into(), why: why.into() };
        let value =
            |part: Result<Value, serde_json::Error>| part.map_err(|e| refuse(e.to_string()));
        let mut pre = value(serde_json::to_value(inner.get_pre_tokenizer()))?;
        let mut normalizer = value(serde_json::to_value(inner.get_normalizer()))?;
        let mut decoder = value(serde_json::to_value(inner.get_decoder()))?;
        let scheme = match (on, self.legacy) {
            (true, true) => "always",
            (true, false) => "first",
            (false, _) => "never",
        };
        let mut is_bytes = false;
        edit(&mut pre, &mut |part| is_bytes |= part["type"] == "ByteLevel");
        if is_bytes && self.class == Some(LLAMA) {
            return Ok(()); // as Llama 3's: the reference takes it as it is
        }
        let mut found = false;
        edit(&mut pre, &mut |part| match part["type"].as_str() {
            Some("ByteLevel") => {
                found = true;
                part["add_prefix_space"] = on.into();
            }
            Some("Metaspace") => {
                found = true;
                // Where the file puts spaces it says before which pieces.
                if !on || part["prepend_scheme"] == "never" {
                    part["prepend_scheme"] = scheme.into();
                }
            }
            _ => (),
        });
        let mut prepends = false;
        edit(&mut normalizer, &mut |part| prepends |= part["type"] == "Prepend");
        if !found && prepends != on {
            if on {
                return Err(Error::Unsupported {
                    file: self.path.clone(),
                    key: "add_prefix_space".into(),
                    actual: "true".into(),
                    supported: "false, or a tokenizer.json that puts spaces before texts",
                });
            }
            drop_parts(&mut normalizer, "normalizers", &|part| part["type"] == "Prepend");
            drop_parts(&mut decoder, "decoders", &|part| part["type"] == "Strip");
        }
        let wrong = |err: serde_json::Error| refuse(format!("add_prefix_space: {err}"));
        let failed = |err: tokenizers::Error| refuse(format!("add_prefix_space: {err}"));
        let pre: Option<PreTokenizerWrapper> = serde_json::from_value(pre).map_err(wrong)?;
        let decoder: Option<DecoderWrapper> = serde_json::from_value(decoder).map_err(wrong)?;
        let normalizer: Option<NormalizerWrapper> =
            serde_json::from_value(normalizer).map_err(wrong)?;
        inner.with_pre_tokenizer(pre);
        inner.with_decoder(decoder);
        inner.with_normalizer(normalizer).map_err(failed)?;
        Ok(())
    }
}

/// Calls `change` on every part of a component, which may be a sequence of them.
fn edit(component: &mut Value, change: &mut dyn FnMut(&mut Value)) {
    if !component.is_object() {
        return;
    }
    change(component);
    for list in ["pretokenizers", "normalizers"] {
        if let Some(parts) = component.get_mut(list).and_then(Value::as_array_mut) {
            parts.iter_mut().for_each(|part| edit(part, change));
        }
    }
}

/// Drops the parts of a component that `is_it`; a component that is one itself becomes none.
fn drop_parts(component: &mut Value, list: &str, is_it: &dyn Fn(&Value) -> bool) {
    if component.is_object() && is_it(component) {
        *component = Value::Null;
    } else if let Some(parts) = component.get_mut(list).and_then(Value::as_array_mut) {
        parts.retain(|part| !is_it(part));
        parts.iter_mut().for_each(|part| drop_parts(part, list, is_it));
    }
}

/// Where a name stands among those that every tokenizer has; others come after them.
fn place(name: &str) -> usize {
    NAMED.iter().position(|known| *known == name).unwrap_or(NAMED.len())
}

/// Named and extra special tokens as the files say them, one after the other.
#[derive(Default)]
struct Said {
    /// `None`: a file says that there is none.
    named: BTreeMap<String, Option<AddedToken>>,
    /// Names that are a model's own, in tokenizer_config.json: there special_tokens_map.json does not win.
    own: BTreeSet<String>,
    extra: Vec<AddedToken>,
    /// Whether a file has said what `extra` is, and whether that was special_tokens_map.json by its older key.
    has_list: bool,
    is_late: bool,
}

impl Said {
    /// Takes what a file says. In `special_tokens_map.json`, unlike in tokenizer_config.json, an object is a token without
    /// having to say that it is one, and its list of extra tokens comes after those that are there.
    fn read(&mut self, keys: &Keys<'_>, is_map: bool) -> Result<(), Error> {
        for (key, value) in keys.map {
            let is_standard = NAMED.contains(&key.as_str());
            let is_object = value.is_object() && key != NEWER;
            let token = match value {
                Value::String(text) => Some(AddedToken::from(text.as_str(), true)),
                Value::Object(map) if is_map && is_object => {
                    Some(added_token(keys, key, map, true)?.special(true))
                }
                Value::Object(map) if map.get("__type") == Some(&"AddedToken".into()) => {
                    Some(added_token(keys, key, map, false)?)
                }
                _ => None,
            };
            match token {
                _ if is_map && self.own.contains(key) => (),
                token @ Some(_) if is_standard || key.ends_with("_token") => {
                    if !is_standard && value.is_string() {
                        self.own.insert(key.clone());
                    }
                    self.named.insert(key.clone(), token);
                }
                None if value.is_null() && (is_standard || is_map) => {
                    self.named.insert(key.clone(), None);
                }
                None if is_standard => return Err(keys.wrong(key, "a token's text, or null")),
                _ => (),
            }
        }
        self.read_list(keys, is_map)
    }

    /// The tokens without a name. The older key counts where no file has a list under the newer one, under which an
    /// object gives tokens names.
    fn read_list(&mut self, keys: &Keys<'_>, is_map: bool) -> Result<(), Error> {
        let older = keys.map.get(OLDER);
        let tokens = |key: &str, list: &[Value]| -> Result<Vec<_>, Error> {
            // Only this list, of this file, has objects that need not say that they are tokens.
            let token = |item: &Value| match item {
                Value::Object(map) if is_map && key == NEWER => added_token(keys, key, map, true),
                item => listed_token(keys, key, item),
            };
            list.iter().map(token).collect()
        };
        match keys.map.get(NEWER) {
            None => (),
            Some(Value::Null) => {
                self.extra.clear();
                self.has_list = is_map || older.is_none();
            }
            Some(Value::Array(list)) => {
                self.extra.extend(tokens(NEWER, list)?);
                self.has_list = is_map || !list.is_empty() || older.is_none();
            }
            Some(Value::Object(map)) => self.read_names(keys, NEWER, map)?,
            Some(_) => {
                return Err(keys.wrong(NEWER, "a list of tokens, or an object of named ones"));
            }
        }
        match older {
            Some(_) if self.has_list => (),
            None => (),
            Some(Value::Null) => self.has_list = true,
            Some(Value::Array(list)) => {
                self.extra = tokens(OLDER, list)?;
                (self.has_list, self.is_late) = (true, is_map);
            }
            Some(Value::Object(map)) if !is_map => self.read_names(keys, OLDER, map)?,
            Some(_) => return Err(keys.wrong(OLDER, "a list of tokens")),
        }
        Ok(())
    }

    fn read_names(
        &mut self,
        keys: &Keys<'_>,
        key: &str,
        map: &Map<String, Value>,
    ) -> Result<(), Error> {
        for (name, item) in map {
            let token = listed_token(keys, key, item)?;
            self.own.insert(name.clone());
            self.named.insert(name.clone(), Some(token));
        }
        Ok(())
    }

    /// The texts of the tokens that added_tokens.json gives ids as special ones.
    fn texts(&self) -> BTreeSet<String> {
        let named = NAMED.iter().filter_map(|name| self.named.get(*name)?.as_ref());
        // The reference takes the older key of special_tokens_map.json up after it has asked.
        let extra = if self.is_late { &[][..] } else { &self.extra };
        named.chain(extra).map(|token| token.content.clone()).collect()
    }

    /// Adds what a class has where no file says anything, not even null, and gives the names.
    fn add_defaults(&mut self, class: Option<&str>) -> BTreeSet<String> {
        let row = REBUILT.iter().find(|(name, _)| Some(*name) == class);
        let mut added = BTreeSet::new();
        for (name, text) in row.map_or(&[][..], |(_, tokens)| *tokens) {
            if !self.named.contains_key(*name) {
                self.named.insert((*name).into(), Some(AddedToken::from(*text, true)));
                added.insert((*name).to_owned());
            }
        }
        added
    }
}

/// A token of a list: its text, or an object that says that it is one.
fn listed_token(keys: &Keys<'_>, key: &str, item: &Value) -> Result<AddedToken, Error> {
    match item {
        Value::String(text) => Ok(AddedToken::from(text.as_str(), true)),
        Value::Object(map) if map.get("__type") == Some(&"AddedToken".into()) => {
            added_token(keys, key, map, false)
        }
        _ => Err(keys.wrong(key, "tokens as texts")),
    }
}

/// A token with its flags. Where `normalized` is absent, special tokens are matched in the text as it is.
fn added_token(
    keys: &Keys<'_>,
    key: &str,
    map: &Map<String, Value>,
    special: bool,
) -> Result<AddedToken, Error> {
    let parent = format!("{}{key}.", keys.parent);
    let keys = Keys { file: keys.file, parent: &parent, map };
    let flag = |name: &str| -> Result<Option<bool>, Error> {
        let Some(value) = keys.map.get(name) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| keys.wrong(name, "true or false"))
    };
    let content = keys.text("content")?.unwrap_or_default(); // no text: a token that never is
    let special = special || flag("special")?.unwrap_or(false);
    let mut token = AddedToken::from(content, special);
    token.normalized = flag("normalized")?.unwrap_or(token.normalized);
    token.single_word = flag("single_word")?.unwrap_or(false);
    token.lstrip = flag("lstrip")?.unwrap_or(false);
    token.rstrip = flag("rstrip")?.unwrap_or(false);
    Ok(token)
}

/// tokenizer_config.json's tokens by id.
fn added_tokens_decoder(keys: &Keys<'_>) -> Result<Vec<Placed>, Error> {
    let Some(map) = keys.object("added_tokens_decoder")? else {
        return Err(keys.wrong("added_tokens_decoder", "an object of ids and tokens"));
    };
    let keys = Keys { file: keys.file, parent: "added_tokens_decoder.", map };
    let mut placed = BTreeMap::new();
    for (key, value) in map {
        let digits = key.bytes().all(|byte| byte.is_ascii_digit());
        let id = key.parse::<u32>().ok().filter(|_| digits);
        let (Some(id), Some(object)) = (id, value.as_object()) else {
            return Err(keys.wrong(key, "a token with its text and flags, under its id"));
        };
        let token = added_token(&keys, key, object, false)?;
        let (file, key) = (keys.file.into(), format!("{}{key}", keys.parent));
        let new = Placed { id, token, key: key.clone(), file, yields: false };
        if placed.insert(id, new).is_some() {
            return Err(keys.wrong(&key, "one token for each id"));
        }
    }
    Ok(placed.into_values().collect())
}

/// added_tokens.json: texts and their ids.
fn added_tokens(keys: &Keys<'_>, special: &BTreeSet<String>) -> Result<Vec<Placed>, Error> {
    let mut placed = BTreeMap::new();
    for (text, id) in keys.map {
        let Some(id) = id.as_u64().and_then(|id| u32::try_from(id).ok()) else {
            return Err(keys.wrong(text, "the token's id"));
        };
        let token = AddedToken::from(text.as_str(), special.contains(text));
        let new = Placed { id, token, key: text.clone(), file: keys.file.into(), yields: true };
        if placed.insert(id, new).is_some() {
            return Err(keys.wrong(text, "an id that no other token has"));
        }
    }
    Ok(placed.into_values().collect())
}

/// The class that the reference takes, where it is one that it builds anew: `tokenizer_class`, unless the family of
/// model has one of its own.
fn class(dir: &Path, keys: &Keys<'_>) -> Result<Option<&'static str>, Error> {
    let path = dir.join(CONFIG);
    let model = json::read_object(&path, MAX_CONFIG_BYTES)?.unwrap_or_default();
    let model = Keys { file: &path, parent: "", map: &model };
    let said = match keys.text("tokenizer_class")? {
        Some(class) => Some(class),
        None => model.text("tokenizer_class")?,
    };
    let said = said.map(|class| class.strip_suffix("Fast").unwrap_or(class));
    let family = model.text("model_type")?;
    let class = match family {
        Some("mistral") => None,
        Some("qwen2") => Some("Qwen2Tokenizer"),
        Some("qwen3") => said.or(Some("Qwen2Tokenizer")),
        _ => said,
    };
    Ok(REBUILT.iter().map(|(name, _)| *name).find(|name| Some(*name) == class))
}
