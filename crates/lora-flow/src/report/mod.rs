//! `lora-flow report`: one HTML page of one or more runs, that needs nothing beside itself.

pub mod data;
pub mod page;
mod plot;
mod samples;
mod verdict;
