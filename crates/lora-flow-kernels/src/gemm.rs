//! Matrix products on strided slices, through the `gemm` crate.
//!
//! The order in which `gemm` adds the products of one element depends on the shapes alone, not on
//! how its threads share the tiles, so results keep their bits for any number of threads.

use gemm::Parallelism;

/// A matrix inside a slice: element (i, j) at `i * row_stride + j * column_stride`.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Mat<'a> {
    /// A row-major matrix without gaps.
    pub(crate) fn new(data: &'a [f32], rows: usize, columns: usize) -> Self {
        Self { data, rows, columns, row_stride: columns, column_stride: 1 }.checked()
    }

    /// The transpose, without moving anything.
    pub(crate) fn t(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    /// Columns `[start, start + columns)`.
    pub(crate) fn columns(self, start: usize, columns: usize) -> Self {
        assert!(start + columns <= self.columns, "columns out of bounds");
        let data = self.data.get(start * self.column_stride..).unwrap_or_default();
        Self { data, columns, ..self }.checked()
    }

    fn checked(self) -> Self {
        let last = (self.rows.max(1) - 1) * self.row_stride
            + (self.columns.max(1) - 1) * self.column_stride;
        let empty = self.rows == 0 || self.columns == 0;
        assert!(empty || last < self.data.len(), "matrix is larger than its slice");
        self
    }
}

/// What happens with the values that the destination held.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Into {
    /// They are overwritten (and may be anything).
    Overwrite,
    /// The product is added to them.
    Add,
}

/// `c = scale · a·b` or `c += scale · a·b`, with `c` row-major [a.rows, b.columns] in rows of
/// `c_stride` elements, on all threads of the current rayon pool.
pub(crate) fn matmul(
    c: &mut [f32],
    c_stride: usize,
    mode: Into,
    scale: f32,
    a: Mat<'_>,
    b: Mat<'_>,
) {
    let (m, n) = (a.rows, b.columns);
    if m == 0 || n == 0 {
        return;
    }
    assert!(n <= c_stride && (m - 1) * c_stride + n <= c.len(), "destination is too small");
    // Safety: the destination is large enough by the assertion and borrowed exclusively.
    unsafe { raw(c.as_mut_ptr(), c_stride, mode, scale, a, b) }
}

/// `scale · a·b`, row-major, in a new vector that is not filled with zeros first.
pub(crate) fn product(scale: f32, a: Mat<'_>, b: Mat<'_>) -> Vec<f32> {
    let len = a.rows * b.columns;
    let mut c = Vec::with_capacity(len);
    // Safety: the spare capacity holds `len` elements, and overwriting writes all of them.
    unsafe {
        raw(c.as_mut_ptr(), b.columns, Into::Overwrite, scale, a, b);
        c.set_len(len);
    }
    c
}

/// # Safety
/// `c` must be valid for writes (and for reads, to add) of `a.rows` rows of `b.columns` elements,
/// `c_stride` apart, that overlap neither operand.
unsafe fn raw(c: *mut f32, c_stride: usize, mode: Into, scale: f32, a: Mat<'_>, b: Mat<'_>) {
    assert_eq!(a.columns, b.rows, "inner dimensions of a matrix product");
    // Safety: both operands are in bounds by `Mat::checked`, the destination by the caller.
    unsafe {
        gemm::gemm(
            a.rows,
            b.columns,
            a.columns,
            c,
            1,
            c_stride as isize,
            mode == Into::Add,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            Parallelism::Rayon(0),
        );
    }
}
