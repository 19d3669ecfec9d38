//! Text to tokens and back.

use std::ffi::c_char;
use std::sync::Mutex;

use super::guard::call;
use super::handle::{Stream, enter, free, get, loris_model, loris_text_stream, make};
use super::out::{c_text, copy, copy_text, owned, slice, text, write};
use super::params::check_flags;
use super::status::{Failure, LORIS_E_STATE, LORIS_E_UNSUPPORTED, LORIS_OK};
use crate::engine::Model;
use crate::error::Error;
use crate::memory;
use loris_loader::{Chat, Message, Special, TextStream, Tokenizer};

/// Flag of loris_tokenize: the text of a special token is that token. Without it, it is ordinary text, as text from
/// users should be.
pub const LORIS_PARSE_SPECIAL: u32 = 1;
/// Flag of loris_tokenize: where the tokenizer says so, add the token that starts a sequence. For whole prompts
/// that no chat template was applied to.
pub const LORIS_ADD_EDGES: u32 = 2;
/// Flag of loris_detokenize and loris_text_stream_open: special tokens are shown; without it they are silent.
pub const LORIS_SHOW_SPECIAL: u32 = 1;
/// Flag of loris_chat_tokenize and loris_chat_render: end where the model's answer begins.
pub const LORIS_ADD_GENERATION_PROMPT: u32 = 1;
/// Of loris_token_flags: the token's text is silent unless it is asked for. Since 0.6.
pub const LORIS_TOKEN_SPECIAL: u32 = 1;
/// Of loris_token_flags: it ends an answer. Since 0.6.
pub const LORIS_TOKEN_EOS: u32 = 2;
/// Of loris_token_flags: the tokenizer does not have it, so it is never chosen. Since 0.6.
pub const LORIS_TOKEN_UNUSED: u32 = 4;

fn tokenizer(model: &Model) -> Result<&Tokenizer, Failure> {
    model.tokenizer().ok_or_else(|| {
        let why = "the model's folder has no tokenizer.json, which text needs; pass token ids";
        Failure::new(LORIS_E_UNSUPPORTED, why)
    })
}

fn shown(name: &str, flags: u32) -> Result<Special, Failure> {
    check_flags(name, flags, LORIS_SHOW_SPECIAL)?;
    Ok(if flags & LORIS_SHOW_SPECIAL != 0 { Special::Plain } else { Special::Parse })
}

/// Encodes text_len bytes of UTF-8. flags: LORIS_PARSE_SPECIAL, LORIS_ADD_EDGES.
///
/// buf has room for cap ids; *n is set to how many there are, also when buf is NULL and cap 0.
/// LORIS_BUFFER_TOO_SMALL if cap is less than that; loris_max_tokens gives a cap that is enough. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_tokenize(
    model: *const loris_model,
    text: *const c_char,
    text_len: usize,
    flags: u32,
    buf: *mut u32,
    cap: usize,
    n: *mut usize,
) -> i32 {
    // SAFETY: the caller keeps to the header.
    call(|| unsafe {
        let tokenizer = tokenizer(get(model)?)?;
        let text = self::text("text", text, text_len)?;
        check_flags("flags", flags, LORIS_PARSE_SPECIAL | LORIS_ADD_EDGES)?;
        let special = match flags & LORIS_PARSE_SPECIAL {
            0 => Special::Plain,
            _ => Special::Parse,
        };
        let ids = match flags & LORIS_ADD_EDGES {
            0 => tokenizer.encode(text, special)?,
            _ => tokenizer.encode_prompt(text, special)?,
        };
        copy(&ids, buf, cap, n)
    })
}

/// Sets *n to a number of tokens that no text of text_len bytes has more than, with LORIS_ADD_EDGES or without: as many as
/// bytes with most tokenizers, more where one normalises a character to several. Any thread. Since 0.6.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_max_tokens(
    model: *const loris_model,
    text_len: usize,
    n: *mut usize,
) -> i32 {
    // SAFETY: the caller keeps to the header.
    call(|| unsafe {
        write("n", n, 0)?;
        write("n", n, tokenizer(get(model)?)?.max_tokens(text_len))?;
        Ok(LORIS_OK)
    })
}

/// Copies the bytes that a token adds to a text: often not whole characters, and with most tokenizers a space in front; of a special
/// one its own text. None for an id that stands for no token. LORIS_E_INVALID_ARG where the tokenizer makes text of several
/// tokens together (WordPiece). buf has room for cap bytes; *n is set to how many there are, also when buf is NULL and cap
/// 0. LORIS_BUFFER_TOO_SMALL if cap is less than that. Any thread. Since 0.6.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_token_bytes(
    model: *const loris_model,
    token: u32,
    buf: *mut u8,
    cap: usize,
    n: *mut usize,
) -> i32 {
    // SAFETY: the caller keeps to the header.
    call(|| unsafe {
        let model = get(model)?;
        check_token(model, token)?;
        copy(&tokenizer(model)?.token_bytes(token)?, buf, cap, n)
    })
}

/// Sets *flags to what a token is: LORIS_TOKEN_SPECIAL, LORIS_TOKEN_EOS, LORIS_TOKEN_UNUSED. Any thread. Since 0.6.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_token_flags(
    model: *const loris_model,
    token: u32,
    flags: *mut u32,
) -> i32 {
    // SAFETY: the caller keeps to the header.
    call(|| unsafe {
        write("flags", flags, 0)?;
        let model = get(model)?;
        check_token(model, token)?;
        let tokenizer = tokenizer(model)?;
        let facts = [
            (LORIS_TOKEN_SPECIAL, tokenizer.is_special(token)),
            (LORIS_TOKEN_EOS, model.config().eos_ids.contains(&token)),
            (LORIS_TOKEN_UNUSED, tokenizer.id_to_token(token).is_none()),
        ];
        write("flags", flags, facts.iter().filter(|(_, is)| *is).map(|(flag, _)| flag).sum())?;
        Ok(LORIS_OK)
    })
}

fn check_token(model: &Model, id: u32) -> Result<(), Error> {
    match model.config().vocab_size {
        vocab_size if id as usize >= vocab_size => Err(Error::TokenOutOfRange { id, vocab_size }),
        _ => Ok(()),
    }
}

/// Decodes n_tokens ids at once; bytes that are no UTF-8 become U+FFFD. flags: LORIS_SHOW_SPECIAL.
///
/// buf has room for cap bytes, the NUL at the end counted; *n is set to the bytes of the text without the NUL, also
/// when buf is NULL and cap 0. LORIS_BUFFER_TOO_SMALL if cap is not more than that. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_detokenize(
    model: *const loris_model,
    tokens: *const u32,
    n_tokens: usize,
    flags: u32,
    buf: *mut c_char,
    cap: usize,
    n: *mut usize,
) -> i32 {
    // SAFETY: the caller keeps to the header.
    call(|| unsafe {
        let tokenizer = tokenizer(get(model)?)?;
        let tokens = slice("tokens", tokens, n_tokens)?;
        let text = tokenizer.decode(tokens, shown("flags", flags)?)?;
        copy_text(&text, buf, cap, n)
    })
}

/// Opens a stream that turns ids into text as they come. flags: LORIS_SHOW_SPECIAL. On LORIS_OK *stream is a
/// handle for loris_text_stream_free, else it is NULL. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_text_stream_open(
    model: *const loris_model,
    flags: u32,
    stream: *mut *mut loris_text_stream,
) -> i32 {
    // SAFETY: the caller keeps to the header.
    call(|| unsafe {
        write("stream", stream, std::ptr::null_mut())?;
        let tokenizer = tokenizer(get(model)?)?;
        let opened = TextStream::new(tokenizer, shown("flags", flags)?);
        let opened = make(Mutex::new(Stream { stream: Some(opened), text: Vec::new() }));
        write("stream", stream, opened)?;
        Ok(LORIS_OK)
    })
}

/// As loris_text_stream_open, for ids that come behind the n_tokens ids of tokens, whose text was shown: where an answer
/// goes on. Since 0.6.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_text_stream_open_after(
    model: *const loris_model,
    tokens: *const u32,
    n_tokens: usize,
    flags: u32,
    stream: *mut *mut loris_text_stream,
) -> i32 {
    // SAFETY: the caller keeps to the header.
    call(|| unsafe {
        write("stream", stream, std::ptr::null_mut())?;
        let tokenizer = tokenizer(get(model)?)?;
        let before = slice("tokens", tokens, n_tokens)?;
        let opened = TextStream::after(tokenizer, shown("flags", flags)?, before)?;
        let opened = make(Mutex::new(Stream { stream: Some(opened), text: Vec::new() }));
        write("stream", stream, opened)?;
        Ok(LORIS_OK)
    })
}

/// Takes the next id. *text becomes the text that is now complete: *text_len bytes of whole UTF-8 characters and a NUL,
/// often a word, sometimes empty. It lives until the next call on the stream. All texts joined are what
/// loris_detokenize makes of all ids at once. After an error the stream is as it was. One thread at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_text_stream_push(
    stream: *mut loris_text_stream,
    token: u32,
    text: *mut *const c_char,
    text_len: *mut usize,
) -> i32 {
    // SAFETY: the caller keeps to the header.
    call(|| unsafe {
        let mut inner = enter(get(stream.cast_const())?)?;
        check_outputs(text, text_len)?;
        let new = match &mut inner.stream {
            Some(stream) => stream.push(token)?,
            None => return Err(Failure::new(LORIS_E_STATE, "the text stream was finished")),
        };
        show(&mut inner, new, text, text_len)
    })
}

/// Ends the stream: *text becomes what was held back, as in loris_text_stream_push. The stream can then only be
/// freed. One thread at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_text_stream_finish(
    stream: *mut loris_text_stream,
    text: *mut *const c_char,
    text_len: *mut usize,
) -> i32 {
    // SAFETY: the caller keeps to the header.
    call(|| unsafe {
        let mut inner = enter(get(stream.cast_const())?)?;
        check_outputs(text, text_len)?;
        let rest = match inner.stream.take() {
            Some(stream) => stream.finish()?,
            None => return Err(Failure::new(LORIS_E_STATE, "the text stream was finished")),
        };
        show(&mut inner, rest, text, text_len)
    })
}

/// Fails, before anything happens to the stream, unless the outputs can be written.
///
/// # Safety
/// The pointers are NULL or may be written to.
unsafe fn check_outputs(text: *mut *const c_char, text_len: *mut usize) -> Result<(), Failure> {
    // SAFETY: passed on.
    unsafe { write("text", text, std::ptr::null()).and_then(|()| write("text_len", text_len, 0)) }
}

/// # Safety
/// The pointers are NULL or may be written to.
unsafe fn show(
    stream: &mut Stream,
    new: String,
    text: *mut *const c_char,
    text_len: *mut usize,
) -> Result<i32, Failure> {
    stream.text = new.into_bytes();
    let n = stream.text.len();
    stream.text.push(0);
    // SAFETY: passed on.
    unsafe { write("text", text, stream.text.as_ptr().cast()) }?;
    // SAFETY: passed on.
    unsafe { write("text_len", text_len, n) }?;
    Ok(LORIS_OK)
}

/// Frees a stream; NULL is fine. Any thread, when no call on it runs.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_text_stream_free(stream: *mut loris_text_stream) {
    // SAFETY: passed on.
    unsafe { free(stream) }
}

/// # Safety
/// Both arrays hold n texts that end with a NUL.
unsafe fn chat(
    roles: *const *const c_char,
    contents: *const *const c_char,
    n: usize,
    flags: u32,
) -> Result<Chat, Failure> {
    // SAFETY: the caller's promise.
    unsafe {
        let roles = slice("roles", roles, n)?;
        let contents = slice("contents", contents, n)?;
        let mut messages = memory::empty(n, "the messages of a chat")?;
        for (&role, &content) in roles.iter().zip(contents) {
            let (role, content) = (c_text("roles", role)?, c_text("contents", content)?);
            messages.push(Message::new(owned(role)?, owned(content)?));
        }
        let add_generation_prompt = flags & LORIS_ADD_GENERATION_PROMPT != 0;
        Ok(Chat { add_generation_prompt, ..Chat::new(messages) })
    }
}

fn template_missing() -> Failure {
    let why =
        "the model's folder has no chat template; write the prompt yourself and use loris_tokenize";
    Failure::new(LORIS_E_UNSUPPORTED, why)
}

/// Makes the prompt of a conversation with the model's chat template: n_messages roles ("system", "user",
/// "assistant") and contents, each UTF-8 with a NUL. Special tokens of the template are parsed, those that a content happens to
/// spell stay text. flags: LORIS_ADD_GENERATION_PROMPT. buf, cap and n as in loris_tokenize. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_chat_tokenize(
    model: *const loris_model,
    roles: *const *const c_char,
    contents: *const *const c_char,
    n_messages: usize,
    flags: u32,
    buf: *mut u32,
    cap: usize,
    n: *mut usize,
) -> i32 {
    // SAFETY: the caller keeps to the header.
    call(|| unsafe {
        let model = get(model)?;
        check_flags("flags", flags, LORIS_ADD_GENERATION_PROMPT)?;
        let chat = chat(roles, contents, n_messages, flags)?;
        let ids = model.encode_chat(&chat)?;
        copy(&ids.ok_or_else(template_missing)?, buf, cap, n)
    })
}

/// As loris_chat_tokenize, but gives the prompt as text, for people to read: a special token that a content spells
/// cannot be told from the template's own. buf, cap and n as in loris_detokenize. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_chat_render(
    model: *const loris_model,
    roles: *const *const c_char,
    contents: *const *const c_char,
    n_messages: usize,
    flags: u32,
    buf: *mut c_char,
    cap: usize,
    n: *mut usize,
) -> i32 {
    // SAFETY: the caller keeps to the header.
    call(|| unsafe {
        let model = get(model)?;
        check_flags("flags", flags, LORIS_ADD_GENERATION_PROMPT)?;
        let chat = chat(roles, contents, n_messages, flags)?;
        let template = model.chat_template().ok_or_else(template_missing)?;
        let text = template.render(&chat)?;
        copy_text(&text, buf, cap, n)
    })
}

/// As loris_chat_tokenize, of a chat with all that templates know: request_len bytes of JSON, an object with "messages"
/// (objects with "role", "content" - a string or a list of parts - and what else the template reads, such as "tool_calls"), and if
/// wanted "tools" and "documents" (lists of objects), "variables" (an object: what the template asks for by name, such as
/// enable_thinking), "continue_final_message" (true: the prompt ends where the last message does, for the model to go
/// on with), "add_generation_prompt" (true unless the last message goes on) and "chat_template" (the name of one of the
/// folder's templates, or a template of one's own). LORIS_E_INVALID_ARG names what is wrong with it. flags: 0. buf, cap and
/// n as in loris_tokenize. Any thread. Since 0.6.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_chat_tokenize_json(
    model: *const loris_model,
    request: *const c_char,
    request_len: usize,
    flags: u32,
    buf: *mut u32,
    cap: usize,
    n: *mut usize,
) -> i32 {
    // SAFETY: the caller keeps to the header.
    call(|| unsafe {
        let model = get(model)?;
        check_flags("flags", flags, 0)?;
        let chat = Chat::from_json(self::text("request", request, request_len)?)?;
        let ids = model.encode_chat(&chat)?;
        copy(&ids.ok_or_else(template_missing)?, buf, cap, n)
    })
}

/// As loris_chat_render, of a request as in loris_chat_tokenize_json. flags: 0. buf, cap and n as in loris_detokenize. Any
/// thread. Since 0.6.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loris_chat_render_json(
    model: *const loris_model,
    request: *const c_char,
    request_len: usize,
    flags: u32,
    buf: *mut c_char,
    cap: usize,
    n: *mut usize,
) -> i32 {
    // SAFETY: the caller keeps to the header.
    call(|| unsafe {
        let model = get(model)?;
        check_flags("flags", flags, 0)?;
        let chat = Chat::from_json(self::text("request", request, request_len)?)?;
        let template = model.chat_template().ok_or_else(template_missing)?;
        copy_text(&template.render(&chat)?, buf, cap, n)
    })
}
