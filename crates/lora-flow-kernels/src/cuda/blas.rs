//! Matrix products through cuBLASLt. Matrices are row-major, with a stride between rows.

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::sync::{Arc, PoisonError};

use super::Element;
use super::driver::{self, Algo, BlasLt, DevicePtr, Driver, Handle, Heuristic};
use super::gpu::{CudaError, Gpu};

/// Workspace that products may use.
const WORKSPACE: usize = 32 << 20;
/// Algorithms that are asked for, and times that each runs when they are compared.
const CANDIDATES: usize = 12;
const RUNS: usize = 3;
/// Products with less arithmetic take the first algorithm: comparing would not pay.
const WORTH_COMPARING: f64 = 2e9;

/// C = α·op(A)·op(B) + β·D, row-major: C [m, n], op(A) [m, k], op(B) [k, n].
#[derive(Debug, Clone, Copy)]
pub struct Product {
    /// Rows of C.
    pub m: usize,
    /// Columns of C.
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
    /// A and its row stride; stored [k, m] if `a_t`.
    pub a: (DevicePtr, usize),
    /// Whether A is stored transposed.
    pub a_t: bool,
    /// B and its row stride; stored [n, k] if `b_t`.
    pub b: (DevicePtr, usize),
    /// Whether B is stored transposed.
    pub b_t: bool,
    /// C and its row stride.
    pub c: (DevicePtr, usize),
    /// What is added, β times; may be C.
    pub add: (DevicePtr, usize),
    /// Factor of the product.
    pub alpha: f32,
    /// Factor of `add`; with 0 it is not read.
    pub beta: f32,
    /// Dtype of A and B.
    pub input: Element,
    /// Dtype of C and `add`.
    pub output: Element,
}

/// What decides the choice of an algorithm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    sizes: [usize; 7],
    flags: [bool; 4],
    align: [u32; 4],
    input: Element,
    output: Element,
}

impl Shape {
    fn of(p: &Product) -> Self {
        Self {
            sizes: [p.m, p.n, p.k, p.a.1, p.b.1, p.c.1, p.add.1],
            flags: [p.a_t, p.b_t, p.beta == 0.0, p.add.0 == p.c.0],
            align: [p.a.0, p.b.0, p.c.0, p.add.0].map(alignment),
            input: p.input,
            output: p.output,
        }
    }
}

/// Descriptors and algorithms of one shape.
struct Plan {
    desc: Handle,
    a: Handle,
    b: Handle,
    c: Handle,
    add: Handle,
    /// The library's suggestions, best first, until they have been compared; then the fastest.
    algos: Vec<Algo>,
}

/// The library's handle, its workspace and the plans made so far.
pub(crate) struct Blas {
    open: Option<Open>,
    plans: HashMap<Shape, Plan>,
}

struct Open {
    lib: &'static BlasLt,
    handle: Handle,
    workspace: DevicePtr,
}

fn check(code: c_int, doing: &str) -> Result<(), CudaError> {
    let name = match code {
        0 => return Ok(()),
        1 => "not initialised",
        3 => "no memory",
        7 => "invalid value",
        8 => "architecture mismatch",
        13 => "execution failed",
        14 => "internal error",
        15 => "not supported",
        _ => "failed",
    };
    Err(CudaError::new(
        format!("cuBLASLt: {name} (status {code}) while {doing}"),
        "this is a bug, unless the GPU failed before",
    ))
}

/// The largest power of two up to 256 that divides an address.
fn alignment(at: DevicePtr) -> u32 {
    1 << at.trailing_zeros().min(8)
}

impl Blas {
    pub(crate) fn none() -> Self {
        Self { open: None, plans: HashMap::new() }
    }

    pub(crate) fn new(gpu: &Gpu) -> Result<Self, CudaError> {
        let lib = driver::blas()?;
        let (mut handle, mut workspace) = (std::ptr::null_mut(), 0);
        gpu.enter()?;
        // Safety: valid pointers; the context is current.
        unsafe {
            check((lib.create)(&mut handle), "starting")?;
            if (gpu.driver.alloc)(&mut workspace, WORKSPACE) != 0 {
                return Err(CudaError::new(
                    "the GPU has no room for the workspace of the products",
                    "what else runs on it?",
                ));
            }
        }
        Ok(Self { open: Some(Open { lib, handle, workspace }), plans: HashMap::new() })
    }

    pub(crate) fn close(&mut self, driver: &Driver) {
        let Some(open) = self.open.take() else { return };
        // Safety: the handles are ours.
        unsafe {
            for (_, plan) in self.plans.drain() {
                (open.lib.desc_destroy)(plan.desc);
                for layout in [plan.a, plan.b, plan.c, plan.add] {
                    (open.lib.layout_destroy)(layout);
                }
            }
            (driver.free)(open.workspace);
            (open.lib.destroy)(open.handle);
        }
    }

    fn plan(open: &Open, p: &Product, shape: &Shape) -> Result<Plan, CudaError> {
        /// `CUDA_R_32F` and `CUDA_R_16BF`.
        fn dtype(element: Element) -> c_int {
            match element {
                Element::F32 => 0,
                Element::Bf16 => 14,
            }
        }
        const COMPUTE_32F: c_int = 68;
        let lib = open.lib;
        // cuBLASLt is column-major: a row-major matrix is its transpose there, so it computes
        // Cᵀ = op(B)ᵀ·op(A)ᵀ, with our B as its A.
        let stored =
            |t: bool, rows: usize, cols: usize| if t { (cols, rows) } else { (rows, cols) };
        let (a_rows, a_cols) = stored(p.a_t, p.m, p.k);
        let (b_rows, b_cols) = stored(p.b_t, p.k, p.n);
        let layout =
            |element: Element, rows: usize, cols: usize, ld: usize| -> Result<Handle, CudaError> {
                let mut handle = std::ptr::null_mut();
                // Safety: a valid pointer.
                let code = unsafe {
                    (lib.layout_create)(
                        &mut handle,
                        dtype(element),
                        cols as u64,
                        rows as u64,
                        ld as i64,
                    )
                };
                check(code, "describing a matrix")?;
                Ok(handle)
            };
        let mut desc = std::ptr::null_mut();
        // Safety: valid pointers, sizes as the header has them.
        unsafe {
            check((lib.desc_create)(&mut desc, COMPUTE_32F, 0), "describing a product")?;
            for (attribute, t) in [(3, p.b_t), (4, p.a_t)] {
                let value: c_int = t.into();
                check(
                    (lib.desc_set)(desc, attribute, (&raw const value).cast(), 4),
                    "describing a product",
                )?;
            }
        }
        let mut plan = Plan {
            desc,
            a: layout(p.input, b_rows, b_cols, p.b.1)?,
            b: layout(p.input, a_rows, a_cols, p.a.1)?,
            c: layout(p.output, p.m, p.n, p.c.1)?,
            add: layout(p.output, p.m, p.n, p.add.1)?,
            algos: Vec::new(),
        };
        let (mut preference, mut found, mut count) =
            (std::ptr::null_mut(), [Heuristic::default(); CANDIDATES], 0);
        // Safety: as above.
        unsafe {
            check((lib.preference_create)(&mut preference), "choosing an algorithm")?;
            let bytes = WORKSPACE;
            (lib.preference_set)(preference, 1, (&raw const bytes).cast(), 8);
            let [a, b, c, add] = shape.align;
            for (attribute, value) in [(5, b), (6, a), (7, add), (8, c)] {
                (lib.preference_set)(preference, attribute, (&raw const value).cast(), 4);
            }
            let code = (lib.heuristic)(
                open.handle,
                plan.desc,
                plan.a,
                plan.b,
                plan.add,
                plan.c,
                preference,
                CANDIDATES as c_int,
                found.as_mut_ptr(),
                &mut count,
            );
            (lib.preference_destroy)(preference);
            check(code, &format!("choosing an algorithm for {p:?}"))?;
        }
        let usable = found.iter().take(count as usize).filter(|f| f.state == 0);
        plan.algos = usable.map(|f| f.algo).collect();
        if plan.algos.is_empty() {
            return Err(CudaError::new(
                format!("cuBLASLt has no algorithm for {p:?}"),
                "this is a bug",
            ));
        }
        Ok(plan)
    }
}

impl Open {
    fn run(&self, plan: &Plan, algo: &Algo, p: &Product, stream: Handle) -> Result<(), CudaError> {
        let scalar = |x: &f32| std::ptr::from_ref(x).cast::<c_void>();
        // Safety: the plan describes the matrices, which the caller keeps alive.
        let code = unsafe {
            (self.lib.matmul)(
                self.handle,
                plan.desc,
                scalar(&p.alpha),
                p.b.0,
                plan.a,
                p.a.0,
                plan.b,
                scalar(&p.beta),
                p.add.0,
                plan.add,
                p.c.0,
                plan.c,
                algo,
                self.workspace,
                WORKSPACE,
                stream,
            )
        };
        check(code, "multiplying")
    }

    /// Runs each of the plan's algorithms: milliseconds, and whether it gives the bits of the first.
    fn compare(
        &self,
        gpu: &Arc<Gpu>,
        plan: &Plan,
        p: &Product,
    ) -> Result<Vec<(f32, bool)>, CudaError> {
        let mut results = Vec::new();
        let mut bits = None;
        for algo in &plan.algos {
            // What the library suggests it may still refuse.
            if self.run(plan, algo, p, gpu.stream).is_err() {
                results.push((f32::INFINITY, false));
                continue;
            }
            let sum = super::ops::checksum(gpu, p.output, p.c, p.m, p.n)?;
            let start = gpu.mark()?;
            for _ in 0..RUNS {
                self.run(plan, algo, p, gpu.stream)?;
            }
            let end = gpu.mark()?;
            gpu.wait()?;
            let same = *bits.get_or_insert(sum) == sum;
            results.push((end.since(&start)? / RUNS as f32, same));
        }
        Ok(results)
    }
}

impl Gpu {
    /// Queues a matrix product.
    ///
    /// # Errors
    /// When cuBLASLt refuses it or the device failed.
    pub fn product(self: &Arc<Self>, p: &Product) -> Result<(), CudaError> {
        if p.m == 0 || p.n == 0 {
            return Ok(());
        }
        self.enter()?;
        let mut blas = self.blas.lock().unwrap_or_else(PoisonError::into_inner);
        let Blas { open, plans } = &mut *blas;
        let Some(open) = open else {
            return Err(CudaError::new("cuBLASLt is not open", "this is a bug"));
        };
        let add = if p.beta == 0.0 { p.c } else { p.add };
        let p = Product { add, ..*p };
        let shape = Shape::of(&p);
        let plan = match plans.entry(shape) {
            std::collections::hash_map::Entry::Occupied(e) => e.into_mut(),
            std::collections::hash_map::Entry::Vacant(e) => {
                let mut plan = Blas::plan(open, &p, &shape)?;
                // A product that is added to its own place would not stay the same.
                let again = p.beta == 0.0 || p.add.0 != p.c.0;
                let work = 2.0 * p.m as f64 * p.n as f64 * p.k as f64;
                if again && work >= WORTH_COMPARING && plan.algos.len() > 1 {
                    let times = open.compare(self, &plan, &p)?;
                    // Only those with the bits of the first: which is the fastest may differ from
                    // run to run, and the result must not.
                    let same = times.iter().zip(&plan.algos).filter(|((_, same), _)| *same);
                    let best = same.min_by(|((a, _), _), ((b, _), _)| a.total_cmp(b));
                    plan.algos = vec![best.map_or(plan.algos[0], |(_, algo)| *algo)];
                }
                e.insert(plan)
            }
        };
        self.noted(
            || format!("product {}x{}x{}", p.m, p.n, p.k),
            || open.run(plan, &plan.algos[0], &p, self.stream),
        )
    }

    /// Milliseconds of each algorithm that cuBLASLt suggests for a product, the one it likes best
    /// first, and whether it gives the same bits as that one. Waits.
    ///
    /// # Errors
    /// When cuBLASLt refuses the product or the device failed.
    pub fn compare_algorithms(
        self: &Arc<Self>,
        p: &Product,
    ) -> Result<Vec<(f32, bool)>, CudaError> {
        self.product(p)?;
        let mut blas = self.blas.lock().unwrap_or_else(PoisonError::into_inner);
        let Blas { open: Some(open), .. } = &mut *blas else { return Ok(Vec::new()) };
        let add = if p.beta == 0.0 { p.c } else { p.add };
        let p = Product { add, ..*p };
        let plan = Blas::plan(open, &p, &Shape::of(&p))?;
        open.compare(self, &plan, &p)
    }
}
