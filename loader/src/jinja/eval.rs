//! Runs a template.
//!
//! A walk over the tree. Every step and every byte is charged to the rendering's [`Meter`], and the walk's depth is
//! bounded, so that whatever a template says the worst is a refusal.

use super::fault::fault;
use super::operators::negate;
use super::parser::{Args, Expr, For, IMPLICIT, Kind, Name, Op, Post, Program, Stmt, Target};
use super::run::{CallArgs, Loop, R, Run, Scope, Walk};
use super::text::{Builder, Meter, Str};
use super::value::{Dict, Items, Value, insert};
use super::{filters, functions, methods, tests};

/// How deep statements, expressions and calls may stand in each other.
const MAX_DEPTH: usize = 600;

/// What a statement does to the loop around it.
#[derive(PartialEq, Eq)]
enum Flow {
    Next,
    Break,
    Continue,
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
            is_filter: filters::exists,
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
}
