//! Python pickles as PyTorch writes them, read without running anything.
//!
//! A pickle is a program for a small stack machine that may call any function. Here it may not: of what it names,
//! only the functions that put a tensor or a dictionary together mean something; every other call leaves an opaque
//! value, whose arguments are forgotten. (Opcodes: Python's `pickletools`; persistent ids: `torch/serialization.py`;
//! the functions: `torch/_utils.py`.)
//!
//! Values refer to each other by index into one [`Pickle`]. However deep a pickle nests, and in whatever circles,
//! nothing here recurses: not the reading, and not the dropping.

mod machine;

/// As many dimensions as PyTorch's operations can handle.
const MOST_DIMENSIONS: usize = 64;

/// Where a text or a tuple lies.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    start: usize,
    len: usize,
}

/// What a pickle may hold.
#[derive(Clone, Copy, Debug, Default)]
pub(super) enum Value {
    Bool(bool),
    Int(i64),
    Text(Span),
    Tuple(Span),
    List(usize),
    Dict(usize),
    /// A function or a class.
    Function(usize),
    Storage(usize),
    Tensor(usize),
    /// What a function or class that means nothing here has made.
    Object(usize),
    /// A scalar or a collection that nothing asks for.
    #[default]
    Other,
}

/// Numbers stored beside the pickle, at which tensors look.
#[derive(Clone, Copy, Debug)]
pub(super) struct StorageId {
    key: Span,
    class: usize,
    /// How many numbers.
    pub(super) len: usize,
}

/// A tensor as a view of a storage.
#[derive(Clone, Copy, Debug)]
pub(super) struct View {
    pub(super) storage: usize,
    /// The dtype, where it is not the storage's.
    dtype: Option<usize>,
    offset: Value,
    shape: Value,
    strides: Value,
}

/// A pickle that has been read.
#[derive(Debug, Default)]
pub(super) struct Pickle {
    /// The object that was pickled.
    pub(super) root: Value,
    /// How many bytes it took.
    pub(super) len: u64,
    pub(super) storages: Vec<StorageId>,
    texts: String,
    /// The elements of all tuples.
    items: Vec<Value>,
    lists: Vec<Vec<Value>>,
    dicts: Vec<Vec<(Value, Value)>>,
    /// Module and name.
    functions: Vec<(Span, Span)>,
    views: Vec<View>,
}

impl Pickle {
    fn span(&self, span: Span) -> &str {
        &self.texts[span.start..][..span.len]
    }

    fn tuple(&self, span: Span) -> &[Value] {
        &self.items[span.start..][..span.len]
    }

    pub(super) fn text(&self, value: Value) -> Option<&str> {
        match value {
            Value::Text(span) => Some(self.span(span)),
            _ => None,
        }
    }

    pub(super) fn list(&self, value: Value) -> Option<&[Value]> {
        match value {
            Value::List(index) => Some(&self.lists[index]),
            _ => None,
        }
    }

    pub(super) fn dict(&self, value: Value) -> Option<&[(Value, Value)]> {
        match value {
            Value::Dict(index) => Some(&self.dicts[index]),
            _ => None,
        }
    }

    /// The value of a key in a dictionary.
    pub(super) fn get(&self, dict: Value, key: &str) -> Option<Value> {
        let entries = self.dict(dict)?;
        entries.iter().find(|(found, _)| self.text(*found) == Some(key)).map(|(_, value)| *value)
    }

    pub(super) fn view(&self, index: usize) -> View {
        self.views[index]
    }

    /// The key of a storage.
    pub(super) fn key(&self, storage: StorageId) -> &str {
        self.span(storage.key)
    }

    /// What PyTorch calls a storage's type.
    pub(super) fn class(&self, storage: StorageId) -> String {
        self.function(storage.class)
    }

    /// What PyTorch calls the type of a view's numbers.
    pub(super) fn dtype(&self, view: View) -> String {
        self.function(view.dtype.unwrap_or(self.storages[view.storage].class))
    }

    /// Offset, shape and strides of a view, counted in numbers; none if they are not sizes.
    pub(super) fn layout(&self, view: View) -> Option<(usize, Vec<usize>, Vec<usize>)> {
        Some((size(view.offset)?, self.sizes(view.shape)?, self.sizes(view.strides)?))
    }

    fn sizes(&self, value: Value) -> Option<Vec<usize>> {
        let items = match value {
            Value::Tuple(span) => self.tuple(span),
            other => self.list(other)?,
        };
        if items.len() > MOST_DIMENSIONS { None } else { items.iter().map(|item| size(*item)).collect() }
    }

    fn function(&self, index: usize) -> String {
        let (module, name) = self.functions[index];
        format!("{}.{}", self.span(module), self.span(name))
    }

    /// What a value is, for messages.
    pub(super) fn describe(&self, value: Value) -> String {
        match value {
            Value::Bool(_) => "a boolean".into(),
            Value::Int(_) => "an integer".into(),
            Value::Text(_) => "a text".into(),
            Value::Tuple(_) => "a tuple".into(),
            Value::List(_) => "a list".into(),
            Value::Dict(_) => "a dict".into(),
            Value::Function(index) => format!("the function or class {}", self.function(index)),
            Value::Storage(_) => "a storage".into(),
            Value::Tensor(_) => "a tensor".into(),
            Value::Object(index) => format!("an object of {}", self.function(index)),
            Value::Other => "a scalar or another object".into(),
        }
    }

    fn add_text(&mut self, text: &str) -> Span {
        self.texts.push_str(text);
        Span { start: self.texts.len() - text.len(), len: text.len() }
    }

    fn add_tuple(&mut self, items: &[Value]) -> Value {
        self.items.extend_from_slice(items);
        Value::Tuple(Span { start: self.items.len() - items.len(), len: items.len() })
    }

    fn add_list(&mut self, items: Vec<Value>) -> Value {
        self.lists.push(items);
        Value::List(self.lists.len() - 1)
    }

    fn add_dict(&mut self) -> Value {
        self.dicts.push(Vec::new());
        Value::Dict(self.dicts.len() - 1)
    }

    fn add_view(&mut self, view: View) -> Value {
        self.views.push(view);
        Value::Tensor(self.views.len() - 1)
    }

    /// What a call gives, if it is one of the few that are understood.
    fn call(&mut self, function: Value, arguments: Value) -> Value {
        let Value::Function(index) = function else { return Value::Other };
        let Value::Tuple(arguments) = arguments else { return Value::Object(index) };
        let (module, name) = self.functions[index];
        match (self.span(module), self.span(name), self.tuple(arguments)) {
            ("collections", "OrderedDict", []) => self.add_dict(),
            ("torch", "Size", [sizes @ (Value::Tuple(_) | Value::List(_))]) => *sizes,
            (
                "torch._utils",
                "_rebuild_tensor" | "_rebuild_tensor_v2",
                &[Value::Storage(storage), offset, shape, strides, ..],
            ) => self.add_view(View { storage, dtype: None, offset, shape, strides }),
            (
                "torch._utils",
                "_rebuild_tensor_v3",
                &[Value::Storage(storage), offset, shape, strides, _, _, Value::Function(dtype), ..],
            ) => self.add_view(View { storage, dtype: Some(dtype), offset, shape, strides }),
            (
                "torch._utils",
                "_rebuild_parameter" | "_rebuild_parameter_with_state",
                [tensor @ Value::Tensor(_), ..],
            ) => *tensor,
            _ => Value::Object(index),
        }
    }
}

pub(super) fn size(value: Value) -> Option<usize> {
    match value {
        Value::Int(value) => usize::try_from(value).ok(),
        _ => None,
    }
}
