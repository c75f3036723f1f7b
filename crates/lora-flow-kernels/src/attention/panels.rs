//! Keys, values and gradients laid out as panels for [`super::tile`].

use super::tile::PANEL;
use crate::common::Aligned;
use rayon::prelude::*;

/// One head of a tensor [N, heads, D]: token t begins at `t * stride`.
#[derive(Clone, Copy)]
pub(super) struct Head<'a> {
    pub(super) data: &'a [f32],
    pub(super) stride: usize,
    pub(super) width: usize,
}

impl<'a> Head<'a> {
    /// Head `head` of `heads` in `tensor` [N, heads, D].
    pub(super) fn new(tensor: &'a [f32], heads: usize, head: usize, width: usize) -> Self {
        let data = tensor.get(head * width..).unwrap_or_default();
        Self { data, stride: heads * width, width }
    }

    /// The elements of token `token`.
    pub(super) fn row(&self, token: usize) -> &'a [f32] {
        &self.data[token * self.stride..][..self.width]
    }
}

/// Panels whose columns are tokens: for each group of [`PANEL`] tokens, D rows. Left times panel
/// multiplies by the transpose.
pub(super) struct TokenPanels {
    data: Aligned,
    tokens: usize,
    width: usize,
}

impl TokenPanels {
    /// All heads of `tensor` [N, heads, D].
    pub(super) fn new(tensor: &[f32], tokens: usize, heads: usize, width: usize) -> Self {
        let panels = tokens.div_ceil(PANEL);
        let mut data = Aligned::zeros(heads * panels * width * PANEL);
        data.par_chunks_mut(width * PANEL).enumerate().for_each(|(index, panel)| {
            let head = Head::new(tensor, heads, index / panels, width);
            let first = index % panels * PANEL;
            for column in 0..PANEL.min(tokens - first) {
                let row = head.row(first + column);
                for (cell, &x) in panel[column..].iter_mut().step_by(PANEL).zip(row) {
                    *cell = x;
                }
            }
        });
        Self { data, tokens, width }
    }

    /// D: the rows of each panel.
    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// The panel of `head` that begins at `token`, a multiple of [`PANEL`].
    pub(super) fn panel(&self, head: usize, token: usize) -> &[f32] {
        let index = head * self.tokens.div_ceil(PANEL) + token / PANEL;
        let size = self.width * PANEL;
        &self.data[index * size..][..size]
    }
}

/// Panels whose columns are [`PANEL`] elements of a head and whose rows are tokens.
pub(super) struct WidthPanels {
    data: Aligned,
    tokens: usize,
    panels: usize,
}

impl WidthPanels {
    /// All heads of `tensor` [N, heads, D].
    pub(super) fn new(tensor: &[f32], tokens: usize, heads: usize, width: usize) -> Self {
        let panels = width.div_ceil(PANEL);
        let mut data = Aligned::zeros(heads * panels * tokens * PANEL);
        if tokens > 0 {
            data.par_chunks_mut(tokens * PANEL).enumerate().for_each(|(index, panel)| {
                let head = Head::new(tensor, heads, index / panels, width);
                fill(panel, head, 0, index % panels);
            });
        }
        Self { data, tokens, panels }
    }

    /// Panel `panel` of `head`, from row `token` on.
    pub(super) fn panel(&self, head: usize, panel: usize, token: usize) -> &[f32] {
        let start = (head * self.panels + panel) * self.tokens;
        &self.data[(start + token) * PANEL..(start + self.tokens) * PANEL]
    }
}

/// Writes the elements `[panel·PANEL, …)` of `out.len() / PANEL` tokens from `first` on.
pub(super) fn fill(out: &mut [f32], head: Head<'_>, first: usize, panel: usize) {
    let columns = panel * PANEL..head.width.min((panel + 1) * PANEL);
    for (index, out) in out.chunks_exact_mut(PANEL).enumerate() {
        let (filled, rest) = out.split_at_mut(columns.len());
        filled.copy_from_slice(&head.row(first + index)[columns.clone()]);
        rest.fill(0.0);
    }
}
