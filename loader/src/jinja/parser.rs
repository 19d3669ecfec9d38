//! Tokens to a tree, by the grammar of Jinja 3 with loop controls and Hugging Face's `{% generation %}`.
//!
//! The tree cannot be deep: operators of one rank, attributes and filters are lists and not nests, and what nests is
//! bounded by [`MAX_NESTING`], so that neither a walk over it nor its end can run out of stack.

use std::collections::HashMap;

use super::lexer::{Tok, Token};

/// How deep expressions and statements may nest together.
const MAX_NESTING: usize = 100;

/// A name of a variable: its place in [`Program::names`].
pub(crate) type Name = usize;

/// A template.
#[derive(Debug, Default)]
pub(crate) struct Program {
    pub(crate) body: Vec<Stmt>,
    /// The names of variables.
    pub(crate) names: Vec<String>,
    /// Texts and string constants.
    pub(crate) texts: Vec<String>,
    pub(crate) macros: Vec<Macro>,
}

/// A macro, or the body of a call block.
#[derive(Debug)]
pub(crate) struct Macro {
    pub(crate) name: String,
    pub(crate) params: Vec<Name>,
    /// Of the last parameters.
    pub(crate) defaults: Vec<Expr>,
    pub(crate) body: Vec<Stmt>,
    /// Whether the body asks for `varargs`, `kwargs` and `caller`.
    pub(crate) uses: [bool; 3],
}

/// The names that a macro has besides its parameters.
pub(crate) const IMPLICIT: [&str; 3] = ["varargs", "kwargs", "caller"];

#[derive(Debug)]
pub(crate) struct Stmt {
    pub(crate) line: u32,
    pub(crate) kind: Kind,
}

#[derive(Debug)]
pub(crate) enum Kind {
    /// A text, by its place in [`Program::texts`].
    Data(usize),
    Print(Vec<Expr>),
    For(Box<For>),
    If(Vec<(Expr, Vec<Stmt>)>, Vec<Stmt>),
    Set(Target, Expr),
    SetBlock(Target, Vec<Post>, Vec<Stmt>),
    With(Vec<(Target, Expr)>, Vec<Stmt>),
    /// A macro, by its place in [`Program::macros`].
    Macro(Name, usize),
    /// A call of the macro at this place's caller.
    Call(Expr, usize),
    Filter(Vec<Post>, Vec<Stmt>),
    /// A block that has its own variables and no other effect.
    Scope(Vec<Stmt>),
    Break,
    Continue,
}

#[derive(Debug)]
pub(crate) struct For {
    pub(crate) target: Target,
    pub(crate) iter: Expr,
    pub(crate) test: Option<Expr>,
    pub(crate) recursive: bool,
    pub(crate) body: Vec<Stmt>,
    pub(crate) otherwise: Vec<Stmt>,
}

/// What is assigned to.
#[derive(Debug)]
pub(crate) enum Target {
    Name(Name),
    Attr(Name, String),
    Tuple(Vec<Target>),
}

#[derive(Debug)]
pub(crate) enum Expr {
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    /// By its place in [`Program::texts`].
    Text(usize),
    Name(Name),
    Tuple(Vec<Expr>),
    List(Vec<Expr>),
    Dict(Vec<(Expr, Expr)>),
    Not(Box<Expr>),
    Neg(Box<Expr>),
    Pos(Box<Expr>),
    /// Operators of one rank, from the left.
    Chain(Box<Expr>, Vec<(Op, Expr)>),
    Concat(Vec<Expr>),
    And(Vec<Expr>),
    Or(Vec<Expr>),
    Compare(Box<Expr>, Vec<(Cmp, Expr)>),
    /// Test, then, else.
    If(Box<(Expr, Expr, Option<Expr>)>),
    /// What follows a value, from the left.
    Post(Box<Expr>, Vec<Post>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Op {
    Add,
    Sub,
    Mul,
    Div,
    FloorDiv,
    Rem,
    Pow,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cmp {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    In,
    NotIn,
}

#[derive(Debug)]
pub(crate) enum Post {
    Attr(String),
    Item(Expr),
    Slice(Box<[Option<Expr>; 3]>),
    Call(Args),
    Filter(String, Args),
    /// With whether it is negated.
    Test(String, Args, bool),
}

#[derive(Debug, Default)]
pub(crate) struct Args {
    pub(crate) pos: Vec<Expr>,
    pub(crate) named: Vec<(String, Expr)>,
    pub(crate) rest: Option<Expr>,
    pub(crate) named_rest: Option<Expr>,
}

/// Builds the tree.
pub(crate) fn parse(tokens: Vec<Token>) -> Result<Program, String> {
    let mut parser = Parser {
        tokens,
        at: 0,
        depth: 0,
        loops: 0,
        program: Program::default(),
        names: HashMap::new(),
        texts: HashMap::new(),
        macros: Vec::new(),
    };
    let body = parser.statements(&[]).map_err(|why| format!("line {}: {why}", parser.line()))?;
    parser.program.body = body;
    Ok(parser.program)
}

struct Parser {
    tokens: Vec<Token>,
    at: usize,
    depth: usize,
    /// How many loops are open here.
    loops: usize,
    program: Program,
    names: HashMap<String, Name>,
    texts: HashMap<String, usize>,
    /// Of the macros that are open here, what their bodies ask for.
    macros: Vec<[bool; 3]>,
}

type R<T> = Result<T, String>;

/// Words that are values.
const CONSTANTS: [&str; 6] = ["true", "True", "false", "False", "none", "None"];

impl Parser {
    fn line(&self) -> u32 {
        let last = self.tokens.last();
        self.tokens.get(self.at).or(last).map_or(1, |token| token.line)
    }

    fn peek(&self) -> Option<&Tok> {
        self.tokens.get(self.at).map(|token| &token.tok)
    }

    fn next(&mut self) -> Option<Tok> {
        let token = self.tokens.get(self.at)?.tok.clone();
        self.at += 1;
        Some(token)
    }

    fn is_op(&self, op: &str) -> bool {
        matches!(self.peek(), Some(Tok::Op(found)) if *found == op)
    }

    fn is_name(&self, name: &str) -> bool {
        matches!(self.peek(), Some(Tok::Name(found)) if found == name)
    }

    fn skip_op(&mut self, op: &str) -> bool {
        let is = self.is_op(op);
        self.at += usize::from(is);
        is
    }

    fn skip_name(&mut self, name: &str) -> bool {
        let is = self.is_name(name);
        self.at += usize::from(is);
        is
    }

    fn unexpected<T>(&self, expected: &str) -> R<T> {
        let found = match self.peek() {
            None => "the end of the template".into(),
            Some(Tok::Data(_)) => "text".into(),
            Some(Tok::PrintBegin) => "{{".into(),
            Some(Tok::PrintEnd) => "}}".into(),
            Some(Tok::BlockBegin) => "{%".into(),
            Some(Tok::BlockEnd) => "%}".into(),
            Some(Tok::Name(name)) => name.clone(),
            Some(Tok::Str(text)) => format!("{text:?}"),
            Some(Tok::Int(n)) => n.to_string(),
            Some(Tok::Float(n)) => n.to_string(),
            Some(Tok::Op(op)) => (*op).into(),
        };
        Err(format!("expected {expected}, found {found}"))
    }

    fn expect_op(&mut self, op: &str) -> R<()> {
        if self.skip_op(op) { Ok(()) } else { self.unexpected(op) }
    }

    fn expect_name(&mut self) -> R<String> {
        match self.peek() {
            Some(Tok::Name(name)) => {
                let name = name.clone();
                self.at += 1;
                Ok(name)
            }
            _ => self.unexpected("a name"),
        }
    }

    fn block_end(&mut self) -> R<()> {
        match self.peek() {
            Some(Tok::BlockEnd) => {
                self.at += 1;
                Ok(())
            }
            _ => self.unexpected("%}"),
        }
    }

    /// Runs `body` one level deeper.
    fn nested<T>(&mut self, body: impl FnOnce(&mut Parser) -> R<T>) -> R<T> {
        let outer = self.depth;
        self.deeper()?;
        let result = body(self);
        self.depth = outer;
        result
    }

    fn deeper(&mut self) -> R<()> {
        self.depth += 1;
        match self.depth > MAX_NESTING {
            true => Err(format!("nests more than {MAX_NESTING} deep")),
            false => Ok(()),
        }
    }

    fn name(&mut self, name: &str) -> Name {
        if let Some(&id) = self.names.get(name) {
            return id;
        }
        self.program.names.push(name.to_owned());
        self.names.insert(name.to_owned(), self.program.names.len() - 1);
        self.program.names.len() - 1
    }

    fn text(&mut self, text: String) -> usize {
        if let Some(&id) = self.texts.get(&text) {
            return id;
        }
        self.program.texts.push(text.clone());
        self.texts.insert(text, self.program.texts.len() - 1);
        self.program.texts.len() - 1
    }

    /// Statements up to one of these words, which is not read; without words up to the end.
    fn statements(&mut self, ends: &[&str]) -> R<Vec<Stmt>> {
        self.nested(|p| p.statements_here(ends))
    }

    fn statements_here(&mut self, ends: &[&str]) -> R<Vec<Stmt>> {
        let mut body = Vec::new();
        loop {
            let line = self.line();
            let kind = match self.next() {
                None if ends.is_empty() => return Ok(body),
                None => return self.unexpected(ends.last().unwrap_or(&"")),
                Some(Tok::Data(text)) => Kind::Data(self.text(text)),
                Some(Tok::PrintBegin) => {
                    let value = self.tuple(true, &[])?;
                    match self.next() {
                        Some(Tok::PrintEnd) => Kind::Print(vec![value]),
                        _ => {
                            self.at -= 1;
                            return self.unexpected("}}");
                        }
                    }
                }
                Some(Tok::BlockBegin) => {
                    if ends.iter().any(|end| self.is_name(end)) {
                        return Ok(body);
                    }
                    self.statement()?
                }
                Some(_) => {
                    self.at -= 1;
                    return self.unexpected("a statement");
                }
            };
            body.push(Stmt { line, kind });
        }
    }

    /// A body and the `end` that closes it.
    fn body(&mut self, end: &str) -> R<Vec<Stmt>> {
        self.block_end()?;
        let body = self.statements(&[end])?;
        self.at += 1;
        self.block_end()?;
        Ok(body)
    }

    fn statement(&mut self) -> R<Kind> {
        let word = self.expect_name()?;
        match word.as_str() {
            "for" => self.for_loop(),
            "if" => self.if_block(),
            "set" => self.set(),
            "with" => {
                let mut set = Vec::new();
                while self.peek() != Some(&Tok::BlockEnd) {
                    if !set.is_empty() {
                        self.expect_op(",")?;
                    }
                    let target = self.target(false, &[])?;
                    self.expect_op("=")?;
                    set.push((target, self.expr()?));
                }
                Ok(Kind::With(set, self.body("endwith")?))
            }
            "macro" => {
                let name = self.expect_name()?;
                let (params, defaults) = self.signature()?;
                let id = self.macro_body(name.clone(), params, defaults, "endmacro")?;
                Ok(Kind::Macro(self.name(&name), id))
            }
            "call" => {
                let (params, defaults) =
                    if self.is_op("(") { self.signature()? } else { (vec![], vec![]) };
                let call = self.expr()?;
                if !matches!(&call, Expr::Post(_, post) if matches!(post.last(), Some(Post::Call(_))))
                {
                    return Err("call: expected a call".into());
                }
                Ok(Kind::Call(call, self.macro_body("caller".into(), params, defaults, "endcall")?))
            }
            "filter" => {
                let filters = self.filters(true)?;
                Ok(Kind::Filter(filters, self.body("endfilter")?))
            }
            "generation" => Ok(Kind::Scope(self.body("endgeneration")?)),
            "print" => {
                let mut values = Vec::new();
                while self.peek() != Some(&Tok::BlockEnd) {
                    if !values.is_empty() {
                        self.expect_op(",")?;
                    }
                    values.push(self.expr()?);
                }
                self.block_end()?;
                Ok(Kind::Print(values))
            }
            "break" | "continue" if self.loops > 0 => {
                self.block_end()?;
                Ok(if word == "break" { Kind::Break } else { Kind::Continue })
            }
            "break" | "continue" => Err(format!("{word} outside of a loop")),
            "include" | "import" | "from" | "extends" | "block" => Err(format!(
                "{word}: a chat template is one file, other templates are not supported"
            )),
            "autoescape" => Err("autoescape: a prompt is no HTML, this is not supported".into()),
            _ => Err(format!("unknown statement {word}")),
        }
    }

    fn for_loop(&mut self) -> R<Kind> {
        let target = self.target(false, &["in"])?;
        if !self.skip_name("in") {
            return self.unexpected("in");
        }
        let iter = self.tuple(false, &["recursive"])?;
        let test = if self.skip_name("if") { Some(self.expr()?) } else { None };
        let recursive = self.skip_name("recursive");
        self.block_end()?;
        self.loops += 1;
        let body = self.statements(&["endfor", "else"]);
        self.loops -= 1;
        let body = body?;
        let otherwise = if self.skip_name("else") {
            self.block_end()?;
            self.statements(&["endfor"])?
        } else {
            Vec::new()
        };
        self.at += 1;
        self.block_end()?;
        Ok(Kind::For(Box::new(For { target, iter, test, recursive, body, otherwise })))
    }

    fn if_block(&mut self) -> R<Kind> {
        let mut branches = Vec::new();
        loop {
            let test = self.tuple(false, &[])?;
            self.block_end()?;
            branches.push((test, self.statements(&["elif", "else", "endif"])?));
            if self.skip_name("elif") {
                continue;
            }
            let otherwise = if self.skip_name("else") {
                self.block_end()?;
                self.statements(&["endif"])?
            } else {
                Vec::new()
            };
            self.at += 1;
            self.block_end()?;
            return Ok(Kind::If(branches, otherwise));
        }
    }

    fn set(&mut self) -> R<Kind> {
        let target = self.target(true, &[])?;
        if self.skip_op("=") {
            let value = self.tuple(true, &[])?;
            self.block_end()?;
            return Ok(Kind::Set(target, value));
        }
        let filters = self.filters(false)?;
        Ok(Kind::SetBlock(target, filters, self.body("endset")?))
    }

    fn signature(&mut self) -> R<(Vec<Name>, Vec<Expr>)> {
        let (mut params, mut defaults) = (Vec::new(), Vec::new());
        self.expect_op("(")?;
        while !self.is_op(")") {
            if !params.is_empty() {
                self.expect_op(",")?;
            }
            let name = self.expect_name()?;
            if CONSTANTS.contains(&name.as_str()) {
                return Err(format!("cannot assign to {name}"));
            }
            params.push(self.name(&name));
            if self.skip_op("=") {
                defaults.push(self.expr()?);
            } else if !defaults.is_empty() {
                return Err("a parameter without a default after one with".into());
            }
        }
        self.expect_op(")")?;
        Ok((params, defaults))
    }

    fn macro_body(
        &mut self,
        name: String,
        params: Vec<Name>,
        defaults: Vec<Expr>,
        end: &str,
    ) -> R<usize> {
        let loops = std::mem::take(&mut self.loops);
        self.macros.push([false; 3]);
        let body = self.body(end);
        self.loops = loops;
        let uses = self.macros.pop().unwrap_or_default();
        let is_caller =
            |name: &Name| self.program.names.get(*name).is_some_and(|name| name == "caller");
        let caller = params.iter().position(is_caller).filter(|_| uses[2]);
        if caller.is_some_and(|at| at < params.len() - defaults.len()) {
            return Err("the parameter caller: expected a default, or no such parameter".into());
        }
        self.program.macros.push(Macro { name, params, defaults, body: body?, uses });
        Ok(self.program.macros.len() - 1)
    }

    /// What is assigned to: a name, names with commas, or with `attr` an attribute of a name.
    fn target(&mut self, attr: bool, ends: &[&str]) -> R<Target> {
        self.nested(|p| {
            let mut list = Vec::new();
            let mut is_tuple = false;
            loop {
                if !list.is_empty() && (p.is_tuple_end(ends) || p.is_op("=")) {
                    break;
                }
                list.push(p.one_target(attr, ends)?);
                if !p.skip_op(",") {
                    break;
                }
                is_tuple = true;
            }
            match list.pop() {
                Some(one) if !is_tuple => Ok(one),
                last => Ok(Target::Tuple(list.into_iter().chain(last).collect())),
            }
        })
    }

    fn one_target(&mut self, attr: bool, ends: &[&str]) -> R<Target> {
        if self.skip_op("(") {
            let inner = self.target(attr, ends)?;
            self.expect_op(")")?;
            return Ok(inner);
        }
        let name = self.expect_name()?;
        if CONSTANTS.contains(&name.as_str()) {
            return Err(format!("cannot assign to {name}"));
        }
        let id = self.name(&name);
        match attr && self.skip_op(".") {
            true => Ok(Target::Attr(id, self.expect_name()?)),
            false => Ok(Target::Name(id)),
        }
    }

    fn is_tuple_end(&self, ends: &[&str]) -> bool {
        matches!(self.peek(), Some(Tok::PrintEnd | Tok::BlockEnd))
            || self.is_op(")")
            || ends.iter().any(|end| self.is_name(end))
    }

    /// An expression, or several with commas.
    fn tuple(&mut self, with_if: bool, ends: &[&str]) -> R<Expr> {
        let mut items = Vec::new();
        let mut is_tuple = false;
        loop {
            if self.is_tuple_end(ends) {
                break;
            }
            items.push(if with_if { self.expr()? } else { self.nested(Parser::or)? });
            if !self.skip_op(",") {
                break;
            }
            is_tuple = true;
        }
        match items.pop() {
            Some(one) if !is_tuple => Ok(one),
            None => self.unexpected("an expression"),
            last => Ok(Expr::Tuple(items.into_iter().chain(last).collect())),
        }
    }

    fn expr(&mut self) -> R<Expr> {
        self.nested(|p| {
            let mut value = p.or()?;
            while p.skip_name("if") {
                let test = p.or()?;
                let otherwise = if p.skip_name("else") { Some(p.expr()?) } else { None };
                value = Expr::If(Box::new((test, value, otherwise)));
                // One that follows another nests around it.
                p.deeper()?;
            }
            Ok(value)
        })
    }

    fn or(&mut self) -> R<Expr> {
        let mut list = vec![self.and()?];
        while self.skip_name("or") {
            list.push(self.and()?);
        }
        Ok(one_or(list, Expr::Or))
    }

    fn and(&mut self) -> R<Expr> {
        let mut list = vec![self.not()?];
        while self.skip_name("and") {
            list.push(self.not()?);
        }
        Ok(one_or(list, Expr::And))
    }

    fn not(&mut self) -> R<Expr> {
        if self.skip_name("not") {
            return Ok(Expr::Not(Box::new(self.nested(Parser::not)?)));
        }
        self.compare()
    }

    fn compare(&mut self) -> R<Expr> {
        let first = self.chain(0)?;
        let mut rest = Vec::new();
        loop {
            let op = match self.peek() {
                Some(Tok::Op("==")) => Cmp::Eq,
                Some(Tok::Op("!=")) => Cmp::Ne,
                Some(Tok::Op("<")) => Cmp::Lt,
                Some(Tok::Op("<=")) => Cmp::Le,
                Some(Tok::Op(">")) => Cmp::Gt,
                Some(Tok::Op(">=")) => Cmp::Ge,
                Some(Tok::Name(name)) if name == "in" => Cmp::In,
                Some(Tok::Name(name)) if name == "not" => {
                    let then = self.tokens.get(self.at + 1).map(|token| &token.tok);
                    if !matches!(then, Some(Tok::Name(name)) if name == "in") {
                        break;
                    }
                    self.at += 1;
                    Cmp::NotIn
                }
                _ => break,
            };
            self.at += 1;
            rest.push((op, self.chain(0)?));
        }
        Ok(if rest.is_empty() { first } else { Expr::Compare(Box::new(first), rest) })
    }

    /// Operators of a rank: sums, then `~`, products, powers.
    fn chain(&mut self, rank: usize) -> R<Expr> {
        const RANKS: [&[(&str, Op)]; 4] = [
            &[("+", Op::Add), ("-", Op::Sub)],
            &[],
            &[("*", Op::Mul), ("/", Op::Div), ("//", Op::FloorDiv), ("%", Op::Rem)],
            &[("**", Op::Pow)],
        ];
        let Some(ops) = RANKS.get(rank) else { return self.unary(true) };
        let first = self.chain(rank + 1)?;
        if ops.is_empty() {
            let mut list = vec![first];
            while self.skip_op("~") {
                list.push(self.chain(rank + 1)?);
            }
            return Ok(one_or(list, Expr::Concat));
        }
        let mut rest = Vec::new();
        while let Some(&(_, op)) = ops.iter().find(|(text, _)| self.is_op(text)) {
            self.at += 1;
            rest.push((op, self.chain(rank + 1)?));
        }
        Ok(if rest.is_empty() { first } else { Expr::Chain(Box::new(first), rest) })
    }

    fn unary(&mut self, with_filters: bool) -> R<Expr> {
        let value = if self.skip_op("-") {
            Expr::Neg(Box::new(self.nested(|p| p.unary(false))?))
        } else if self.skip_op("+") {
            Expr::Pos(Box::new(self.nested(|p| p.unary(false))?))
        } else {
            self.primary()?
        };
        let mut post = Vec::new();
        self.postfix(&mut post)?;
        if with_filters {
            self.filters_and_tests(&mut post)?;
        }
        Ok(if post.is_empty() { value } else { Expr::Post(Box::new(value), post) })
    }

    fn primary(&mut self) -> R<Expr> {
        match self.next() {
            Some(Tok::Name(name)) => Ok(match name.as_str() {
                "true" | "True" => Expr::Bool(true),
                "false" | "False" => Expr::Bool(false),
                "none" | "None" => Expr::None,
                name => {
                    if let Some(at) = IMPLICIT.iter().position(|implicit| *implicit == name) {
                        self.macros.iter_mut().for_each(|uses| uses[at] = true);
                    }
                    Expr::Name(self.name(name))
                }
            }),
            Some(Tok::Str(mut text)) => {
                while let Some(Tok::Str(more)) = self.peek() {
                    text.push_str(more);
                    self.at += 1;
                }
                Ok(Expr::Text(self.text(text)))
            }
            Some(Tok::Int(n)) => Ok(Expr::Int(n)),
            Some(Tok::Float(n)) => Ok(Expr::Float(n)),
            Some(Tok::Op("(")) => {
                if self.skip_op(")") {
                    return Ok(Expr::Tuple(Vec::new()));
                }
                let value = self.tuple(true, &[])?;
                self.expect_op(")")?;
                Ok(value)
            }
            Some(Tok::Op("[")) => {
                let mut items = Vec::new();
                while !self.is_op("]") {
                    if !items.is_empty() {
                        self.expect_op(",")?;
                    }
                    if self.is_op("]") {
                        break;
                    }
                    items.push(self.expr()?);
                }
                self.expect_op("]")?;
                Ok(Expr::List(items))
            }
            Some(Tok::Op("{")) => {
                let mut items = Vec::new();
                while !self.is_op("}") {
                    if !items.is_empty() {
                        self.expect_op(",")?;
                    }
                    if self.is_op("}") {
                        break;
                    }
                    let key = self.expr()?;
                    self.expect_op(":")?;
                    items.push((key, self.expr()?));
                }
                self.expect_op("}")?;
                Ok(Expr::Dict(items))
            }
            found => {
                self.at -= usize::from(found.is_some());
                self.unexpected("an expression")
            }
        }
    }

    /// Attributes, items and calls.
    fn postfix(&mut self, post: &mut Vec<Post>) -> R<()> {
        loop {
            if self.skip_op(".") {
                post.push(match self.next() {
                    Some(Tok::Name(name)) => Post::Attr(name),
                    Some(Tok::Int(n)) => Post::Item(Expr::Int(n)),
                    found => {
                        self.at -= usize::from(found.is_some());
                        return self.unexpected("a name or number");
                    }
                });
            } else if self.skip_op("[") {
                post.push(self.subscript()?);
            } else if self.is_op("(") {
                post.push(Post::Call(self.args()?));
            } else {
                return Ok(());
            }
        }
    }

    fn subscript(&mut self) -> R<Post> {
        let mut parts = [None, None, None];
        let mut n_colons = 0;
        let mut items = Vec::new();
        loop {
            if self.skip_op("]") {
                break;
            }
            if self.skip_op(":") {
                n_colons += 1;
                if n_colons > 2 {
                    return self.unexpected("]");
                }
                continue;
            }
            if n_colons == 0 && !items.is_empty() {
                self.expect_op(",")?;
                if self.skip_op("]") {
                    break;
                }
            }
            let value = self.expr()?;
            if n_colons == 0 {
                items.push(value);
                continue;
            }
            if parts[n_colons].replace(value).is_some() {
                return self.unexpected("]");
            }
        }
        if n_colons > 0 {
            if items.len() > 1 {
                return Err("a slice inside of a tuple is not supported".into());
            }
            parts[0] = items.pop();
            return Ok(Post::Slice(Box::new(parts)));
        }
        match items.pop() {
            Some(one) if items.is_empty() => Ok(Post::Item(one)),
            last => Ok(Post::Item(Expr::Tuple(items.into_iter().chain(last).collect()))),
        }
    }

    fn filters_and_tests(&mut self, post: &mut Vec<Post>) -> R<()> {
        loop {
            if self.is_op("|") {
                post.extend(self.filters(false)?);
            } else if self.skip_name("is") {
                let negated = self.skip_name("not");
                let name = self.dotted_name()?;
                post.push(Post::Test(name, self.test_args()?, negated));
            } else if self.is_op("(") {
                post.push(Post::Call(self.args()?));
            } else {
                return Ok(());
            }
        }
    }

    fn test_args(&mut self) -> R<Args> {
        let takes = match self.peek() {
            Some(Tok::Op("(")) => return self.args(),
            Some(Tok::Name(name)) => !matches!(name.as_str(), "else" | "or" | "and"),
            Some(Tok::Str(_) | Tok::Int(_) | Tok::Float(_) | Tok::Op("[" | "{")) => true,
            _ => false,
        };
        if !takes {
            return Ok(Args::default());
        }
        if self.is_name("is") {
            return Err("tests cannot be chained with is".into());
        }
        let value = self.nested(Parser::primary)?;
        let mut post = Vec::new();
        self.postfix(&mut post)?;
        let value = if post.is_empty() { value } else { Expr::Post(Box::new(value), post) };
        Ok(Args { pos: vec![value], ..Args::default() })
    }

    /// `| name(args)`, as often as it is there; with `inline` the first without its bar.
    fn filters(&mut self, mut inline: bool) -> R<Vec<Post>> {
        let mut list = Vec::new();
        while inline || self.skip_op("|") {
            inline = false;
            let name = self.dotted_name()?;
            let args = if self.is_op("(") { self.args()? } else { Args::default() };
            list.push(Post::Filter(name, args));
        }
        Ok(list)
    }

    fn dotted_name(&mut self) -> R<String> {
        let mut name = self.expect_name()?;
        while self.skip_op(".") {
            name.push('.');
            name.push_str(&self.expect_name()?);
        }
        Ok(name)
    }

    fn args(&mut self) -> R<Args> {
        let mut args = Args::default();
        let invalid = || Err("arguments in an order that no call has".into());
        self.expect_op("(")?;
        let mut first = true;
        while !self.is_op(")") {
            if !first {
                self.expect_op(",")?;
                if self.is_op(")") {
                    break;
                }
            }
            first = false;
            let is_named = matches!(self.peek(), Some(Tok::Name(_)))
                && matches!(
                    self.tokens.get(self.at + 1).map(|token| &token.tok),
                    Some(Tok::Op("="))
                );
            if self.skip_op("**") {
                if args.named_rest.replace(self.expr()?).is_some() {
                    return invalid();
                }
            } else if self.skip_op("*") {
                if args.named_rest.is_some() || args.rest.replace(self.expr()?).is_some() {
                    return invalid();
                }
            } else if is_named {
                let name = self.expect_name()?;
                self.expect_op("=")?;
                if args.named_rest.is_some() {
                    return invalid();
                }
                args.named.push((name, self.expr()?));
            } else {
                if args.rest.is_some() || args.named_rest.is_some() || !args.named.is_empty() {
                    return invalid();
                }
                args.pos.push(self.expr()?);
            }
        }
        self.expect_op(")")?;
        Ok(args)
    }
}

/// One alone as it is, several as a list.
fn one_or(mut list: Vec<Expr>, several: impl FnOnce(Vec<Expr>) -> Expr) -> Expr {
    match list.pop() {
        Some(one) if list.is_empty() => one,
        last => several(list.into_iter().chain(last).collect()),
    }
}
