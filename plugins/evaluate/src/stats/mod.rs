//! Tests and intervals that a verdict rests on.

pub(crate) mod bootstrap;
pub(crate) mod mcnemar;
pub(crate) mod normal;
pub(crate) mod python_random;

#[cfg(test)]
mod tests;
