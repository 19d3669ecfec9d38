//! Chat templates rewritten so that every byte they copy is counted.
//!
//! A template is a program from a stranger. The template engine's fuel bounds how many instructions it runs, not how
//! much memory they take: `s ~ s` forty times over asks for a terabyte and aborts the process. So before a template is
//! compiled, [`meter`] wraps in its source every expression that makes a new value out of others (operators on
//! strings and lists, slices, filters, calls) as `((...)|__meter)`. The filter charges the value's size to the
//! rendering's budget and refuses when that is spent. What `~` turns into text goes through `__text` first, which
//! writes it within the budget, because a short list can have a very long text.
//!
//! The rewriting works on the spans of the syntax tree and is checked: the result is parsed again, and unless every
//! such expression now stands directly inside the filter, the template is refused. Statements that take values past
//! the filter and that chat templates have no use for (includes, call blocks, filter blocks) are refused too.

use std::ops::Range;

use minijinja::machinery::ast::{BinOpKind, CallArg, Expr, Stmt};
use minijinja::machinery::parse;
use minijinja::syntax::SyntaxConfig;

/// The filter that charges a value.
pub(crate) const METER: &str = "__meter";
/// The filter that turns a value into text within the budget.
pub(crate) const TEXT: &str = "__text";

/// A template that counts what it copies.
pub(crate) struct Metered {
    pub(crate) source: String,
    /// The longest literal text that is collected into a variable or a macro's result, which the filter does not see.
    pub(crate) longest_captured: usize,
}

/// Rewrites a template, or says why it cannot be bounded.
pub(crate) fn meter(source: &str, syntax: &SyntaxConfig) -> Result<Metered, String> {
    let tree = parse(source, "chat", syntax.clone()).map_err(|err| err.to_string())?;
    let mut walk = Walk { source, bare: Vec::new(), longest_captured: 0 };
    walk.stmt(&tree, false)?;

    let out = wrap(source, &walk.bare).ok_or("the template's parser gives a wrong position")?;
    let tree =
        parse(&out, "chat", syntax.clone()).map_err(|err| format!("cannot be metered: {err}"))?;
    let mut check = Walk { source: &out, bare: Vec::new(), longest_captured: 0 };
    check.stmt(&tree, false)?;
    match check.bare.first() {
        None => Ok(Metered { source: out, longest_captured: walk.longest_captured }),
        Some(bare) => {
            Err(format!("cannot be metered: {}", out.get(bare.span.clone()).unwrap_or("?")))
        }
    }
}

/// The source with each of these expressions inside its filter.
fn wrap(source: &str, bare: &[Bare]) -> Option<String> {
    let mut opens: Vec<usize> = bare.iter().map(|bare| bare.span.start).collect();
    opens.sort_unstable();
    let mut closes: Vec<&Bare> = bare.iter().collect();
    // Of those that end at one place the innermost closes first: the one that starts last, and of two filters around
    // one expression the meter.
    closes.sort_by_key(|bare| (bare.span.end, usize::MAX - bare.span.start, bare.filter != METER));

    let mut out = String::with_capacity(source.len() + bare.len() * 16);
    let (mut opens, mut closes, mut done) =
        (opens.into_iter().peekable(), closes.into_iter().peekable(), 0);
    loop {
        let open = opens.peek().copied().unwrap_or(usize::MAX);
        let close = closes.peek().map_or(usize::MAX, |bare| bare.span.end);
        let at = open.min(close);
        if at == usize::MAX {
            out.push_str(source.get(done..)?);
            return Some(out);
        }
        out.push_str(source.get(done..at)?);
        done = at;
        if close == at {
            let bare = closes.next()?;
            out.extend([")|", bare.filter, ")"]);
        } else {
            opens.next();
            out.push_str("((");
        }
    }
}

/// An expression that must stand inside a filter and does not.
struct Bare {
    span: Range<usize>,
    filter: &'static str,
}

/// A walk over the syntax tree that collects them.
struct Walk<'a> {
    source: &'a str,
    bare: Vec<Bare>,
    longest_captured: usize,
}

impl Walk<'_> {
    fn body(&mut self, body: &[Stmt<'_>], captured: bool) -> Result<(), String> {
        body.iter().try_for_each(|stmt| self.stmt(stmt, captured))
    }

    fn stmt(&mut self, stmt: &Stmt<'_>, captured: bool) -> Result<(), String> {
        match stmt {
            Stmt::Template(s) => self.body(&s.children, captured),
            Stmt::EmitExpr(s) => self.expr(&s.expr),
            Stmt::EmitRaw(s) => {
                if captured {
                    self.longest_captured = self.longest_captured.max(s.raw.len());
                }
                Ok(())
            }
            Stmt::ForLoop(s) => {
                self.expr(&s.iter)?;
                s.filter_expr.iter().try_for_each(|expr| self.expr(expr))?;
                self.body(&s.body, captured)?;
                self.body(&s.else_body, captured)
            }
            Stmt::IfCond(s) => {
                self.expr(&s.expr)?;
                self.body(&s.true_body, captured)?;
                self.body(&s.false_body, captured)
            }
            Stmt::WithBlock(s) => {
                s.assignments.iter().try_for_each(|(_, value)| self.expr(value))?;
                self.body(&s.body, captured)
            }
            Stmt::Set(s) => self.expr(&s.expr),
            Stmt::SetBlock(s) if s.filter.is_none() => self.body(&s.body, true),
            Stmt::Macro(s) => {
                s.defaults.iter().try_for_each(|value| self.expr(value))?;
                self.body(&s.body, true)
            }
            Stmt::Continue(_) | Stmt::Break(_) => Ok(()),
            Stmt::SetBlock(_)
            | Stmt::AutoEscape(_)
            | Stmt::FilterBlock(_)
            | Stmt::Block(_)
            | Stmt::Import(_)
            | Stmt::FromImport(_)
            | Stmt::Extends(_)
            | Stmt::Include(_)
            | Stmt::CallBlock(_)
            | Stmt::Do(_) => Err(
                "uses a statement that chat templates may not: only for, if, set, with, macro, \
                                  break and continue are supported"
                    .into(),
            ),
        }
    }

    fn expr(&mut self, expr: &Expr<'_>) -> Result<(), String> {
        self.expr_inside(expr, "")
    }

    /// `filter` is the one that the expression is the input of.
    fn expr_inside(&mut self, expr: &Expr<'_>, filter: &str) -> Result<(), String> {
        if grows(expr) && filter != METER {
            self.bare.push(Bare { span: self.span(expr), filter: METER });
        }
        match expr {
            Expr::Var(_) | Expr::Const(_) => Ok(()),
            Expr::Slice(e) => {
                self.expr(&e.expr)?;
                [&e.start, &e.stop, &e.step]
                    .into_iter()
                    .flatten()
                    .try_for_each(|part| self.expr(part))
            }
            Expr::UnaryOp(e) => self.expr(&e.expr),
            Expr::BinOp(e) => {
                for side in [&e.left, &e.right] {
                    let text = matches!(side, Expr::Const(_))
                        || matches!(side, Expr::Filter(f) if f.name == TEXT);
                    if matches!(e.op, BinOpKind::Concat) && !text {
                        self.bare.push(Bare { span: self.span(side), filter: TEXT });
                    }
                    self.expr(side)?;
                }
                Ok(())
            }
            Expr::Compare(e) => {
                self.expr(&e.expr)?;
                e.ops.iter().try_for_each(|op| self.expr(&op.expr))
            }
            Expr::IfExpr(e) => {
                self.expr(&e.test_expr)?;
                self.expr(&e.true_expr)?;
                e.false_expr.iter().try_for_each(|expr| self.expr(expr))
            }
            Expr::Filter(e) => {
                e.expr.iter().try_for_each(|input| self.expr_inside(input, e.name))?;
                self.args(&e.args)
            }
            Expr::Test(e) => {
                self.expr(&e.expr)?;
                self.args(&e.args)
            }
            Expr::GetAttr(e) => self.expr(&e.expr),
            Expr::GetItem(e) => {
                self.expr(&e.expr)?;
                self.expr(&e.subscript_expr)
            }
            Expr::Call(e) => {
                self.expr(&e.expr)?;
                self.args(&e.args)
            }
            Expr::List(e) => e.items.iter().try_for_each(|item| self.expr(item)),
            Expr::Tuple(e) => e.items.iter().try_for_each(|item| self.expr(item)),
            Expr::Map(e) => e.keys.iter().chain(&e.values).try_for_each(|item| self.expr(item)),
        }
    }

    /// Where an expression stands in the source. The tree has the ends, but for what follows another expression (a
    /// filter, a slice) it has the operator's beginning and not the expression's.
    fn span(&self, expr: &Expr<'_>) -> Range<usize> {
        let own = expr.span().start_offset as usize..expr.span().end_offset as usize;
        let inner = match expr {
            Expr::Slice(e) => &e.expr,
            Expr::GetAttr(e) => &e.expr,
            Expr::GetItem(e) => &e.expr,
            Expr::Call(e) => &e.expr,
            Expr::Test(e) => &e.expr,
            Expr::Filter(e) => match &e.expr {
                Some(input) => input,
                None => return own,
            },
            Expr::UnaryOp(e) => return own.start.min(self.span(&e.expr).start)..own.end,
            _ => return own,
        };
        let inner = self.span(inner);
        // Parentheses around what is inside are in no node's span: as many open before it as close after it.
        let after = self.source.get(inner.end..).unwrap_or_default();
        let closed = after
            .chars()
            .take_while(|c| c.is_whitespace() || *c == ')')
            .filter(|c| *c == ')')
            .count();
        let mut start = inner.start;
        for _ in 0..closed {
            let before = self.source.get(..start).unwrap_or_default();
            start = before.trim_end().strip_suffix('(').map_or(start, str::len);
        }
        start..own.end
    }

    fn args(&mut self, args: &[CallArg<'_>]) -> Result<(), String> {
        args.iter().try_for_each(|arg| match arg {
            CallArg::Pos(expr)
            | CallArg::Kwarg(_, expr)
            | CallArg::PosSplat(expr)
            | CallArg::KwargSplat(expr) => self.expr(expr),
        })
    }
}

/// Whether the expression makes a new value that can be long.
fn grows(expr: &Expr<'_>) -> bool {
    match expr {
        Expr::Slice(_) | Expr::Call(_) => true,
        Expr::Filter(filter) => filter.name != METER && filter.name != TEXT,
        Expr::BinOp(e) => matches!(e.op, BinOpKind::Mul | BinOpKind::Add | BinOpKind::Concat),
        _ => false,
    }
}
