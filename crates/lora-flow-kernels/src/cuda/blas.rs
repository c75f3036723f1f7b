//! Matrix products through cuBLASLt. Matrices are row-major, with a stride between rows.

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::sync::{Arc, PoisonError};

use super::Element;
use super::driver::{self, Algo, BlasLt, DevicePtr, Driver, Handle, Heuristic};
use super::gpu::{CudaError, Gpu};

/// Workspace that products may use.
const WORKSPACE: usize = 64 << 20;

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

/// Descriptors and algorithm of one shape.
struct Plan {
    desc: Handle,
    a: Handle,
    b: Handle,
    c: Handle,
    add: Handle,
    algo: Algo,
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
            algo: Algo::default(),
        };
        let (mut preference, mut found, mut count) =
            (std::ptr::null_mut(), Heuristic::default(), 0);
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
                1,
                &mut found,
                &mut count,
            );
            (lib.preference_destroy)(preference);
            check(code, &format!("choosing an algorithm for {p:?}"))?;
        }
        if count == 0 {
            return Err(CudaError::new(
                format!("cuBLASLt has no algorithm for {p:?}"),
                "this is a bug",
            ));
        }
        plan.algo = found.algo;
        Ok(plan)
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
        let shape = Shape {
            sizes: [p.m, p.n, p.k, p.a.1, p.b.1, p.c.1, p.add.1],
            flags: [p.a_t, p.b_t, p.beta == 0.0, p.add.0 == p.c.0],
            align: [p.a.0, p.b.0, p.c.0, p.add.0].map(alignment),
            input: p.input,
            output: p.output,
        };
        let plan = match plans.entry(shape) {
            std::collections::hash_map::Entry::Occupied(e) => e.into_mut(),
            std::collections::hash_map::Entry::Vacant(e) => e.insert(Blas::plan(open, &p, &shape)?),
        };
        let scalar = |x: &f32| std::ptr::from_ref(x).cast::<c_void>();
        self.noted(
            || format!("product {}x{}x{}", p.m, p.n, p.k),
            || {
                // Safety: the plan describes the matrices, which the caller keeps alive.
                let code = unsafe {
                    (open.lib.matmul)(
                        open.handle,
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
                        &plan.algo,
                        open.workspace,
                        WORKSPACE,
                        self.stream,
                    )
                };
                check(code, "multiplying")
            },
        )
    }
}
