//! The way of a computed result into candle's graph.
//!
//! A custom operation of candle is handed storages, at most three, and computes one. The operations here are written over
//! tensors: they compute their result first, with whatever the backward pass should remember of it, and [`differentiable`]
//! attaches it to its inputs; or, while a piece of a forward pass is [`recording`], writes down how it came about.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::thread::LocalKey;

use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Storage, Tensor, TensorId, bail,
};

use crate::embedding::Rows;
use crate::host::memory;

/// A result that is not yet a tensor.
pub(crate) struct Fresh {
    storage: Storage,
    shape: Shape,
}

impl Fresh {
    pub(crate) fn new(storage: Storage, shape: impl Into<Shape>) -> Self {
        Self { storage, shape: shape.into() }
    }

    /// The scalar 0, of the type and on the device of a tensor.
    pub(crate) fn zero(like: &Tensor) -> Result<Self> {
        let zero = Tensor::zeros((), like.dtype(), like.device())?;
        let (storage, layout) = zero.storage_and_layout();
        Ok(Self::new(storage.try_clone(layout)?, ()))
    }

    /// The result as a tensor without a history.
    pub(crate) fn detached(self) -> Tensor {
        Tensor::from_storage(self.storage, self.shape, BackpropOp::none(), false)
    }
}

/// Gives `result` a history: `backward(inputs, gradient)` returns the gradient of each input, `None` where there is none to
/// be had. The gradient it is handed is contiguous; what it returns is that one, or memory that nobody else has.
pub(crate) fn differentiable<const N: usize>(
    name: &'static str,
    inputs: [&Tensor; N],
    result: Fresh,
    backward: impl Fn([&Tensor; N], &Tensor) -> Result<[Option<Tensor>; N]> + Send + Sync + 'static,
) -> Result<Tensor> {
    if is_recording(&inputs) {
        let kept = inputs.map(Kept::of);
        let backward = move |gradient: &Tensor| {
            let inputs = kept.iter().map(Kept::tensor).collect::<Result<Vec<_>>>()?;
            Ok(backward(std::array::from_fn(|i| &inputs[i]), gradient)?.into())
        };
        return record(inputs, result, |_| backward);
    }
    attached(name, inputs, result, move |inputs, _, gradient| backward(inputs, gradient))
}

/// [`differentiable`] for what looks at its result again: `backward(inputs, result, gradient)`.
pub(crate) fn differentiable_by_result<const N: usize>(
    name: &'static str,
    inputs: [&Tensor; N],
    result: Fresh,
    backward: impl Fn([&Tensor; N], &Tensor, &Tensor) -> Result<[Option<Tensor>; N]> + Send + Sync + 'static,
) -> Result<Tensor> {
    if is_recording(&inputs) {
        let kept = inputs.map(Clone::clone);
        return record(inputs, result, |result| {
            let result = result.detach();
            move |gradient: &Tensor| Ok(backward(kept.each_ref(), &result, gradient)?.into())
        });
    }
    attached(name, inputs, result, backward)
}

/// [`differentiable`] for what looks at nothing again: `backward(gradient)`. On a [`Tape`](crate::Tape) its inputs are not
/// kept.
pub(crate) fn differentiable_by_gradient<const N: usize>(
    name: &'static str,
    inputs: [&Tensor; N],
    result: Fresh,
    backward: impl Fn(&Tensor) -> Result<[Option<Tensor>; N]> + Send + Sync + 'static,
) -> Result<Tensor> {
    if is_recording(&inputs) {
        return record(inputs, result, |_| move |gradient: &Tensor| Ok(backward(gradient)?.into()));
    }
    attached(name, inputs, result, move |_, _, gradient| backward(gradient))
}

/// [`differentiable_by_gradient`] for any number of inputs, of operations that [are on record](is_recording).
pub(crate) fn differentiable_on_record(
    inputs: &[&Tensor],
    result: Fresh,
    backward: impl Fn(&Tensor) -> Result<Vec<Option<Tensor>>> + 'static,
) -> Result<Tensor> {
    record(inputs.iter().copied(), result, |_| backward)
}

/// An operation of candle.
fn attached<const N: usize>(
    name: &'static str,
    inputs: [&Tensor; N],
    result: Fresh,
    backward: impl Fn([&Tensor; N], &Tensor, &Tensor) -> Result<[Option<Tensor>; N]> + Send + Sync + 'static,
) -> Result<Tensor> {
    let node = Node::new(name, result, move |inputs, result, gradient| {
        let inputs = <[&Tensor; N]>::try_from(inputs).expect("as many as the operation was given");
        Ok(backward(inputs, result, gradient)?.into())
    });
    match inputs[..] {
        [a] => a.apply_op1_arc(Arc::new(Box::new(node))),
        [a, b] => a.apply_op2_arc(b, Arc::new(Box::new(node))),
        [a, b, c] => a.apply_op3_arc(b, c, Arc::new(Box::new(node))),
        _ => bail!("{name}: an operation of candle has one to three inputs, not {N}"),
    }
}

/// The variables that a graph of candle's begins with.
pub(crate) fn leaves(result: &Tensor) -> Vec<Tensor> {
    result.sorted_nodes().into_iter().filter(|node| node.is_variable()).cloned().collect()
}

/// What was computed, in its order, for a backward pass that hands gradients from one operation to the next. candle's sums of
/// them begin with zeros and are made anew with each addend; here there is a sum only where there are several.
///
/// The result of an operation is a variable to candle, at which the graphs of what comes after end. Of candle's own operations
/// it holds what an operation of ours was handed, with the graph that led to it.
#[derive(Default)]
pub(crate) struct Record {
    pub(crate) pieces: Vec<Piece>,
    /// The results of `pieces`.
    made: HashSet<TensorId>,
    /// The variables from elsewhere.
    pub(crate) leaves: Vec<Tensor>,
    /// What makes results again that are not to be kept.
    recipes: HashMap<TensorId, Rc<Recipe>>,
}

pub(crate) enum Piece {
    /// An operation of ours.
    Operation(Operation),
    /// What operations of candle led to.
    Graph(Tensor),
}

pub(crate) struct Operation {
    pub(crate) result: TensorId,
    /// `None` for those without a history.
    pub(crate) inputs: Vec<Option<TensorId>>,
    pub(crate) backward: Box<HandBack>,
}

/// From the gradient of a result to those of the inputs.
type HandBack = dyn Fn(&Tensor) -> Result<Vec<Option<Tensor>>>;

impl Record {
    /// Sees to it that `tensor` can be handed a gradient.
    pub(crate) fn reach(&mut self, tensor: &Tensor) {
        if self.made.contains(&tensor.id()) {
            return;
        }
        if tensor.is_variable() {
            return self.begin_at(tensor.clone());
        }
        let leaves = leaves(tensor);
        leaves.into_iter().for_each(|leaf| self.begin_at(leaf));
        self.made.insert(tensor.id());
        self.pieces.push(Piece::Graph(tensor.clone()));
    }

    fn begin_at(&mut self, leaf: Tensor) {
        if !self.made.contains(&leaf.id()) && self.leaves.iter().all(|known| known.id() != leaf.id()) {
            self.leaves.push(leaf);
        }
    }

    /// Whether a tensor is the result of one of the pieces.
    pub(crate) fn has_made(&self, tensor: &Tensor) -> bool {
        self.made.contains(&tensor.id())
    }
}

/// An input as it is kept for the backward pass.
pub(crate) enum Kept {
    Tensor(Tensor),
    /// What makes it once more.
    Recipe(Rc<Recipe>),
}

type Recipe = dyn Fn() -> Result<Fresh>;

impl Kept {
    pub(crate) fn of(tensor: &Tensor) -> Self {
        let recipe = RECORD.with_borrow(|record| record.as_ref()?.recipes.get(&tensor.id()).cloned());
        recipe.map_or_else(|| Self::Tensor(tensor.clone()), Self::Recipe)
    }

    pub(crate) fn tensor(&self) -> Result<Tensor> {
        match self {
            Self::Tensor(tensor) => Ok(tensor.clone()),
            Self::Recipe(recipe) => {
                let Fresh { storage, shape } = recipe()?;
                // As that on record, it has a history.
                Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), true))
            }
        }
    }
}

/// Says how a result on record is made once more, from what is kept anyway and in little time: operations that take it
/// keep that instead.
pub(crate) fn make_again(result: &Tensor, recipe: impl Fn() -> Result<Fresh> + 'static) {
    RECORD.with_borrow_mut(|record| {
        if let Some(record) = record.as_mut().filter(|record| record.has_made(result)) {
            record.recipes.insert(result.id(), Rc::new(recipe));
        }
    });
}

/// Runs a piece of a forward pass, and returns with its result what led to it.
pub(crate) fn recording(run: impl FnOnce() -> Result<Tensor>) -> Result<(Tensor, Record)> {
    let (result, mut record) = with_own(&RECORD, run);
    let result = result?;
    if result.track_op() {
        record.reach(&result);
    }
    Ok((result, record))
}

/// Whether an operation on these inputs is put on record.
pub(crate) fn is_recording(inputs: &[&Tensor]) -> bool {
    inputs.iter().any(|input| input.track_op()) && RECORD.with_borrow(Option::is_some)
}

/// Puts an operation on record. `backward` is made of its result.
fn record<B: Fn(&Tensor) -> Result<Vec<Option<Tensor>>> + 'static>(
    inputs: impl IntoIterator<Item = impl std::borrow::Borrow<Tensor>>,
    Fresh { storage, shape }: Fresh,
    backward: impl FnOnce(&Tensor) -> B,
) -> Result<Tensor> {
    let result = Tensor::from_storage(storage, shape, BackpropOp::none(), true);
    let backward = Box::new(backward(&result));
    RECORD.with_borrow_mut(|record| {
        let Some(record) = record else { return };
        let inputs = inputs.into_iter().map(|input| {
            let input = input.borrow();
            input.track_op().then(|| {
                record.reach(input);
                input.id()
            })
        });
        let inputs = inputs.collect();
        record.made.insert(result.id());
        record.pieces.push(Piece::Operation(Operation { result: result.id(), inputs, backward }));
    });
    Ok(result)
}

thread_local! {
    static COLLECTED: RefCell<Option<Vec<(Tensor, Addend)>>> = const { RefCell::new(None) };
    static RECORD: RefCell<Option<Record>> = const { RefCell::new(None) };
}

/// What an operation has for the gradient of a variable.
pub(crate) enum Addend {
    Whole(Tensor),
    /// As [`Self::Whole`], in memory that nobody else has.
    Own(Tensor),
    /// Of a table: what is not 0.
    Rows(Rows),
}

/// Of the gradients that an operation made of that of its result, for each whether nobody else has its memory.
pub(crate) fn are_own(found: &[Option<Tensor>], given: &Tensor) -> Vec<bool> {
    let place = |tensor: &Tensor| (memory(tensor), tensor.layout().start_offset());
    let places: Vec<_> = found.iter().map(|gradient| gradient.as_ref().map(place)).collect();
    let occurs_once = |place| places.iter().filter(|other| **other == Some(place)).count() == 1;
    places.iter().map(|place| place.is_some_and(|place| place.0 != memory(given) && occurs_once(place))).collect()
}

/// Hands over the gradient of a table, if it is one that [`collecting`] is to return; else gives it back.
pub(crate) fn collect_rows(table: &Tensor, rows: Rows) -> Option<Rows> {
    COLLECTED.with_borrow_mut(|collected| match collected {
        Some(collected) if table.is_variable() => {
            collected.push((table.clone(), Addend::Rows(rows)));
            None
        }
        _ => Some(rows),
    })
}

/// Runs a backward pass of candle's. What operations of [`differentiable`] have for variables is not handed to candle, which would
/// fill as many zeros and add it to them, but returned: each variable with a gradient, in the order in which they came, of
/// which a variable may have several, beside those that candle has for it.
pub(crate) fn collecting<R>(run: impl FnOnce() -> Result<R>) -> Result<(R, Vec<(Tensor, Addend)>)> {
    let (result, collected) = with_own(&COLLECTED, run);
    Ok((result?, collected))
}

/// Runs `run` with a value of its own in a place of this thread, and returns what became of that. In the place is then what
/// was there before, after a panic too.
fn with_own<T: Default + 'static, R>(place: &'static LocalKey<RefCell<Option<T>>>, run: impl FnOnce() -> R) -> (R, T) {
    struct Outer<T: 'static>(&'static LocalKey<RefCell<Option<T>>>, Option<T>);
    impl<T: 'static> Drop for Outer<T> {
        fn drop(&mut self) {
            self.0.set(self.1.take());
        }
    }
    let _outer = Outer(place, place.replace(Some(T::default())));
    let result = run();
    (result, place.take().unwrap_or_default())
}

type Backward = dyn Fn(&[&Tensor], &Tensor, &Tensor) -> Result<Vec<Option<Tensor>>> + Send + Sync;

struct Node {
    name: &'static str,
    result: Mutex<Option<Fresh>>,
    backward: Box<Backward>,
}

impl Node {
    fn new(
        name: &'static str,
        result: Fresh,
        backward: impl Fn(&[&Tensor], &Tensor, &Tensor) -> Result<Vec<Option<Tensor>>> + Send + Sync + 'static,
    ) -> Self {
        Self { name, result: Mutex::new(Some(result)), backward: Box::new(backward) }
    }

    fn take(&self) -> Result<Fresh> {
        let result = self.result.lock().ok().and_then(|mut result| result.take());
        result.ok_or_else(|| candle_core::Error::Msg(format!("{}: its result was taken before", self.name)))
    }

    fn take_cpu(&self) -> Result<(CpuStorage, Shape)> {
        match self.take()? {
            Fresh { storage: Storage::Cpu(storage), shape } => Ok((storage, shape)),
            _ => bail!("{}: inputs on the CPU, a result elsewhere", self.name),
        }
    }

    fn take_cuda(&self) -> Result<(CudaStorage, Shape)> {
        match self.take()? {
            Fresh { storage: Storage::Cuda(storage), shape } => Ok((storage, shape)),
            _ => bail!("{}: inputs on a GPU, a result elsewhere", self.name),
        }
    }

    fn gradients<const N: usize>(
        &self,
        inputs: [&Tensor; N],
        result: &Tensor,
        gradient: &Tensor,
    ) -> Result<[Option<Tensor>; N]> {
        let gradient = gradient.contiguous()?;
        let mut gradients = (self.backward)(&inputs, result, &gradient)?;
        COLLECTED.with_borrow_mut(|collected| {
            let Some(collected) = collected else { return };
            let own = are_own(&gradients, &gradient);
            let of_inputs = inputs.iter().zip(gradients.iter_mut().zip(own));
            let of_variables = of_inputs.filter(|(input, _)| input.is_variable());
            collected.extend(of_variables.filter_map(|(input, (gradient, is_own))| {
                let gradient = gradient.take()?;
                Some(((*input).clone(), if is_own { Addend::Own(gradient) } else { Addend::Whole(gradient) }))
            }));
        });
        Ok(<[_; N]>::try_from(gradients).expect("one for each input"))
    }
}

impl CustomOp1 for Node {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.take_cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.take_cuda()
    }

    fn bwd(&self, a: &Tensor, result: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let [a] = self.gradients([a], result, gradient)?;
        Ok(a)
    }
}

impl CustomOp2 for Node {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.take_cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.take_cuda()
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        result: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [a, b] = self.gradients([a, b], result, gradient)?;
        Ok((a, b))
    }
}

impl CustomOp3 for Node {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.take_cpu()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.take_cuda()
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        result: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [a, b, c] = self.gradients([a, b, c], result, gradient)?;
        Ok((a, b, c))
    }
}
