//! Runs a template.
//!
//! A walk over the tree. Every step and every byte is charged to the rendering's [`Meter`], and the walk's depth is
//! bounded, so that whatever a template says the worst is a refusal.

use std::rc::Rc;

use super::fault::{Fault, fault};
use super::parser::{Args, Cmp, Expr, For, IMPLICIT, Kind, Name, Op, Post, Program, Stmt, Target};
use super::text::{Builder, Meter, Str};
use super::value::{Dict, Items, Value, View, insert};
use super::{filters, format, functions, methods, tests};

pub(crate) type R<T> = Result<T, Fault>;

/// How deep statements, expressions and calls may stand in each other.
const MAX_DEPTH: usize = 600;

/// What a statement does to the loop around it.
#[derive(PartialEq, Eq)]
enum Flow {
    Next,
    Break,
    Continue,
}

/// Variables of a block.
struct Scope {
    vars: Vec<(Name, Value)>,
    parent: Option<usize>,
    /// Whether a macro was defined here or further in, so that it must outlive its block.
    kept: bool,
}

pub(crate) struct Loop<'t> {
    definition: &'t For,
    scope: usize,
    walk: Walk,
    len: usize,
    pub(crate) index: usize,
    pub(crate) depth: usize,
    pub(crate) last_changed: Option<Vec<Value>>,
}

/// What a loop walks over.
#[derive(Clone)]
enum Walk {
    List(Rc<Items>),
    /// A text by its characters, with the place of the one that is up. They are made as the loop comes to them,
    /// because a value weighs fifty times what a character does.
    Chars(Str, usize),
}

impl Walk {
    /// The entry that is up, by its number, or with 1 and -1 one of its neighbours.
    fn get(&self, index: usize, from: isize) -> Option<Value> {
        match self {
            Walk::List(items) => items.list.get(index.checked_add_signed(from)?).cloned(),
            Walk::Chars(text, at) => {
                let (before, rest) = text.as_str().split_at_checked(*at)?;
                let up = rest.chars().next().map_or(0, char::len_utf8);
                let (start, c) = match from {
                    0 => (*at, rest.chars().next()?),
                    1 => (at + up, rest.get(up..)?.chars().next()?),
                    _ => (at - before.chars().next_back()?.len_utf8(), before.chars().next_back()?),
                };
                Some(Value::Str(text.slice(start..start + c.len_utf8())))
            }
        }
    }
}

/// A rendering.
pub(crate) struct Run<'t> {
    program: &'t Program,
    pub(crate) meter: &'t Meter,
    texts: Vec<Str>,
    scopes: Vec<Scope>,
    implicit: [Option<Name>; 3],
    loop_name: Option<Name>,
    depth: usize,
    pub(crate) loops: Vec<Loop<'t>>,
    pub(crate) namespaces: Vec<Vec<(Value, Value)>>,
    pub(crate) cyclers: Vec<(Rc<Items>, usize)>,
    /// Separators, and whether they were used.
    pub(crate) joiners: Vec<(Str, bool)>,
    /// The clock, in seconds since 1970.
    pub(crate) now: u64,
}

/// The arguments of a call.
#[derive(Default)]
pub(crate) struct CallArgs {
    pub(crate) pos: Vec<Value>,
    pub(crate) named: Vec<(Str, Value)>,
}

impl CallArgs {
    /// The arguments by the names of parameters.
    pub(crate) fn bind<const N: usize>(
        self,
        what: &str,
        names: [&str; N],
    ) -> R<[Option<Value>; N]> {
        if self.pos.len() > N {
            return Err(fault(format!(
                "{what}: takes {N} arguments, {} were given",
                self.pos.len()
            )));
        }
        let mut bound = std::array::from_fn(|_| None);
        for (slot, value) in bound.iter_mut().zip(self.pos) {
            *slot = Some(value);
        }
        for (key, value) in self.named {
            let slot = names.iter().position(|name| *name == key.as_str());
            match slot.and_then(|at| bound.get_mut(at)) {
                Some(slot @ None) => *slot = Some(value),
                Some(_) => {
                    return Err(fault(format!("{what}: argument {} is given twice", key.as_str())));
                }
                None => return Err(fault(format!("{what}: unknown argument {}", key.as_str()))),
            }
        }
        Ok(bound)
    }

    /// Fails where there are arguments.
    pub(crate) fn none(self, what: &str) -> R<()> {
        self.bind::<0>(what, []).map(|_| ())
    }
}

impl<'t> Run<'t> {
    pub(crate) fn new(program: &'t Program, meter: &'t Meter, now: u64) -> Run<'t> {
        let name = |wanted: &str| program.names.iter().position(|name| name == wanted);
        Run {
            program,
            meter,
            texts: program.texts.iter().map(Str::own).collect(),
            scopes: vec![Scope { vars: Vec::new(), parent: None, kept: true }],
            implicit: IMPLICIT.map(name),
            loop_name: name("loop"),
            depth: 0,
            loops: Vec::new(),
            namespaces: Vec::new(),
            cyclers: Vec::new(),
            joiners: Vec::new(),
            now,
        }
    }

    /// Sets a variable, if the template asks for one of this name.
    pub(crate) fn set_global(&mut self, name: &str, value: Value) {
        if let Some(name) = self.program.names.iter().position(|have| have == name) {
            self.set(0, name, value);
        }
    }

    /// Whether the template asks for a variable of this name.
    pub(crate) fn asks_for(&self, name: &str) -> bool {
        self.program.names.iter().any(|have| have == name)
    }

    pub(crate) fn render(&mut self, out: &mut Builder<'_>) -> R<()> {
        self.exec(&self.program.body, 0, out).map(|_| ())
    }

    fn set(&mut self, scope: usize, name: Name, value: Value) {
        let Some(scope) = self.scopes.get_mut(scope) else { return };
        match scope.vars.iter_mut().find(|(have, _)| *have == name) {
            Some((_, old)) => *old = value,
            None => scope.vars.push((name, value)),
        }
    }

    fn lookup(&self, scope: usize, name: Name) -> R<Value> {
        let mut at = Some(scope);
        while let Some(scope) = at.and_then(|at| self.scopes.get(at)) {
            self.meter.work(1)?;
            if let Some((_, value)) = scope.vars.iter().find(|(have, _)| *have == name) {
                return Ok(value.clone());
            }
            at = scope.parent;
        }
        let name = self.program.names.get(name).map_or("", String::as_str);
        Ok(match functions::NAMES.iter().find(|have| **have == name) {
            Some(name) => Value::Function(name),
            None => Value::undefined(format!("'{name}' is undefined")),
        })
    }

    fn open(&mut self, parent: usize) -> usize {
        self.scopes.push(Scope { vars: Vec::new(), parent: Some(parent), kept: false });
        self.scopes.len() - 1
    }

    /// Lets the variables of a block go, unless a macro can still ask for them.
    fn close(&mut self, scope: usize) {
        while self.scopes.len() > scope && self.scopes.last().is_some_and(|last| !last.kept) {
            self.scopes.pop();
        }
    }

    /// Runs `body` with the variables of a new block.
    fn within<T>(&mut self, parent: usize, body: impl FnOnce(&mut Self, usize) -> R<T>) -> R<T> {
        let scope = self.open(parent);
        let result = body(self, scope);
        self.close(scope);
        result
    }

    fn deeper<T>(&mut self, body: impl FnOnce(&mut Self) -> R<T>) -> R<T> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(fault(format!("nests more than {MAX_DEPTH} deep")));
        }
        let result = body(self);
        self.depth -= 1;
        result
    }

    fn exec(&mut self, body: &'t [Stmt], scope: usize, out: &mut Builder<'_>) -> R<Flow> {
        self.deeper(|run| {
            for stmt in body {
                run.meter.work(1)?;
                match run.stmt(stmt, scope, out).map_err(|fault| fault.at(stmt.line))? {
                    Flow::Next => {}
                    flow => return Ok(flow),
                }
            }
            Ok(Flow::Next)
        })
    }

    fn stmt(&mut self, stmt: &'t Stmt, scope: usize, out: &mut Builder<'_>) -> R<Flow> {
        match &stmt.kind {
            Kind::Data(text) => {
                if let Some(text) = self.program.texts.get(*text) {
                    out.own(text)?;
                }
            }
            Kind::Print(values) => {
                for value in values {
                    self.eval(value, scope)?.write(out)?;
                }
            }
            Kind::If(branches, otherwise) => {
                for (test, body) in branches {
                    if self.eval(test, scope)?.is_true() {
                        return self.exec(body, scope, out);
                    }
                }
                return self.exec(otherwise, scope, out);
            }
            Kind::For(definition) => {
                let over = self.eval(&definition.iter, scope)?;
                self.run_loop(definition, &over, scope, 1, out)?;
            }
            Kind::Set(target, value) => {
                let value = self.eval(value, scope)?;
                self.assign(target, value, scope)?;
            }
            Kind::SetBlock(target, filters, body) => {
                let value = self.capture(body, scope)?;
                let value = self.post(Value::Str(value), filters, scope)?;
                self.assign(target, value, scope)?;
            }
            Kind::Filter(filters, body) => {
                let value = self.capture(body, scope)?;
                self.post(Value::Str(value), filters, scope)?.write(out)?;
            }
            Kind::With(set, body) => {
                let mut values = Vec::new();
                for (_, value) in set {
                    values.push(self.eval(value, scope)?);
                }
                return self.within(scope, |run, inner| {
                    for ((target, _), value) in set.iter().zip(values) {
                        run.assign(target, value, inner)?;
                    }
                    run.exec(body, inner, out)
                });
            }
            Kind::Macro(name, id) => {
                let value = self.closure(*id, scope)?;
                self.set(scope, *name, value);
            }
            Kind::Call(call, id) => {
                let caller = self.closure(*id, scope)?;
                let Expr::Post(object, post) = call else { return Ok(Flow::Next) };
                let Some((Post::Call(args), before)) = post.split_last() else {
                    return Ok(Flow::Next);
                };
                let object = self.eval(object, scope)?;
                let object = self.post(object, before, scope)?;
                let mut args = self.args(args, scope)?;
                args.named.push((Str::own("caller"), caller));
                self.call(&object, args)?.write(out)?;
            }
            Kind::Scope(body) => {
                return self.within(scope, |run, inner| run.exec(body, inner, out));
            }
            Kind::Break => return Ok(Flow::Break),
            Kind::Continue => return Ok(Flow::Continue),
        }
        Ok(Flow::Next)
    }

    /// A macro with the variables that it sees, which stay as long as the rendering.
    fn closure(&mut self, id: usize, scope: usize) -> R<Value> {
        let mut at = Some(scope);
        while let Some(scope) =
            at.and_then(|at| self.scopes.get_mut(at)).filter(|scope| !scope.kept)
        {
            scope.kept = true;
            self.meter.take(size_of::<Scope>() + scope.vars.len() * size_of::<(Name, Value)>())?;
            at = scope.parent;
        }
        Ok(Value::Macro(id, scope))
    }

    /// What a body writes.
    fn capture(&mut self, body: &'t [Stmt], scope: usize) -> R<Str> {
        let mut out = Builder::new(self.meter);
        self.within(scope, |run, inner| run.exec(body, inner, &mut out))?;
        Ok(out.finish())
    }

    fn run_loop(
        &mut self,
        definition: &'t For,
        over: &Value,
        scope: usize,
        depth: usize,
        out: &mut Builder<'_>,
    ) -> R<()> {
        let walk = match (&definition.test, over) {
            (None, Value::Str(text)) => Walk::Chars(text.clone().with_markup(false), 0),
            (None, over) => Walk::List(over.iterate(self.meter)?),
            (Some(test), over) => {
                let items = over.iterate(self.meter)?;
                let mut kept = Vec::new();
                for item in &items.list {
                    let keep = self.within(scope, |run, inner| {
                        run.assign(&definition.target, item.clone(), inner)?;
                        run.eval(test, inner)
                    });
                    if keep?.is_true() {
                        kept.push(item.clone());
                    }
                }
                Walk::List(Items::new(kept, self.meter)?)
            }
        };
        let len = match &walk {
            Walk::List(items) => items.list.len(),
            Walk::Chars(..) => over.len(self.meter)?,
        };
        self.meter.take(size_of::<Loop<'_>>())?;
        let id = self.loops.len();
        self.loops.push(Loop { definition, scope, walk, len, index: 0, depth, last_changed: None });
        // As in Jinja, `else` runs unless the body ran to its end once.
        let mut completed = false;
        for index in 0..len {
            self.loops[id].index = index;
            let Some(item) = self.loops[id].walk.get(index, 0) else { break };
            let flow = self.within(scope, |run, inner| {
                run.assign(&definition.target, item.clone(), inner)?;
                if let Some(name) = run.loop_name {
                    run.set(inner, name, Value::Loop(id));
                }
                run.exec(&definition.body, inner, out)
            })?;
            completed |= flow == Flow::Next;
            if let Walk::Chars(text, at) = &mut self.loops[id].walk {
                let up = text.as_str().get(*at..).and_then(|rest| rest.chars().next());
                *at += up.map_or(0, char::len_utf8);
            }
            if flow == Flow::Break {
                break;
            }
        }
        if !completed {
            self.within(scope, |run, inner| run.exec(&definition.otherwise, inner, out))?;
        }
        Ok(())
    }

    fn assign(&mut self, target: &Target, value: Value, scope: usize) -> R<()> {
        match target {
            Target::Name(name) => self.set(scope, *name, value),
            Target::Attr(name, attr) => {
                let Value::Namespace(id) = self.lookup(scope, *name)? else {
                    return Err(fault("cannot assign attribute on non-namespace object"));
                };
                if attr.starts_with('_') {
                    return Err(fault(format!("a namespace cannot hold {attr}")));
                }
                self.meter.take(attr.len() + size_of::<(Value, Value)>())?;
                let meter = self.meter;
                if let Some(space) = self.namespaces.get_mut(id) {
                    insert(space, Value::own(attr), value, meter)?;
                }
            }
            Target::Tuple(targets) => {
                let items = value.iterate(self.meter)?;
                if items.list.len() != targets.len() {
                    let (n, wanted) = (items.list.len(), targets.len());
                    return Err(fault(format!("expected {wanted} values to unpack, found {n}")));
                }
                for (target, item) in targets.iter().zip(&items.list) {
                    self.assign(target, item.clone(), scope)?;
                }
            }
        }
        Ok(())
    }

    fn evals(&mut self, list: &'t [Expr], scope: usize) -> R<Vec<Value>> {
        self.meter.take(list.len() * size_of::<Value>())?;
        list.iter().map(|item| self.eval(item, scope)).collect()
    }

    fn eval(&mut self, expr: &'t Expr, scope: usize) -> R<Value> {
        self.meter.work(1)?;
        match expr {
            Expr::None => Ok(Value::None),
            Expr::Bool(is) => Ok(Value::Bool(*is)),
            Expr::Int(n) => Ok(Value::Int(*n)),
            Expr::Float(n) => Ok(Value::Float(*n)),
            Expr::Text(id) => {
                Ok(self.texts.get(*id).map_or(Value::None, |text| Value::Str(text.clone())))
            }
            Expr::Name(name) => self.lookup(scope, *name),
            _ => self.deeper(|run| run.eval_parts(expr, scope)),
        }
    }

    fn eval_parts(&mut self, expr: &'t Expr, scope: usize) -> R<Value> {
        match expr {
            Expr::Tuple(list) => Value::tuple(self.evals(list, scope)?, self.meter),
            Expr::List(list) => Value::list(self.evals(list, scope)?, self.meter),
            Expr::Dict(list) => {
                let mut entries = Vec::new();
                for (key, value) in list {
                    let key = self.eval(key, scope)?;
                    let value = self.eval(value, scope)?;
                    insert(&mut entries, key, value, self.meter)?;
                }
                Ok(Value::Dict(Dict::new(entries, self.meter)?))
            }
            Expr::Not(value) => Ok(Value::Bool(!self.eval(value, scope)?.is_true())),
            Expr::Neg(value) => negate(&self.eval(value, scope)?),
            Expr::Pos(value) => match self.eval(value, scope)? {
                value @ (Value::Int(_) | Value::Float(_)) => Ok(value),
                Value::Bool(is) => Ok(Value::Int(i128::from(is))),
                other => {
                    Err(fault(format!("bad operand type for unary +: '{}'", other.type_name())))
                }
            },
            Expr::Chain(first, rest) => self.chain(first, rest, scope),
            Expr::Concat(list) => {
                let mut out = Builder::new(self.meter);
                for item in list {
                    self.eval(item, scope)?.write(&mut out)?;
                }
                Ok(Value::Str(out.finish()))
            }
            Expr::And(list) | Expr::Or(list) => {
                let stops = matches!(expr, Expr::Or(_));
                let mut value = Value::None;
                for item in list {
                    value = self.eval(item, scope)?;
                    if value.is_true() == stops {
                        break;
                    }
                }
                Ok(value)
            }
            Expr::Compare(first, rest) => {
                let mut left = self.eval(first, scope)?;
                for (op, right) in rest {
                    let right = self.eval(right, scope)?;
                    if !self.compare(*op, &left, &right)? {
                        return Ok(Value::Bool(false));
                    }
                    left = right;
                }
                Ok(Value::Bool(true))
            }
            Expr::If(parts) => {
                let (test, then, otherwise) = &**parts;
                match (self.eval(test, scope)?.is_true(), otherwise) {
                    (true, _) => self.eval(then, scope),
                    (false, Some(otherwise)) => self.eval(otherwise, scope),
                    (false, None) => Ok(Value::undefined(
                        "the inline if-expression evaluated to false and no else section was defined",
                    )),
                }
            }
            Expr::Post(object, post) => {
                let object = self.eval(object, scope)?;
                self.post(object, post, scope)
            }
            _ => Ok(Value::None),
        }
    }

    /// Operators of one rank. Texts that are added one after the other are copied once.
    fn chain(&mut self, first: &'t Expr, rest: &'t [(Op, Expr)], scope: usize) -> R<Value> {
        let mut value = self.eval(first, scope)?;
        let mut sum: Option<Builder<'_>> = None;
        for (op, right) in rest {
            let right = self.eval(right, scope)?;
            self.meter.work(1)?;
            if let (Op::Add, Value::Str(right)) = (op, &right)
                && !right.is_markup()
            {
                if let Some(sum) = &mut sum {
                    sum.push(right)?;
                    continue;
                }
                if let Value::Str(left) = &value
                    && !left.is_markup()
                {
                    let mut builder = Builder::new(self.meter);
                    builder.push(left)?;
                    builder.push(right)?;
                    sum = Some(builder);
                    continue;
                }
            }
            if let Some(sum) = sum.take() {
                value = Value::Str(sum.finish());
            }
            value = self.binary(*op, &value, &right)?;
        }
        Ok(sum.map_or(value, |sum| Value::Str(sum.finish())))
    }

    pub(crate) fn compare(&self, op: Cmp, left: &Value, right: &Value) -> R<bool> {
        use std::cmp::Ordering::{Equal, Greater, Less};
        let order = |allowed: &[_]| {
            Ok(left.cmp(right, self.meter)?.is_some_and(|order| allowed.contains(&order)))
        };
        match op {
            Cmp::Eq => left.eq(right, self.meter),
            Cmp::Ne => Ok(!left.eq(right, self.meter)?),
            Cmp::Lt => order(&[Less]),
            Cmp::Le => order(&[Less, Equal]),
            Cmp::Gt => order(&[Greater]),
            Cmp::Ge => order(&[Greater, Equal]),
            Cmp::In => right.contains(left, self.meter),
            Cmp::NotIn => Ok(!right.contains(left, self.meter)?),
        }
    }

    pub(crate) fn add(&mut self, left: &Value, right: &Value) -> R<Value> {
        self.binary(Op::Add, left, right)
    }

    fn binary(&mut self, op: Op, left: &Value, right: &Value) -> R<Value> {
        let is_format = op == Op::Rem && matches!(left, Value::Str(_));
        if let (Value::Undefined(why), _) | (_, Value::Undefined(why)) = (left, right)
            && !is_format
        {
            return Err(fault(&**why));
        }
        match (op, left, right) {
            (Op::Rem, Value::Str(text), _) if text.is_markup() => {
                Err(fault("formatting of escaped text is not supported"))
            }
            (Op::Rem, Value::Str(text), _) => format::percent(self, text, right).map(Value::Str),
            (Op::Add, Value::List(a), Value::List(b)) => {
                self.meter.take((a.list.len() + b.list.len()) * size_of::<Value>())?;
                Value::list([&a.list[..], &b.list[..]].concat(), self.meter)
            }
            (Op::Add, Value::Tuple(a), Value::Tuple(b)) => {
                self.meter.take((a.list.len() + b.list.len()) * size_of::<Value>())?;
                Value::tuple([&a.list[..], &b.list[..]].concat(), self.meter)
            }
            (Op::Mul, Value::Str(text), n) | (Op::Mul, n, Value::Str(text))
                if n.as_int().is_some() =>
            {
                let mut out = Builder::new(self.meter);
                if !text.is_empty() {
                    for _ in 0..n.as_int().unwrap_or(0) {
                        out.push(text)?;
                    }
                }
                Ok(Value::Str(out.finish().with_markup(text.is_markup())))
            }
            (Op::Mul, list @ (Value::List(items) | Value::Tuple(items)), n)
            | (Op::Mul, n, list @ (Value::List(items) | Value::Tuple(items)))
                if n.as_int().is_some() =>
            {
                let n = usize::try_from(n.as_int().unwrap_or(0).max(0)).unwrap_or(usize::MAX);
                let bytes = n.saturating_mul(items.list.len()).saturating_mul(size_of::<Value>());
                self.meter.take(bytes)?;
                let n = if items.list.is_empty() { 0 } else { n };
                let repeated = (0..n).flat_map(|_| items.list.iter().cloned()).collect();
                match list {
                    Value::List(_) => Value::list(repeated, self.meter),
                    _ => Value::tuple(repeated, self.meter),
                }
            }
            (Op::Add, Value::Str(a), Value::Str(b)) => {
                let is_markup = a.is_markup() || b.is_markup();
                let mut out = Builder::new(self.meter);
                for part in [a, b] {
                    match is_markup && !part.is_markup() {
                        true => filters::write_escaped(part, &mut out)?,
                        false => out.push(part)?,
                    }
                }
                Ok(Value::Str(out.finish().with_markup(is_markup)))
            }
            _ => arithmetic(op, left, right),
        }
    }

    /// What follows a value.
    fn post(&mut self, mut value: Value, post: &'t [Post], scope: usize) -> R<Value> {
        for part in post {
            self.meter.work(1)?;
            value = match part {
                Post::Attr(name) => self.attr(&value, name)?,
                Post::Item(key) => {
                    let key = self.eval(key, scope)?;
                    self.item(&value, &key)?
                }
                Post::Slice(parts) => {
                    let mut bounds = [None; 3];
                    for (bound, part) in bounds.iter_mut().zip(&**parts) {
                        let Some(part) = part else { continue };
                        *bound = match self.eval(part, scope)? {
                            Value::None => None,
                            other => Some(other.as_int().ok_or_else(|| {
                                fault(format!("a slice takes integers, not {}", other.type_name()))
                            })?),
                        };
                    }
                    self.slice(&value, bounds)?
                }
                Post::Call(args) => {
                    let args = self.args(args, scope)?;
                    self.call(&value, args)?
                }
                Post::Filter(name, args) => {
                    let args = self.args(args, scope)?;
                    filters::apply(self, name, value, args)?
                }
                Post::Test(name, args, negated) => {
                    let args = self.args(args, scope)?;
                    Value::Bool(tests::apply(self, name, &value, args)? != *negated)
                }
            };
        }
        Ok(value)
    }

    fn args(&mut self, args: &'t Args, scope: usize) -> R<CallArgs> {
        let mut out = CallArgs { pos: self.evals(&args.pos, scope)?, named: Vec::new() };
        for (name, value) in &args.named {
            let value = self.eval(value, scope)?;
            out.named.push((Str::own(name), value));
        }
        if let Some(rest) = &args.rest {
            let rest = self.eval(rest, scope)?.iterate(self.meter)?;
            out.pos.extend(rest.list.iter().cloned());
        }
        if let Some(rest) = &args.named_rest {
            let Value::Dict(dict) = self.eval(rest, scope)? else {
                return Err(fault("what follows ** must be a dict"));
            };
            for (key, value) in &dict.entries {
                let Value::Str(key) = key else { return Err(fault("keywords must be strings")) };
                if out.named.iter().any(|(have, _)| have.as_str() == key.as_str()) {
                    return Err(fault(format!("argument {} is given twice", key.as_str())));
                }
                out.named.push((key.clone(), value.clone()));
            }
        }
        self.meter.work(out.pos.len() + out.named.len())?;
        Ok(out)
    }

    /// Calls what can be called.
    pub(crate) fn call(&mut self, value: &Value, args: CallArgs) -> R<Value> {
        match value {
            Value::Macro(id, scope) => self.call_macro(*id, *scope, args).map(Value::Str),
            Value::Function(name) => functions::call(self, name, args),
            Value::Method(object, name) => methods::call(self, object, name, args),
            Value::Loop(id) => {
                let [items] = args.bind("loop", ["iterable"])?;
                let Some(state) = self.loops.get(*id).filter(|state| state.definition.recursive)
                else {
                    return Err(fault(
                        "loop() can be called only in a loop that is marked recursive",
                    ));
                };
                let (definition, scope, depth) = (state.definition, state.scope, state.depth);
                let over = items.unwrap_or(Value::None);
                let mut out = Builder::new(self.meter);
                self.deeper(|run| run.run_loop(definition, &over, scope, depth + 1, &mut out))?;
                Ok(Value::Str(out.finish()))
            }
            Value::Joiner(id) => {
                args.none("joiner")?;
                let Some((separator, used)) = self.joiners.get_mut(*id) else {
                    return Ok(Value::None);
                };
                let was_used = std::mem::replace(used, true);
                Ok(Value::Str(if was_used { separator.clone() } else { Str::own("") }))
            }
            Value::Undefined(why) => Err(fault(&**why)),
            other => Err(fault(format!("'{}' object is not callable", other.type_name()))),
        }
    }

    fn call_macro(&mut self, id: usize, scope: usize, args: CallArgs) -> R<Str> {
        let program = self.program;
        let Some(definition) = program.macros.get(id) else { return Ok(Str::own("")) };
        let what = &definition.name;
        let n = definition.params.len();
        let mut bound: Vec<Option<Value>> = Vec::new();
        let mut pos = args.pos.into_iter();
        bound.extend(pos.by_ref().take(n).map(Some));
        bound.resize(n, None);
        let extra: Vec<Value> = pos.collect();
        let [wants_extra, wants_named, wants_caller] = definition.uses;
        if !extra.is_empty() && !wants_extra {
            return Err(fault(format!("macro {what}: takes not more than {n} arguments")));
        }
        let (mut named, mut caller) = (Vec::new(), None);
        for (key, value) in args.named {
            let is =
                |name: &Name| program.names.get(*name).is_some_and(|name| name == key.as_str());
            match definition.params.iter().position(is) {
                Some(at) if bound[at].is_none() => bound[at] = Some(value),
                Some(_) => {
                    return Err(fault(format!(
                        "macro {what}: argument {} is given twice",
                        key.as_str()
                    )));
                }
                None if key.as_str() == "caller" && wants_caller => caller = Some(value),
                None if wants_named => insert(&mut named, Value::Str(key), value, self.meter)?,
                None => {
                    return Err(fault(format!("macro {what}: takes no argument {}", key.as_str())));
                }
            }
        }
        let mut out = Builder::new(self.meter);
        self.deeper(|run| {
            run.within(scope, |run, inner| {
                let first_default = n - definition.defaults.len();
                for (at, (param, value)) in definition.params.iter().zip(bound).enumerate() {
                    let default =
                        at.checked_sub(first_default).and_then(|at| definition.defaults.get(at));
                    let value = match (value, default) {
                        (Some(value), _) => value,
                        (None, Some(default)) => run.eval(default, inner)?,
                        (None, None) => {
                            let name = program.names.get(*param).map_or("", String::as_str);
                            Value::undefined(format!("parameter '{name}' was not provided"))
                        }
                    };
                    run.set(inner, *param, value);
                }
                let [extra_name, named_name, caller_name] = run.implicit;
                if let Some(name) = extra_name.filter(|_| wants_extra) {
                    let extra = Value::tuple(extra, run.meter)?;
                    run.set(inner, name, extra);
                }
                if let Some(name) = named_name.filter(|_| wants_named) {
                    let named = Value::Dict(Dict::new(named, run.meter)?);
                    run.set(inner, name, named);
                }
                let is_param = |name: &Name| definition.params.contains(name);
                if let Some(name) = caller_name.filter(|name| wants_caller && !is_param(name)) {
                    run.set(
                        inner,
                        name,
                        caller.unwrap_or_else(|| Value::undefined("No caller defined")),
                    );
                }
                run.exec(&definition.body, inner, &mut out)
            })
        })?;
        Ok(out.finish())
    }

    /// `value.name`.
    fn attr(&mut self, value: &Value, name: &str) -> R<Value> {
        if let Some(attr) = self.own_attr(value, name)? {
            return Ok(attr);
        }
        match value {
            Value::Undefined(why) => Err(fault(&**why)),
            Value::Dict(dict) => match dict.get_str(name, self.meter)? {
                Some(found) => Ok(found.clone()),
                None => Ok(missing(value, name)),
            },
            _ => Ok(missing(value, name)),
        }
    }

    /// What Python's `getattr` finds.
    fn own_attr(&self, value: &Value, name: &str) -> R<Option<Value>> {
        match value {
            Value::Namespace(id) => {
                let space = self.namespaces.get(*id).map_or(&[][..], Vec::as_slice);
                self.meter.work(space.len())?;
                let is = |(key, _): &&(Value, Value)| matches!(key, Value::Str(key) if key.as_str() == name);
                Ok(space.iter().find(is).map(|(_, value)| value.clone()))
            }
            Value::Loop(id) => {
                Ok(self.loops.get(*id).and_then(|state| loop_attr(state, value, name)))
            }
            Value::Group(items) => Ok(match name {
                "grouper" => items.list.first().cloned(),
                "list" => items.list.get(1).cloned(),
                _ => None,
            }),
            Value::Cycler(id) if name == "current" => {
                Ok(self.cyclers.get(*id).and_then(|(items, at)| items.list.get(*at).cloned()))
            }
            Value::Macro(id, _) if name == "name" => {
                Ok(self.program.macros.get(*id).map(|definition| Value::own(&definition.name)))
            }
            _ => Ok(match methods::find(value, name) {
                Some(method) => Some(Value::Method(Rc::new(value.clone()), method)),
                // The sandbox has these and gives none of them out.
                None => methods::is_unsafe(value, name).then(|| {
                    let kind = value.type_name();
                    Value::undefined(format!(
                        "access to attribute '{name}' of '{kind}' object is unsafe."
                    ))
                }),
            }),
        }
    }

    /// `value[key]`.
    pub(crate) fn item(&mut self, value: &Value, key: &Value) -> R<Value> {
        let found = match (value, key) {
            (Value::Undefined(why), _) => return Err(fault(&**why)),
            (Value::Dict(dict), Value::Str(key)) => {
                dict.get_str(key.as_str(), self.meter)?.cloned()
            }
            (Value::Dict(dict), key) => dict.get(key, self.meter)?.cloned(),
            (
                Value::Str(_)
                | Value::List(_)
                | Value::Tuple(_)
                | Value::Group(_)
                | Value::Range(..),
                key,
            ) => match key.as_int() {
                Some(index) => self.index(value, index)?,
                None => None,
            },
            _ => None,
        };
        match (found, key) {
            (Some(found), _) => Ok(found),
            (None, Value::Str(key)) => match self.own_attr(value, key.as_str())? {
                Some(attr) => Ok(attr),
                None => Ok(missing(value, key.as_str())),
            },
            (None, Value::Int(index)) => Ok(missing(value, &index.to_string())),
            (None, key) => Ok(missing(value, key.type_name())),
        }
    }

    fn index(&self, value: &Value, index: i128) -> R<Option<Value>> {
        let len = value.len(self.meter)? as i128;
        let at = if index < 0 { index + len } else { index };
        let Some(at) = usize::try_from(at).ok().filter(|at| (*at as i128) < len) else {
            return Ok(None);
        };
        Ok(match value {
            Value::Str(text) => {
                let at = char_offset(text, at);
                let len = text
                    .as_str()
                    .get(at..)
                    .and_then(|rest| rest.chars().next())
                    .map_or(0, char::len_utf8);
                Some(Value::Str(text.slice(at..at + len)))
            }
            Value::List(items) | Value::Tuple(items) | Value::Group(items) => {
                items.list.get(at).cloned()
            }
            Value::Range(range) => Some(Value::Int(range[0] + at as i128 * range[2])),
            _ => None,
        })
    }

    fn slice(&self, value: &Value, bounds: [Option<i128>; 3]) -> R<Value> {
        if let Value::Undefined(why) = value {
            return Err(fault(&**why));
        }
        if !matches!(
            value,
            Value::Str(_) | Value::List(_) | Value::Tuple(_) | Value::Group(_) | Value::Range(..)
        ) {
            return Err(fault(format!("'{}' object has no slices", value.type_name())));
        }
        let len = value.len(self.meter)? as i128;
        let step = bounds[2].unwrap_or(1);
        if step == 0 {
            return Err(fault("slice step cannot be zero"));
        }
        let (lowest, highest) = if step > 0 { (0, len) } else { (-1, len - 1) };
        let place = |bound: Option<i128>, default: i128| match bound {
            None => default,
            Some(n) if n < 0 => n.saturating_add(len).max(lowest),
            Some(n) => n.min(highest),
        };
        let (from, to) = if step > 0 { (0, len) } else { (len - 1, -1) };
        let (start, stop) = (place(bounds[0], from), place(bounds[1], to));
        let span = if step > 0 { stop - start } else { start - stop };
        let n = if span <= 0 { 0 } else { (span - 1) / step.saturating_abs() + 1 };
        let at = |i: i128| usize::try_from(start + i * step).unwrap_or(0);
        match value {
            Value::Range(range) => {
                let [first, _, stride] = **range;
                let ends = [first + start * stride, first + stop * stride, stride * step];
                Ok(Value::Range(Box::new(ends)))
            }
            Value::Str(text) if step == 1 || n == 0 => {
                let from = char_offset(text, at(0));
                let part = text.slice(from..text.len());
                Ok(Value::Str(part.slice(0..char_offset(&part, usize::try_from(n).unwrap_or(0)))))
            }
            Value::Str(text) => {
                let list: Vec<(char, bool)> = {
                    self.meter.take(text.len().saturating_mul(8))?;
                    text.marked_chars().collect()
                };
                let mut out = Builder::new(self.meter);
                for i in 0..n {
                    if let Some(&(c, foreign)) = list.get(at(i)) {
                        out.char(c, foreign)?;
                    }
                }
                Ok(Value::Str(out.finish()))
            }
            Value::List(items) | Value::Tuple(items) | Value::Group(items) => {
                let list = (0..n).filter_map(|i| items.list.get(at(i)).cloned()).collect();
                match value {
                    Value::List(_) => Value::list(list, self.meter),
                    _ => Value::tuple(list, self.meter),
                }
            }
            _ => Ok(Value::None),
        }
    }
}

/// What is not there, and what to say of it.
fn missing(value: &Value, name: &str) -> Value {
    let name: String = name.chars().take(64).collect();
    Value::undefined(format!("'{} object' has no attribute '{name}'", value.type_name()))
}

/// Where the character of this number begins.
pub(crate) fn char_offset(text: &Str, n: usize) -> usize {
    let plain = text.as_str();
    if plain.is_ascii() {
        return n.min(plain.len());
    }
    plain.char_indices().nth(n).map_or(plain.len(), |(at, _)| at)
}

fn loop_attr(state: &Loop<'_>, value: &Value, name: &str) -> Option<Value> {
    let len = state.len;
    let int = |n: usize| Some(Value::Int(n as i128));
    match name {
        "index" => int(state.index + 1),
        "index0" => int(state.index),
        "revindex" => int(len - state.index),
        "revindex0" => int(len - state.index - 1),
        "first" => Some(Value::Bool(state.index == 0)),
        "last" => Some(Value::Bool(state.index + 1 == len)),
        "length" => int(len),
        "depth" => int(state.depth),
        "depth0" => int(state.depth - 1),
        "previtem" => {
            let missing = || Value::undefined("there is no previous item");
            Some(state.walk.get(state.index, -1).unwrap_or_else(missing))
        }
        "nextitem" => {
            let missing = || Value::undefined("there is no next item");
            Some(state.walk.get(state.index, 1).unwrap_or_else(missing))
        }
        "cycle" | "changed" => {
            let name = if name == "cycle" { "cycle" } else { "changed" };
            Some(Value::Method(Rc::new(value.clone()), name))
        }
        _ => None,
    }
}

fn too_large() -> Fault {
    fault("a number is too large: expected at most 127 bits")
}

fn negate(value: &Value) -> R<Value> {
    match value {
        Value::Float(n) => Ok(Value::Float(-n)),
        Value::Undefined(why) => Err(fault(&**why)),
        other => match other.as_int() {
            Some(n) => Ok(Value::Int(n.checked_neg().ok_or_else(too_large)?)),
            None => Err(fault(format!("bad operand type for unary -: '{}'", other.type_name()))),
        },
    }
}

/// Operators on numbers.
fn arithmetic(op: Op, left: &Value, right: &Value) -> R<Value> {
    let zero = || fault("division by zero");
    if let (Some(a), Some(b)) = (left.as_int(), right.as_int()) {
        let value = match op {
            Op::Add => a.checked_add(b),
            Op::Sub => a.checked_sub(b),
            Op::Mul => a.checked_mul(b),
            Op::FloorDiv | Op::Rem if b == 0 => return Err(zero()),
            Op::FloorDiv => {
                let inexact = a.checked_rem(b).is_some_and(|rest| rest != 0) && (a < 0) != (b < 0);
                a.checked_div(b).map(|n| n - i128::from(inexact))
            }
            Op::Rem => {
                a.checked_rem(b).map(|n| if n != 0 && (n < 0) != (b < 0) { n + b } else { n })
            }
            Op::Pow if b >= 0 => match (a, u32::try_from(b)) {
                (0 | 1, _) => Some(if b == 0 { 1 } else { a }),
                (-1, _) => Some(if b % 2 == 0 { 1 } else { -1 }),
                (_, Ok(b)) => a.checked_pow(b),
                _ => None,
            },
            Op::Pow | Op::Div => return floats(op, left, right),
        };
        return value.map(Value::Int).ok_or_else(too_large);
    }
    floats(op, left, right)
}

fn floats(op: Op, left: &Value, right: &Value) -> R<Value> {
    let (Some(a), Some(b)) = (left.as_float(), right.as_float()) else {
        let (a, b) = (left.type_name(), right.type_name());
        return Err(fault(format!("unsupported operand types: '{a}' and '{b}'")));
    };
    let zero = matches!(op, Op::Div | Op::FloorDiv | Op::Rem) && b == 0.0;
    if zero || (op == Op::Pow && a == 0.0 && b < 0.0) {
        return Err(fault("division by zero"));
    }
    // As Python divides floats with a rest: the rest has the divisor's sign.
    let rest = || {
        let rest = a % b;
        if rest != 0.0 && (rest < 0.0) != (b < 0.0) { rest + b } else { rest }
    };
    Ok(Value::Float(match op {
        Op::Add => a + b,
        Op::Sub => a - b,
        Op::Mul => a * b,
        Op::Div => a / b,
        Op::Rem if rest() == 0.0 => 0f64.copysign(b),
        Op::Rem => rest(),
        Op::FloorDiv => {
            let quotient = (a - rest()) / b;
            let floor = quotient.floor();
            if quotient - floor > 0.5 { floor + 1.0 } else { floor }
        }
        Op::Pow => {
            let power = a.powf(b);
            if power.is_nan() && !a.is_nan() && !b.is_nan() {
                return Err(fault("a power that is no real number"));
            }
            if power.is_infinite() && a.is_finite() && b.is_finite() {
                return Err(fault("numerical result out of range"));
            }
            power
        }
    }))
}

/// A dict's view.
pub(crate) fn view(kind: View, dict: &Dict, meter: &Meter) -> R<Value> {
    let mut list = Vec::with_capacity(dict.entries.len());
    for (key, value) in &dict.entries {
        list.push(match kind {
            View::Keys => key.clone(),
            View::Values => value.clone(),
            View::Items => Value::tuple(vec![key.clone(), value.clone()], meter)?,
        });
    }
    Ok(Value::View(kind, Items::new(list, meter)?))
}
