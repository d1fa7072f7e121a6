//! The stack machine that a pickle is a program for.

use std::io::{self, Read};

use super::{Pickle, Span, StorageId, Value, size};
use crate::checkpoint::Part;
use crate::checkpoint::opcodes::*;
use crate::error::WeightsError;

/// More bytes than the pickle of any checkpoint has: a few hundred are usual for a tensor. Memory grows with them.
const LONGEST: u64 = 64 << 20;
/// Longer than any name of a function: names are repeated in what is listed, wherever they are used.
const LONGEST_NAME: usize = 255;

impl Pickle {
    /// Reads one pickle and leaves the input behind it.
    ///
    /// # Errors
    /// If the input cannot be read, ends, or is no pickle of protocol 2 to 5; `part` is what they call it.
    pub(in crate::checkpoint) fn read(input: impl Read, part: &Part) -> Result<Self, WeightsError> {
        let pickle = Self::default();
        let mut machine = Machine { input, part, stack: Vec::new(), marks: Vec::new(), memo: Vec::new(), pickle };
        while machine.step()? {}
        let root = machine.pop()?;
        Ok(Self { root, ..machine.pickle })
    }
}

/// The machine.
struct Machine<'a, R> {
    input: R,
    part: &'a Part<'a>,
    stack: Vec<Value>,
    /// Heights of the stack at its marks.
    marks: Vec<usize>,
    memo: Vec<Option<Value>>,
    /// What has been read; its length is the position.
    pickle: Pickle,
}

impl<R: Read> Machine<'_, R> {
    fn wrong(&self, expected: &str, found: impl Into<String>) -> WeightsError {
        self.part.malformed_at(self.pickle.len, expected, found)
    }

    /// For `map_err`: what could not be read.
    fn unread(&self, error: io::Error) -> WeightsError {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => self.wrong("more of the pickle", "its end"),
            _ => self.part.io(error),
        }
    }

    fn advance(&mut self, len: u64) -> Result<(), WeightsError> {
        if len > LONGEST - self.pickle.len {
            return Err(self.wrong(&format!("a pickle of at most {LONGEST} bytes"), format!("{len} more bytes")));
        }
        self.pickle.len += len;
        Ok(())
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], WeightsError> {
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes).map_err(|error| self.unread(error))?;
        self.advance(N as u64)?;
        Ok(bytes)
    }

    fn byte(&mut self) -> Result<u8, WeightsError> {
        Ok(self.bytes::<1>()?[0])
    }

    fn u32(&mut self) -> Result<u64, WeightsError> {
        Ok(u32::from_le_bytes(self.bytes()?).into())
    }

    fn u64(&mut self) -> Result<u64, WeightsError> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    /// Bytes of a length that is not trusted: memory grows with what is there.
    fn sized(&mut self, len: u64) -> Result<Vec<u8>, WeightsError> {
        self.advance(len)?;
        let mut bytes = Vec::new();
        self.input.by_ref().take(len).read_to_end(&mut bytes).map_err(|error| self.unread(error))?;
        if (bytes.len() as u64) < len {
            return Err(self.wrong(&format!("{len} bytes"), format!("the end after {} of them", bytes.len())));
        }
        Ok(bytes)
    }

    fn skip(&mut self, len: u64) -> Result<(), WeightsError> {
        self.advance(len)?;
        let skipped = io::copy(&mut self.input.by_ref().take(len), &mut io::sink());
        let skipped = skipped.map_err(|error| self.unread(error))?;
        if skipped < len {
            return Err(self.wrong(&format!("{len} bytes"), format!("the end after {skipped} of them")));
        }
        Ok(())
    }

    fn text(&mut self, len: u64) -> Result<(), WeightsError> {
        let bytes = self.sized(len)?;
        let text = std::str::from_utf8(&bytes).map_err(|error| self.wrong("UTF-8", error.to_string()))?;
        let span = self.pickle.add_text(text);
        self.push(Value::Text(span));
        Ok(())
    }

    /// A text of Python 2, which may be bytes.
    fn bytes_or_text(&mut self, len: u64) -> Result<(), WeightsError> {
        let bytes = self.sized(len)?;
        let value = match std::str::from_utf8(&bytes) {
            Ok(text) => Value::Text(self.pickle.add_text(text)),
            Err(_) => Value::Other,
        };
        self.push(value);
        Ok(())
    }

    /// Bytes that nothing asks for.
    fn opaque(&mut self, len: u64) -> Result<(), WeightsError> {
        self.skip(len)?;
        self.push(Value::Other);
        Ok(())
    }

    fn line(&mut self) -> Result<Span, WeightsError> {
        let mut bytes = Vec::new();
        loop {
            match self.byte()? {
                b'\n' => break,
                byte => bytes.push(byte),
            }
        }
        let text = std::str::from_utf8(&bytes).map_err(|error| self.wrong("a name in UTF-8", error.to_string()))?;
        Ok(self.pickle.add_text(text))
    }

    fn push(&mut self, value: Value) {
        self.stack.push(value);
    }

    /// The last value, which lies above the last mark.
    fn top(&self) -> Result<Value, WeightsError> {
        let floor = self.marks.last().copied().unwrap_or(0);
        self.stack[floor..].last().copied().ok_or_else(|| self.wrong("a value", "an empty stack"))
    }

    fn pop(&mut self) -> Result<Value, WeightsError> {
        let value = self.top()?;
        self.stack.pop();
        Ok(value)
    }

    /// What was pushed since the last mark.
    fn since_mark(&mut self) -> Result<Vec<Value>, WeightsError> {
        let mark = self.marks.pop().ok_or_else(|| self.wrong("a mark", "none"))?;
        Ok(self.stack.split_off(mark))
    }

    fn remember(&mut self, slot: u64) -> Result<(), WeightsError> {
        // Slots are counted, and each takes an instruction: one beyond the bytes read is nonsense.
        let slot = usize::try_from(slot).ok().filter(|slot| (*slot as u64) < self.pickle.len);
        let slot = slot.ok_or_else(|| self.wrong("a memo slot below the number of bytes", "one beyond"))?;
        if self.memo.len() <= slot {
            self.memo.resize(slot + 1, None);
        }
        self.memo[slot] = Some(self.top()?);
        Ok(())
    }

    fn recall(&mut self, slot: u64) -> Result<(), WeightsError> {
        let value = usize::try_from(slot).ok().and_then(|slot| self.memo.get(slot).copied().flatten());
        self.push(value.ok_or_else(|| self.wrong("a memo slot that was filled", format!("slot {slot}")))?);
        Ok(())
    }

    fn tuple(&mut self, len: usize) -> Result<(), WeightsError> {
        let mut items = (0..len).map(|_| self.pop()).collect::<Result<Vec<_>, _>>()?;
        items.reverse();
        let value = self.pickle.add_tuple(&items);
        self.push(value);
        Ok(())
    }

    /// Appends to the list on top; an object that is filled like a list stays opaque.
    fn append(&mut self, items: &[Value]) -> Result<(), WeightsError> {
        if let Value::List(index) = self.top()? {
            self.pickle.lists[index].extend_from_slice(items);
        }
        Ok(())
    }

    /// Fills the dictionary on top; an object that is filled like a dictionary stays opaque.
    fn set_items(&mut self, items: &[Value]) -> Result<(), WeightsError> {
        if let Value::Dict(index) = self.top()? {
            let (pairs, []) = items.as_chunks::<2>() else {
                return Err(self.wrong("keys and values", "a key without a value"));
            };
            self.pickle.dicts[index].extend(pairs.iter().map(|[key, value]| (*key, *value)));
        }
        Ok(())
    }

    fn function(&mut self, module: Span, name: Span) -> Result<(), WeightsError> {
        let len = module.len + name.len;
        if len > LONGEST_NAME {
            return Err(self.wrong("the name of a function or class", format!("a text of {len} bytes")));
        }
        self.pickle.functions.push((module, name));
        self.push(Value::Function(self.pickle.functions.len() - 1));
        Ok(())
    }

    /// `('storage', type, key, location, len)`: what stands in a pickle for numbers that are stored beside it.
    fn persistent(&mut self, id: Value) -> Result<Value, WeightsError> {
        let parts = match id {
            Value::Tuple(span) => self.pickle.tuple(span),
            _ => &[],
        };
        if parts.first().and_then(|kind| self.pickle.text(*kind)) != Some("storage") {
            // The source of a module, in old files.
            return Ok(Value::Other);
        }
        let &[_, Value::Function(class), key, _, len, ref rest @ ..] = parts else {
            return Err(self.wrong("type, key, place and length of a storage", format!("{} values", parts.len())));
        };
        if let [Value::Tuple(_), ..] = rest {
            return Err(self.wrong("a storage", "a view of one, as PyTorch wrote before 0.4"));
        }
        let key = match key {
            Value::Text(span) => span,
            Value::Int(key) => self.pickle.add_text(&key.to_string()),
            other => return Err(self.wrong("the key of a storage", self.pickle.describe(other))),
        };
        let len = size(len).ok_or_else(|| self.wrong("the length of a storage", self.pickle.describe(len)))?;
        self.pickle.storages.push(StorageId { key, class, len });
        Ok(Value::Storage(self.pickle.storages.len() - 1))
    }

    /// One instruction; whether another follows.
    fn step(&mut self) -> Result<bool, WeightsError> {
        let position = self.pickle.len;
        match self.byte()? {
            STOP => return Ok(false),
            PROTO => match self.byte()? {
                2..=5 => {}
                other => return Err(self.wrong("a pickle of protocol 2 to 5", format!("protocol {other}"))),
            },
            // How much may be read ahead.
            FRAME => drop(self.u64()?),

            MARK => self.marks.push(self.stack.len()),
            POP => drop(self.pop()?),
            POP_MARK => drop(self.since_mark()?),
            DUP => self.push(self.top()?),

            NONE => self.push(Value::Other),
            NEWTRUE => self.push(Value::Bool(true)),
            NEWFALSE => self.push(Value::Bool(false)),
            BININT1 => {
                let value = self.byte()?;
                self.push(Value::Int(value.into()));
            }
            BININT2 => {
                let value = u16::from_le_bytes(self.bytes()?);
                self.push(Value::Int(value.into()));
            }
            BININT => {
                let value = i32::from_le_bytes(self.bytes()?);
                self.push(Value::Int(value.into()));
            }
            LONG1 => {
                let len = self.byte()?.into();
                let bytes = self.sized(len)?;
                self.push(long(&bytes));
            }
            LONG4 => {
                let len = self.u32()?;
                let bytes = self.sized(len)?;
                self.push(long(&bytes));
            }
            BINFLOAT => self.opaque(8)?,

            SHORT_BINUNICODE => {
                let len = self.byte()?.into();
                self.text(len)?;
            }
            BINUNICODE => {
                let len = self.u32()?;
                self.text(len)?;
            }
            BINUNICODE8 => {
                let len = self.u64()?;
                self.text(len)?;
            }
            SHORT_BINSTRING => {
                let len = self.byte()?.into();
                self.bytes_or_text(len)?;
            }
            BINSTRING => {
                let len = self.u32()?;
                self.bytes_or_text(len)?;
            }
            SHORT_BINBYTES => {
                let len = self.byte()?.into();
                self.opaque(len)?;
            }
            BINBYTES => {
                let len = self.u32()?;
                self.opaque(len)?;
            }
            BINBYTES8 | BYTEARRAY8 => {
                let len = self.u64()?;
                self.opaque(len)?;
            }

            EMPTY_TUPLE => self.tuple(0)?,
            TUPLE1 => self.tuple(1)?,
            TUPLE2 => self.tuple(2)?,
            TUPLE3 => self.tuple(3)?,
            TUPLE => {
                let items = self.since_mark()?;
                let value = self.pickle.add_tuple(&items);
                self.push(value);
            }
            EMPTY_LIST => {
                let value = self.pickle.add_list(Vec::new());
                self.push(value);
            }
            LIST => {
                let items = self.since_mark()?;
                let value = self.pickle.add_list(items);
                self.push(value);
            }
            APPEND => {
                let item = self.pop()?;
                self.append(&[item])?;
            }
            APPENDS => {
                let items = self.since_mark()?;
                self.append(&items)?;
            }
            EMPTY_DICT => {
                let value = self.pickle.add_dict();
                self.push(value);
            }
            DICT => {
                let items = self.since_mark()?;
                let value = self.pickle.add_dict();
                self.push(value);
                self.set_items(&items)?;
            }
            SETITEM => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set_items(&[key, value])?;
            }
            SETITEMS => {
                let items = self.since_mark()?;
                self.set_items(&items)?;
            }
            EMPTY_SET => self.push(Value::Other),
            ADDITEMS => drop(self.since_mark()?),
            FROZENSET => {
                self.since_mark()?;
                self.push(Value::Other);
            }

            BINPUT => {
                let slot = self.byte()?.into();
                self.remember(slot)?;
            }
            LONG_BINPUT => {
                let slot = self.u32()?;
                self.remember(slot)?;
            }
            MEMOIZE => self.remember(self.memo.len() as u64)?,
            BINGET => {
                let slot = self.byte()?.into();
                self.recall(slot)?;
            }
            LONG_BINGET => {
                let slot = self.u32()?;
                self.recall(slot)?;
            }

            GLOBAL => {
                let (module, name) = (self.line()?, self.line()?);
                self.function(module, name)?;
            }
            STACK_GLOBAL => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Value::Text(module), Value::Text(name)) = (module, name) else {
                    return Err(self.wrong("the name of a function or class", self.pickle.describe(name)));
                };
                self.function(module, name)?;
            }
            BINPERSID => {
                let id = self.pop()?;
                let value = self.persistent(id)?;
                self.push(value);
            }
            REDUCE | NEWOBJ => {
                let (arguments, function) = (self.pop()?, self.pop()?);
                let value = self.pickle.call(function, arguments);
                self.push(value);
            }
            // Objects that take keywords, and those of Python 2's old classes.
            NEWOBJ_EX => {
                let (_, _, class) = (self.pop()?, self.pop()?, self.pop()?);
                let value = self.pickle.call(class, Value::Other);
                self.push(value);
            }
            OBJ => {
                let class = self.since_mark()?.first().copied().unwrap_or(Value::Other);
                let value = self.pickle.call(class, Value::Other);
                self.push(value);
            }
            // The state of an object: what it belongs to is opaque, or a dictionary with attributes.
            BUILD => drop(self.pop()?),
            other => {
                let found = format!("opcode {other:#04x}");
                return Err(self.part.malformed_at(position, "an instruction of pickle protocol 2 to 5", found));
            }
        }
        Ok(true)
    }
}

/// An integer of any length; opaque if it is none that a size could be.
fn long(bytes: &[u8]) -> Value {
    if bytes.len() > 8 {
        return Value::Other;
    }
    let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
    let mut all = if negative { [0xff; 8] } else { [0; 8] };
    all[..bytes.len()].copy_from_slice(bytes);
    Value::Int(i64::from_le_bytes(all))
}
