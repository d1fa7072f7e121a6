//! Python's pickles of plain values: lists, tuples, dictionaries, strings, numbers (protocols 0 to 4, as Python 2 and 3 write
//! them). Nothing of a pickle is run, and a damaged or hostile one costs no more than its length: values lie in a list and refer
//! to each other by place, so that neither nesting nor sharing makes anything large.
//!
//! What the opcodes mean: Python's `pickletools`.

use std::collections::HashMap;

use serde_json::{Map, Value};

/// How deep values may be nested; RefCOCO's are five deep.
const DEEPEST: usize = 16;

/// A value; others are named by their place.
enum Node {
    Plain(Value),
    List(Vec<usize>),
    Dict(Vec<usize>),
    /// Python's `defaultdict`, of which dictionaries are made.
    DefaultDict,
}

struct Machine<'a> {
    rest: &'a [u8],
    nodes: Vec<Node>,
    stack: Vec<usize>,
    /// Heights of the stack at the marks.
    marks: Vec<usize>,
    memo: HashMap<u64, usize>,
}

/// Reads the list that a pickle holds, as JSON; strings of bytes that are no UTF-8 get replacement characters.
///
/// # Errors
/// What was expected and found, and at which byte.
pub(super) fn read_list(bytes: &[u8]) -> Result<Vec<Value>, String> {
    let (machine, root) = Machine::run(bytes)?;
    let Node::List(items) = &machine.nodes[root] else { return Err("something else than a list".to_owned()) };
    // Shared values are written out each time; whole files of references share little.
    let mut budget = 8 * bytes.len();
    items.iter().map(|&item| machine.value(item, DEEPEST, &mut budget)).collect()
}

/// A run of words and how often it occurs.
pub(super) type Count = (Vec<String>, f64);

/// Reads the number and the table of counts that a pickled dictionary has under two names: the keys of the table are
/// tuples of strings.
///
/// # Errors
/// What was expected and found, and at which byte or under which name.
pub(super) fn read_counts(bytes: &[u8], number: &str, table: &str) -> Result<(f64, Vec<Count>), String> {
    let (machine, root) = Machine::run(bytes)?;
    let Node::Dict(pairs) = &machine.nodes[root] else { return Err("something else than a dictionary".to_owned()) };
    let text = |node: usize| match &machine.nodes[node] {
        Node::Plain(Value::String(text)) => Some(text.as_str()),
        _ => None,
    };
    let float = |node: usize| match &machine.nodes[node] {
        Node::Plain(value) => value.as_f64(),
        _ => None,
    };
    let entry = |name: &str| {
        let pair = pairs.chunks_exact(2).find(|pair| text(pair[0]) == Some(name));
        pair.map(|pair| pair[1]).ok_or_else(|| format!("no {name}"))
    };
    let whole = float(entry(number)?).ok_or_else(|| format!("a {number} that is no number"))?;
    let Node::Dict(counts) = &machine.nodes[entry(table)?] else {
        return Err(format!("a {table} that is no dictionary"));
    };
    // Tuples may share their words, but not so much that the table grows far beyond the file.
    let mut budget = 8 * bytes.len();
    let count = |pair: &[usize]| {
        let words = match &machine.nodes[pair[0]] {
            Node::List(words) => words.iter().map(|&word| text(word).map(str::to_owned)).collect::<Option<Vec<_>>>(),
            _ => None,
        };
        let words = words.ok_or_else(|| format!("a key of {table} that is no tuple of strings"))?;
        let cost = words.iter().map(|word| 1 + word.len()).sum();
        budget = budget.checked_sub(cost).ok_or("words that are shared so much that they are too large written out")?;
        let count = float(pair[1]).ok_or_else(|| format!("a count of {table} that is no number, of {words:?}"))?;
        Ok((words, count))
    };
    Ok((whole, counts.chunks_exact(2).map(count).collect::<Result<_, String>>()?))
}

impl<'a> Machine<'a> {
    /// Does all operations of a pickle; with the place of its value.
    fn run(bytes: &'a [u8]) -> Result<(Self, usize), String> {
        let mut machine =
            Machine { rest: bytes, nodes: Vec::new(), stack: Vec::new(), marks: Vec::new(), memo: HashMap::new() };
        loop {
            let start = bytes.len() - machine.rest.len();
            let last = machine.step().map_err(|found| format!("{found} at byte {start}"))?;
            if let Some(root) = last {
                return Ok((machine, root));
            }
        }
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], String> {
        let (taken, rest) = self.rest.split_at_checked(length).ok_or("the end of the file")?;
        self.rest = rest;
        Ok(taken)
    }

    fn number<const N: usize>(&mut self) -> Result<u64, String> {
        let bytes = self.take(N)?;
        Ok(bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
    }

    fn counted<const N: usize>(&mut self) -> Result<&'a [u8], String> {
        let length = self.number::<N>()?;
        self.take(usize::try_from(length).map_err(|_| "the end of the file")?)
    }

    fn line(&mut self) -> Result<&'a [u8], String> {
        let end = self.rest.iter().position(|&byte| byte == b'\n').ok_or("the end of the file")?;
        let line = self.take(end)?;
        self.take(1)?;
        Ok(line)
    }

    fn parsed<T: std::str::FromStr>(&mut self) -> Result<T, String> {
        let line = self.line()?;
        let text = std::str::from_utf8(line).ok().map(|text| text.trim().trim_end_matches('L'));
        text.and_then(|text| text.parse().ok()).ok_or_else(|| format!("{:?}", String::from_utf8_lossy(line)))
    }

    fn push(&mut self, node: Node) {
        self.stack.push(self.nodes.len());
        self.nodes.push(node);
    }

    fn plain(&mut self, value: impl Into<Value>) {
        self.push(Node::Plain(value.into()));
    }

    fn text(&mut self, bytes: &[u8]) {
        self.plain(String::from_utf8_lossy(bytes).into_owned());
    }

    fn pop(&mut self) -> Result<usize, String> {
        let floor = self.marks.last().copied().unwrap_or_default();
        if self.stack.len() <= floor {
            return Err("an operation without its value".to_owned());
        }
        self.stack.pop().ok_or_else(|| "an operation without its value".to_owned())
    }

    fn top(&self) -> Result<usize, String> {
        self.stack.last().copied().ok_or_else(|| "an operation without its value".to_owned())
    }

    fn since_mark(&mut self) -> Result<Vec<usize>, String> {
        let mark = self.marks.pop().ok_or("an operation without its mark")?;
        Ok(self.stack.split_off(mark.min(self.stack.len())))
    }

    fn last(&mut self, count: usize) -> Result<Vec<usize>, String> {
        let mut values = (0..count).map(|_| self.pop()).collect::<Result<Vec<_>, _>>()?;
        values.reverse();
        Ok(values)
    }

    fn append(&mut self, values: Vec<usize>) -> Result<(), String> {
        let top = self.top()?;
        match &mut self.nodes[top] {
            Node::List(list) => list.extend(values),
            _ => return Err("something to append to that is no list".to_owned()),
        }
        Ok(())
    }

    fn set(&mut self, values: Vec<usize>) -> Result<(), String> {
        let top = self.top()?;
        match &mut self.nodes[top] {
            Node::Dict(pairs) if values.len().is_multiple_of(2) => pairs.extend(values),
            _ => return Err("items of something that is no dictionary".to_owned()),
        }
        Ok(())
    }

    /// A name that is looked up: only those of dictionaries with a default, which is of no account here.
    fn class(&mut self, module: &[u8], name: &[u8]) -> Result<(), String> {
        match (module, name) {
            (b"collections", b"defaultdict") => self.push(Node::DefaultDict),
            (b"__builtin__" | b"builtins", b"float" | b"int") => self.plain(Value::Null),
            _ => {
                let [module, name] = [module, name].map(String::from_utf8_lossy);
                return Err(format!("{module}.{name}, which is no plain value,"));
            }
        }
        Ok(())
    }

    fn remember(&mut self, name: u64) -> Result<(), String> {
        let top = self.top()?;
        self.memo.insert(name, top);
        Ok(())
    }

    fn recall(&mut self, name: u64) -> Result<(), String> {
        let node = *self.memo.get(&name).ok_or_else(|| format!("value {name}, which is not remembered"))?;
        self.stack.push(node);
        Ok(())
    }

    /// Does the next operation; the value, if it is the last.
    fn step(&mut self) -> Result<Option<usize>, String> {
        match self.take(1)?[0] {
            b'.' => return self.pop().map(Some),
            0x80 => drop(self.take(1)?),
            0x95 => drop(self.take(8)?),
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.since_mark()?),
            b'2' => self.stack.push(self.top()?),
            b'N' => self.plain(Value::Null),
            0x88 => self.plain(true),
            0x89 => self.plain(false),
            b'I' | b'L' => {
                let number: i64 = self.parsed()?;
                self.plain(number);
            }
            b'J' => {
                let number = self.number::<4>()? as u32;
                self.plain(number.cast_signed());
            }
            b'K' => {
                let number = self.number::<1>()?;
                self.plain(number);
            }
            b'M' => {
                let number = self.number::<2>()?;
                self.plain(number);
            }
            0x8a => {
                // Two's complement, the lowest byte first.
                let bytes = self.counted::<1>()?;
                if bytes.len() > 8 {
                    return Err(format!("a number of {} bytes", bytes.len()));
                }
                let fill = if bytes.last().is_some_and(|&byte| byte >= 0x80) { 0xff } else { 0 };
                let mut whole = [fill; 8];
                whole[..bytes.len()].copy_from_slice(bytes);
                self.plain(i64::from_le_bytes(whole));
            }
            b'F' => {
                let number: f64 = self.parsed()?;
                self.plain(number);
            }
            b'G' => {
                let bits = self.number::<8>()?.swap_bytes();
                self.plain(f64::from_bits(bits));
            }
            b'S' => {
                let line = self.line()?;
                let text = unquoted(line).ok_or_else(|| format!("{:?}", String::from_utf8_lossy(line)))?;
                self.text(&text);
            }
            b'V' => {
                let line = self.line()?;
                let text = unescaped(line).ok_or_else(|| format!("{:?}", String::from_utf8_lossy(line)))?;
                self.plain(text);
            }
            b'U' | b'C' | 0x8c => {
                let bytes = self.counted::<1>()?;
                self.text(bytes);
            }
            b'T' | b'B' | b'X' => {
                let bytes = self.counted::<4>()?;
                self.text(bytes);
            }
            0x8d | 0x8e => {
                let bytes = self.counted::<8>()?;
                self.text(bytes);
            }
            b']' | b')' => self.push(Node::List(Vec::new())),
            b'l' | b't' => {
                let values = self.since_mark()?;
                self.push(Node::List(values));
            }
            tuple @ 0x85..=0x87 => {
                let values = self.last(usize::from(tuple - 0x84))?;
                self.push(Node::List(values));
            }
            b'}' => self.push(Node::Dict(Vec::new())),
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.class(module, name)?;
            }
            0x93 => {
                let names = self.last(2)?;
                let name = |node: usize| match &self.nodes[node] {
                    Node::Plain(Value::String(name)) => name.clone().into_bytes(),
                    _ => Vec::new(),
                };
                let (module, name) = (name(names[0]), name(names[1]));
                self.class(&module, &name)?;
            }
            b'R' => {
                let call = self.last(2)?;
                if !matches!(self.nodes[call[0]], Node::DefaultDict) {
                    return Err("a call of something that is no defaultdict".to_owned());
                }
                self.push(Node::Dict(Vec::new()));
            }
            b'd' => {
                let values = self.since_mark()?;
                self.push(Node::Dict(Vec::new()));
                self.set(values)?;
            }
            b'a' => {
                let value = self.last(1)?;
                self.append(value)?;
            }
            b'e' => {
                let values = self.since_mark()?;
                self.append(values)?;
            }
            b's' => {
                let pair = self.last(2)?;
                self.set(pair)?;
            }
            b'u' => {
                let values = self.since_mark()?;
                self.set(values)?;
            }
            b'p' => {
                let name = self.parsed()?;
                self.remember(name)?;
            }
            b'q' => {
                let name = self.number::<1>()?;
                self.remember(name)?;
            }
            b'r' => {
                let name = self.number::<4>()?;
                self.remember(name)?;
            }
            0x94 => self.remember(self.memo.len() as u64)?,
            b'g' => {
                let name = self.parsed()?;
                self.recall(name)?;
            }
            b'h' => {
                let name = self.number::<1>()?;
                self.recall(name)?;
            }
            b'j' => {
                let name = self.number::<4>()?;
                self.recall(name)?;
            }
            other => return Err(format!("operation {:?}, which makes no plain value", char::from(other))),
        }
        Ok(None)
    }

    /// A value with all that it refers to; `budget` bounds how many there are.
    fn value(&self, node: usize, depth: usize, budget: &mut usize) -> Result<Value, String> {
        if depth == 0 {
            return Err(format!("values nested more than {DEEPEST} deep"));
        }
        let name = |value| match value {
            Value::String(name) => name,
            other => other.to_string(),
        };
        let plain = match &self.nodes[node] {
            Node::Plain(value) => value.clone(),
            Node::DefaultDict => return Err("a class, which is no plain value".to_owned()),
            Node::List(items) => {
                let items = items.iter().map(|&item| self.value(item, depth - 1, budget));
                items.collect::<Result<Vec<_>, _>>()?.into()
            }
            Node::Dict(pairs) => {
                let pair = |pair: &[usize]| {
                    let key = name(self.value(pair[0], depth - 1, budget)?);
                    Ok((key, self.value(pair[1], depth - 1, budget)?))
                };
                pairs.chunks_exact(2).map(pair).collect::<Result<Map<_, _>, String>>()?.into()
            }
        };
        let cost = 1 + plain.as_str().map_or(0, str::len);
        *budget = budget.checked_sub(cost).ok_or("values that share so much that they are too large written out")?;
        Ok(plain)
    }
}

/// A string of bytes as Python 2 shows it: in quotes, with `\n`, `\'`, `\xe9`, ….
fn unquoted(line: &[u8]) -> Option<Vec<u8>> {
    let line = line.trim_ascii();
    let (&quote, rest) = line.split_first()?;
    let inside = rest.strip_suffix(&[quote]).filter(|_| quote == b'\'' || quote == b'"')?;
    let (mut bytes, mut rest) = (Vec::with_capacity(inside.len()), inside.iter());
    while let Some(&byte) = rest.next() {
        if byte != b'\\' {
            bytes.push(byte);
            continue;
        }
        bytes.push(match *rest.next()? {
            b'n' => b'\n',
            b'r' => b'\r',
            b't' => b'\t',
            b'x' => {
                let digit = |byte: &u8| char::from(*byte).to_digit(16);
                (digit(rest.next()?)? << 4 | digit(rest.next()?)?) as u8
            }
            other => other,
        });
    }
    Some(bytes)
}

/// Text as Python's `raw-unicode-escape` writes it: Latin-1 with `\u00e9` and `\U0001f600`.
fn unescaped(line: &[u8]) -> Option<String> {
    let (mut text, mut rest) = (String::new(), line);
    while let Some((&byte, after)) = rest.split_first() {
        let digits = match (byte, after.first()) {
            (b'\\', Some(b'u')) => 4,
            (b'\\', Some(b'U')) => 8,
            _ => {
                text.push(char::from(byte));
                rest = after;
                continue;
            }
        };
        let (code, after) = after[1..].split_at_checked(digits)?;
        let code = u32::from_str_radix(std::str::from_utf8(code).ok()?, 16).ok()?;
        text.push(char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER));
        rest = after;
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    /// What `pickle.dumps([{"a": (1, -2, 300, -70000, 2**40, 1.5, True, None)}, "é\n'", [[]]], p)` writes.
    #[test]
    fn plain_values_of_python_3_are_read() {
        let expected =
            [json!({"a": [1, -2, 300, -70000, 1_099_511_627_776u64, 1.5, true, null]}), json!("é\n'"), json!([[]])];
        let zero = b"(lp0\n(dp1\nVa\np2\n(I1\nI-2\nI300\nI-70000\nL1099511627776L\nF1.5\nI01\nNtp3\nsaV\xe9\\u000a'\np4\na(lp5\n(lp6\naa.";
        let two = b"\x80\x02]q\x00(}q\x01X\x01\x00\x00\x00aq\x02(K\x01J\xfe\xff\xff\xffM,\x01J\x90\xee\xfe\xff\x8a\x06\x00\x00\x00\x00\x00\x01G?\xf8\x00\x00\x00\x00\x00\x00\x88Ntq\x03sX\x04\x00\x00\x00\xc3\xa9\n'q\x04]q\x05]q\x06ae.";
        let four = b"\x80\x04\x95=\x00\x00\x00\x00\x00\x00\x00]\x94(}\x94\x8c\x01a\x94(K\x01J\xfe\xff\xff\xffM,\x01J\x90\xee\xfe\xff\x8a\x06\x00\x00\x00\x00\x00\x01G?\xf8\x00\x00\x00\x00\x00\x00\x88Nt\x94s\x8c\x04\xc3\xa9\n'\x94]\x94]\x94ae.";
        let found = read_list(two).unwrap();
        assert_eq!(found, expected);
        assert_eq!(read_list(four).unwrap(), expected);
        // Protocol 0 has no booleans of its own: 01 is true there.
        let mut zero = read_list(zero).unwrap();
        assert_eq!(zero[0]["a"][6], json!(1));
        zero[0]["a"][6] = json!(true);
        assert_eq!(zero, expected);
    }

    #[test]
    fn hostile_pickles_cost_no_more_than_their_length() {
        let nested = [b"N".as_slice(), &[0x85; 1_000_000], b"."].concat();
        assert!(read_list(&nested).unwrap_err().contains("nested more than 16 deep"));
        // Each list has the one before ten times: 10^12 values, if it were written out.
        let mut laughs = b"(lp0\n".to_vec();
        for i in 0..12 {
            laughs.extend(b"0(");
            laughs.extend(format!("g{i}\n").repeat(10).into_bytes());
            laughs.extend(format!("lp{}\n", i + 1).into_bytes());
        }
        laughs.push(b'.');
        assert!(read_list(&laughs).unwrap_err().contains("share so much"));
        // A list that has itself.
        assert!(read_list(b"]q\x00h\x00a.").unwrap_err().contains("nested more than"));
        assert!(read_list(b"X\xff\xff\xff\xff").unwrap_err().contains("the end of the file at byte 0"));
        assert!(read_list(b"cos\nsystem\n(S'true'\ntR.").unwrap_err().contains("os.system"));
        assert!(read_list(b"K\x01.").unwrap_err().contains("something else than a list"));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(
            prop_oneof![
                prop::sample::select(b"(.012NIJKMFGSVUTXBC])lt}daesupqrgjhcR\n'\\x\x80\x85\x86\x87\x88\x8a\x8c\x93\x94\x95".to_vec()),
                any::<u8>(),
            ],
            0..60,
        )) {
            let _ = read_list(&bytes);
            let _ = read_counts(&bytes, "a", "b");
        }
    }
}
